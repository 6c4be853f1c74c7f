"""GPU profiles: what a model on a GPU costs per step, and how much KV cache it has.

A profile is a JSON file, one object with exactly these keys:

    name                lower case, `<model>-<gpu>[-tpN]`, such as `llama-3.1-70b-h100-tp4`
    model               the model, in full
    gpu                 the device, in full
    tensor_parallel     devices that share the model
    kv_bytes_per_token  KV-cache bytes of one token, all devices together
    num_blocks          KV blocks, the one that vLLM keeps for itself included
    block_size          tokens per KV block
    max_model_len       longest prompt and output together, in tokens
    step_time           coefficients of the step time, all in milliseconds; see `StepTimeModel`
    noise               relative standard deviation of a step's time, 0 for none
    source              where each number is from
    licence             the licence of the measurements
    fit_error           how far the step time is from them; see `FitError`

Bundled profiles go by name, other files by path:

    load_profile("llama-3.1-8b-h100")
    load_profile("my-profile.json")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.agents.strict_json import parse_object

#: The keys of a file, in the order they are written.
_KEYS = (
    *("name", "model", "gpu", "tensor_parallel", "kv_bytes_per_token"),
    *("num_blocks", "block_size", "max_model_len", "step_time", "noise"),
    *("source", "licence", "fit_error"),
)
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_BUNDLED = resources.files("batchpilot.env") / "gpu_profiles"


@dataclass(frozen=True)
class StepTimeModel(Parameters):
    """The time of one engine step.

    In milliseconds, with D sequences that decode, P prompt tokens that are computed, K tokens of
    context that the decoding sequences hold together, and S, the sum over the prompts computed of
    end^2 - start^2, where a prompt is computed from its token `start` to its token `end`:

        t = decode_seq*D + (kv_token + mixed_kv_token*[P>0 and D>0])*K + prefill_squared*S
            + max(floor, linear_base + token*(D+P)) + overhead + overhead_decode_seq*D

    The `max` is the linear layers: reading the weights takes `floor` however few the tokens, until
    computing takes longer. K is attention over the KV cache; S is twice the pairs of a prompt's
    token and one before it, so attention inside the prompts, P^2 for one that is computed whole.

    Limitations: each coefficient is as good as the batches it was fitted to, and those measured
    for S held one whole prompt.
    """

    floor_ms: float = parameter(minimum=0, help="the weights' read time, a step's least")
    linear_base_ms: float = parameter(minimum=0, help="linear layers once they are compute-bound")
    token_ms: float = parameter(minimum=0, help="each token through the linear layers then")
    decode_seq_ms: float = parameter(minimum=0, help="each decoding sequence: sampling and launch")
    kv_token_ms: float = parameter(minimum=0, help="each token of context a decode reads")
    mixed_kv_token_ms: float | None = parameter(
        minimum=0, help="more of it where prompts share the step; null: unknown, counted as 0"
    )
    prefill_squared_ms: float = parameter(minimum=0, help="attention inside prompts, per token^2")
    overhead_ms: float = parameter(minimum=0, help="the engine's own time, each step")
    overhead_decode_seq_ms: float = parameter(
        minimum=0, help="the engine's own time, each decoding sequence"
    )

    def seconds(
        self,
        decode_seqs: int,
        prefill_tokens: int,
        kv_tokens: int,
        prefill_squares: int | None = None,
    ) -> float:
        """The time of a step.

        Args:
            decode_seqs: Sequences that decode in it.
            prefill_tokens: Prompt tokens it computes.
            kv_tokens: Context lengths of the decoding sequences, summed.
            prefill_squares: Of each prompt computed, the squared token at which the step ends with
                it less that at which it begins, summed; None for one whole prompt.

        Returns:
            Seconds.
        """
        if prefill_squares is None:
            prefill_squares = prefill_tokens * prefill_tokens
        kv_token_ms = self.kv_token_ms
        if prefill_tokens and decode_seqs and self.mixed_kv_token_ms is not None:
            kv_token_ms += self.mixed_kv_token_ms
        linear_ms = self.linear_base_ms + self.token_ms * (decode_seqs + prefill_tokens)
        if linear_ms < self.floor_ms:
            linear_ms = self.floor_ms
        return 1e-3 * (
            linear_ms
            + self.overhead_ms
            + (self.decode_seq_ms + self.overhead_decode_seq_ms) * decode_seqs
            + kv_token_ms * kv_tokens
            + self.prefill_squared_ms * prefill_squares
        )


@dataclass(frozen=True)
class FitError(Parameters):
    """How far fitted step times are from the measured ones.

    The engine's overhead is not in it where `source` takes that from elsewhere.
    """

    mean_relative: float = parameter(minimum=0, help="mean of |fitted - measured| / measured")
    p90_relative: float = parameter(minimum=0, help="nine of ten are within this")
    samples: int = parameter(minimum=1, help="measured steps that were compared")


@dataclass(frozen=True)
class GpuProfile(Parameters):
    """A model on a GPU; the module says what each field means.

    Raises:
        ConfigError: A value out of range, or a KV cache that cannot hold what it must.
    """

    step_time: StepTimeModel
    fit_error: FitError
    name: str = parameter(help="<model>-<gpu>[-tpN]")
    model: str = parameter(help="the model, in full")
    gpu: str = parameter(help="the device, in full")
    tensor_parallel: int = parameter(minimum=1, help="devices that share the model")
    kv_bytes_per_token: int = parameter(minimum=1, help="KV-cache bytes of a token")
    num_blocks: int = parameter(minimum=2, help="KV blocks, one of which vLLM keeps")
    block_size: int = parameter(minimum=1, help="tokens per KV block")
    max_model_len: int = parameter(minimum=2, help="longest prompt and output together")
    noise: float = parameter(minimum=0, below=1, help="relative standard deviation of a step")
    source: str = parameter(help="where each number is from")
    licence: str = parameter(help="the licence of the measurements")

    def __post_init__(self) -> None:
        """Checks each value, then what ranges cannot say."""
        super().__post_init__()
        for key in ("model", "gpu", "source", "licence"):
            if not getattr(self, key).strip():
                raise ConfigError(f"{key}={getattr(self, key)!r} must not be empty")
        check_profile_name(self.name)
        if self.step_time.seconds(1, 0, 0) <= 0:
            raise ConfigError("step_time: a step of one sequence takes no time")

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that requests can hold in the KV cache."""
        return (self.num_blocks - 1) * self.block_size


