"""Reads what an ONNX file holds, without running or allocating any of it.

An ONNX file is a protobuf message; its wire format is plain enough to be read here, so that a
policy can be examined where neither onnx nor onnxruntime is installed, and before either sees it.
What a policy has no use for is refused: data in other files, control flow, functions, operators
that are not on a short list, weights that are no numbers.

Source of the field numbers: onnx/onnx.proto of the ONNX project, IR version 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from batchpilot.agents.parameters import ConfigError

MOST_NODES = 500
MOST_DIMENSIONS = 4

#: What networks of this kind are made of: no loop, no branch, nothing that blows tensors up.
_ALLOWED = (
    "Abs Add And ArgMax Cast Clip Concat Constant Div Elu Equal Erf Exp Flatten GRU Gather Gelu "
    "Gemm Greater HardSigmoid HardSwish Identity LSTM LayerNormalization LeakyRelu Less Log "
    "LogSoftmax MatMul Max Min Mish Mul Neg Not Or Pow ReduceMax ReduceMean ReduceSum Relu Reshape "
    "Selu Shape Sigmoid Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze "
    "Where"
)
ALLOWED_OPERATORS = frozenset(_ALLOWED.split())
#: ONNX data types: name, bytes an element, and where its values are if not in `raw_data`.
_TYPES: Mapping[int, tuple[str, int, int]] = {
    1: ("<f4", 4, 4),
    6: ("<i4", 4, 5),
    7: ("<i8", 8, 7),
    9: ("|b1", 1, 5),
    10: ("<f2", 2, 5),
    11: ("<f8", 8, 10),
}
_FIXED_WIDTH = ("<f4", "<f8")
FLOAT32 = 1
_EXTERNAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class OnnxError(ConfigError):
    """A file that is no ONNX model, or one that a policy may not be."""


class OnnxValue(NamedTuple):
    """An input or an output.

    Attributes:
        name: Its name.
        data_type: ONNX's number of the element type; `FLOAT32`.
        shape: Sizes; None where the model leaves one open.
    """

    name: str
    data_type: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class OnnxContent:
    """What an ONNX model takes, gives and is made of.

    Attributes:
        inputs: In order; weights are not among them.
        outputs: In order.
        operators: One name a node, in order.
        parameters: Numbers in its weights and constants.
    """

    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    operators: tuple[str, ...]
    parameters: int


def read_onnx(data: bytes) -> OnnxContent:
    """Reads a model and checks all that can be checked without running it.

    Raises:
        OnnxError: It is no ONNX model, is cut off, or holds what a policy may not.
    """
    model = _Fields(data)
    graphs = model.messages(7)
    if len(graphs) != 1:
        raise OnnxError("not an ONNX model, or one that is cut off: it has no graph")
    if model.messages(25) or model.messages(20):
        raise OnnxError("the model holds functions or training code of its own")
    return _graph(graphs[0])


def _graph(graph: _Fields) -> OnnxContent:
    if graph.messages(15):
        raise OnnxError("the model holds sparse weights")
    nodes = graph.messages(1)
    if not 0 < len(nodes) <= MOST_NODES:
        raise OnnxError(f"the model has {len(nodes)} nodes; 1 to {MOST_NODES} are allowed")
    weights = graph.messages(5)
    parameters = sum(_check_tensor(tensor) for tensor in weights)
    parameters += sum(_check_node(node) for node in nodes)
    names = {tensor.text(8) for tensor in weights}
    inputs = (_value(value) for value in graph.messages(11))
    return OnnxContent(
        inputs=tuple(value for value in inputs if value.name not in names),
        outputs=tuple(_value(value) for value in graph.messages(12)),
        operators=tuple(node.text(4) for node in nodes),
        parameters=parameters,
    )


def _check_node(node: _Fields) -> int:
    """Checks an operator; returns how many numbers it carries."""
    operator, domain = node.text(4), node.text(7)
    if domain not in ("", "ai.onnx") or operator not in ALLOWED_OPERATORS:
        name = f"{domain}.{operator}" if domain else operator
        raise OnnxError(f"operator {name!r} is not one that a policy may use")
    numbers = 0
    for attribute in node.messages(5):
        if any(attribute.messages(field) for field in (6, 11, 22, 23)):
            raise OnnxError(f"operator {operator!r} holds a graph or sparse tensor of its own")
        tensors = (*attribute.messages(5), *attribute.messages(10))
        numbers += sum(_check_tensor(tensor) for tensor in tensors)
    return numbers


def _check_tensor(tensor: _Fields) -> int:
    """Checks a tensor; returns how many numbers it holds."""
    name = tensor.text(8) or "a constant"
    if tensor.messages(13) or tensor.integer(14) == _EXTERNAL:
        raise OnnxError(f"{name}: its data is in another file (external data)")
    data_type = tensor.integer(2)
    if data_type not in _TYPES:
        raise OnnxError(f"{name}: data type {data_type} is not one that a policy may use")
    dims = tensor.integers(1)
    if len(dims) > MOST_DIMENSIONS or any(size < 0 for size in dims):
        raise OnnxError(f"{name}: shape {dims} is not one that a policy may use")
    count = math.prod(dims)
    kind, size, field = _TYPES[data_type]
    raw = tensor.message_bytes(9)
    if raw is not None and len(raw) != count * size:
        raise OnnxError(f"{name}: {len(raw)} bytes of data for shape {dims}: it is cut off")
    fixed = size if kind in _FIXED_WIDTH else 0
    values = raw if raw is not None else tensor.packed(field, fixed)
    if raw is None and not _holds(values, count, kind, size):
        raise OnnxError(f"{name}: too little or too much data for shape {dims}")
    if kind in _FIXED_WIDTH or (kind == "<f2" and raw is not None):
        _check_finite(name, values, kind)
    return count


def _holds(values: bytes, count: int, kind: str, size: int) -> bool:
    """Whether values that are not raw are as many as the shape says."""
    if kind in _FIXED_WIDTH:
        return len(values) == count * size
    return len(_varints(values)) == count


def _check_finite(name: str, values: bytes, kind: str) -> None:
    if not np.isfinite(np.frombuffer(values, dtype=kind)).all():
        raise OnnxError(f"{name}: holds NaN or infinity")


def _value(value: _Fields) -> OnnxValue:
    name = value.text(1)
    kinds = [kind for type_ in value.messages(2) for kind in type_.messages(1)]
    if len(kinds) != 1:
        raise OnnxError(f"{name!r} is not a tensor")
    dims = [dim for shape in kinds[0].messages(2) for dim in shape.messages(1)]
    sizes = tuple(dim.integer(1) if dim.has(1) else None for dim in dims)
    return OnnxValue(name, kinds[0].integer(1), sizes)


class _Fields:
    """The fields of one protobuf message, by number, undecoded."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Splits the message.

        Raises:
            OnnxError: It is malformed or cut off.
        """
        self._found: dict[int, list[int | memoryview]] = {}
        for number, value in _split(memoryview(data)):
            self._found.setdefault(number, []).append(value)

    def has(self, number: int) -> bool:
        """Whether a field is there."""
        return number in self._found

    def messages(self, number: int) -> list[_Fields]:
        """The messages in a field."""
        return [_Fields(_as_bytes(value)) for value in self._found.get(number, ())]

    def message_bytes(self, number: int) -> bytes | None:
        """The newest bytes in a field; None without any."""
        values = self._found.get(number)
        return bytes(_as_bytes(values[-1])) if values else None

    def text(self, number: int) -> str:
        """A text; empty where it is not there."""
        return (self.message_bytes(number) or b"").decode("utf-8", "replace")

    def integer(self, number: int) -> int:
        """A whole number; 0 where it is not there."""
        value = self._found.get(number, [0])[-1]
        if not isinstance(value, int):
            raise OnnxError("not an ONNX model: text where a number belongs")
        return value

    def integers(self, number: int) -> list[int]:
        """Whole numbers, packed or one by one."""
        found: list[int] = []
        for value in self._found.get(number, ()):
            found += [value] if isinstance(value, int) else _varints(value)
        return found

    def packed(self, number: int, fixed: int) -> bytes:
        """All values of a repeated number, one after another.

        Args:
            number: The field.
            fixed: Bytes of each; 0 for whole numbers of any length.
        """
        parts = []
        for value in self._found.get(number, ()):
            if isinstance(value, int):
                parts.append(value.to_bytes(fixed, "little") if fixed else _varint_bytes(value))
            else:
                parts.append(bytes(value))
        return b"".join(parts)


def _as_bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise OnnxError("not an ONNX model: a number where text belongs")
    return value


def _split(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message in order: numbers, and bytes that are not copied."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise OnnxError("not an ONNX model: its bytes are no protobuf message")
        if at + length > len(data):
            raise OnnxError("the model is cut off")
        chunk = data[at : at + length]
        yield number, chunk if wire == _BYTES else int.from_bytes(chunk, "little")
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and where the next field starts."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise OnnxError("the model is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise OnnxError("not an ONNX model: a number of more than 64 bits")
    value &= 2**64 - 1
    return (value - 2**64 if value >= 2**63 else value), at


def _varints(data: bytes | memoryview) -> list[int]:
    view, at, values = memoryview(data), 0, []
    while at < len(view):
        value, at = _varint(view, at)
        values.append(value)
    return values


def _varint_bytes(value: int) -> bytes:
    value &= 2**64 - 1
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
