"""A model's tensors in a zip of Stable-Baselines3's layout, without the part that is pickle.

`BaseAlgorithm.save` also writes a member `data`, whose values are pickled, and
`BaseAlgorithm.load` runs whatever is in it. Here a model is rebuilt from our own configuration and
only tensors are read, by `torch.load(weights_only=True)`, which builds nothing else. Any other
member makes the file refused, unread.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import recursive_getattr

from batchpilot.agents.parameters import ConfigError

VARIABLES = "pytorch_variables"
#: More than any policy here needs; a small file can unpack to far more than memory holds.
MOST_MEMBER_BYTES = 256 * 2**20
_MEMBER = re.compile(r"[a-z_]+(\.[a-z_]+)*\.pth")
_HARMLESS = {"_stable_baselines3_version", "system_info.txt"}

Tensors = dict[str, Any]


class CheckpointError(ConfigError):
    """A file of a trained model that cannot be used; the text says which and why."""


def write_model(model: BaseAlgorithm, path: Path) -> None:
    """Writes networks, optimizers and loose tensors."""
    members: dict[str, Any] = dict(model.get_parameters())
    _, names = model._get_torch_save_params()
    loose = {name: recursive_getattr(model, name) for name in names or ()}
    if loose:
        members[VARIABLES] = loose
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in members.items():
            buffer = io.BytesIO()
            torch.save(value, buffer)
            archive.writestr(f"{name}.pth", buffer.getvalue())


def read_tensors(path: Path) -> dict[str, Tensors]:
    """Reads every member; nothing in the file is executed.

    Returns:
        State dictionaries by name: `policy`, `policy.optimizer` and so on.

    Raises:
        CheckpointError: No such file, no zip, a member that is not tensors, or weights that are
            not finite.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [item for item in archive.infolist() if item.filename not in _HARMLESS]
            for item in members:
                _check_member(path, item)
            return {
                item.filename.removesuffix(".pth"): _load(path, item.filename, archive.read(item))
                for item in members
            }
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"cannot read model {path}: {error}") from error


def load_model(model: BaseAlgorithm, path: Path) -> None:
    """Puts a file's tensors into a model built with the same hyperparameters.

    Raises:
        CheckpointError: As `read_tensors`, or tensors that are not this model's.
    """
    tensors = read_tensors(path)
    loose = tensors.pop(VARIABLES, {})
    _, names = model._get_torch_save_params()
    try:
        model.set_parameters(tensors, exact_match=True, device="cpu")
        for name in names or ():
            if isinstance(own := recursive_getattr(model, name), torch.Tensor):
                own.data = loose[name].data.reshape(own.shape)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model {path} is not of this algorithm and shape: {reason}"
        ) from None


def _check_member(path: Path, item: zipfile.ZipInfo) -> None:
    if not _MEMBER.fullmatch(item.filename):
        raise CheckpointError(
            f"model {path} is refused: its member {item.filename!r} is not tensors, and could run "
            "code if it were read"
        )
    if item.file_size > MOST_MEMBER_BYTES:
        raise CheckpointError(
            f"model {path} is refused: {item.filename!r} unpacks to {item.file_size} bytes, more "
            f"than {MOST_MEMBER_BYTES}"
        )


def _load(path: Path, name: str, content: bytes) -> Tensors:
    try:
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model {path} is refused: {name!r} holds more than tensors, or is broken: {reason}"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"model {path} is refused: {name!r} is not a set of tensors")
    for key, tensor in value.items():
        if isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"model {path} is refused: {key} in {name!r} is not finite")
    return value