def check_profile_name(name: str) -> None:
    """Checks that a profile may be called so.

    Raises:
        ConfigError: It may not.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name={name!r} must be lower-case letters, digits, dots and dashes")


def profile_names() -> tuple[str, ...]:
    """The bundled profiles, in alphabetical order."""
    names = (item.name for item in _BUNDLED.iterdir() if item.name.endswith(".json"))
    return tuple(sorted(name.removesuffix(".json") for name in names))


def load_profile(name_or_path: str) -> GpuProfile:
    """Reads a bundled profile by name, or any by the path of its file.

    Raises:
        ConfigError: There is no such profile, or a field of it cannot be used; the text names the
            file, the field and the value.
    """
    if name_or_path in profile_names():
        text = (_BUNDLED / f"{name_or_path}.json").read_text(encoding="utf-8")
        return parse_profile(text, where=f"profile {name_or_path}")
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        known = ", ".join(profile_names())
        raise ConfigError(f"no profile {name_or_path!r}; known: {known}, or a JSON file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read profile {path}: {error}") from None
    return parse_profile(text, where=f"profile {path}")


def parse_profile(text: str, *, where: str) -> GpuProfile:
    """Builds a profile from the text of its file.

    Args:
        text: JSON.
        where: What the text belongs to, for error messages.

    Raises:
        ConfigError: It is no JSON object, a key is unknown, missing or given twice, or a value
            does not fit.
    """
    values = parse_object(text, where=where)
    parts: dict[str, type[Parameters]] = {"step_time": StepTimeModel, "fit_error": FitError}
    for key, kind in parts.items():
        if key in values:
            values[key] = _build(kind, values[key], where=f"{where}: {key}")
    profile: GpuProfile = _build(GpuProfile, values, where=where)
    return profile


def profile_to_text(profile: GpuProfile) -> str:
    """The text of a profile's file; `parse_profile` reads it back."""
    values = asdict(profile)
    in_order = {key: values[key] for key in _KEYS}
    return json.dumps(in_order, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _build(kind: type[Parameters], values: Any, *, where: str) -> Any:
    """Builds one of the classes above from JSON, where a number is not a text."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}={values!r} is not a JSON object")
    _check_types(kind, values, where)
    return kind.from_mapping(values, where=where)


def _check_types(kind: type[Parameters], values: Mapping[str, Any], where: str) -> None:
    """Refuses what a command line may write but a file must not, such as "1" for 1."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        if item.name not in values or not item.metadata:
            continue
        allowed = get_args(hints[item.name]) or (hints[item.name],)
        value = values[item.name]
        if value is None and NoneType in allowed:
            continue
        wanted = (int, float) if float in allowed else tuple(allowed)
        if isinstance(value, bool) or not isinstance(value, wanted):
            names = " or ".join(_JSON_NAMES.get(option, "object") for option in allowed)
            raise ConfigError(f"{where}: {item.name}={value!r} is not a {names}")


_JSON_NAMES = {int: "whole number", float: "number", str: "text", NoneType: "null"}
