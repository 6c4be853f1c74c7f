"""The text form `name:key=value` in which workloads and arrivals are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from batchpilot.agents.parameters import ConfigError, Parameters

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How a thing is built from text: its parameters, and what takes them."""

    parameters: type[Parameters]
    build: Callable[[Any], T]


def build_from_text(text: str, kinds: Mapping[str, Kind[T]], *, what: str, besides: str = "") -> T:
    """Builds what a text such as `poisson:8` or `fixed:prompt_tokens=128:output_tokens=64` names.

    Values without a key take the parameters in their order, as in a call in Python.

    Args:
        text: The text.
        kinds: What can be named.
        what: What it is, for error messages.
        besides: What the caller takes that is not among the kinds, for error messages.

    Raises:
        ConfigError: An unknown name or key, or a value that does not fit.
    """
    name, *parts = text.strip().split(":")
    if name not in kinds:
        known = ", ".join([*kinds, besides] if besides else kinds)
        raise ConfigError(f"unknown {what} {name!r}; known: {known}")
    kind = kinds[name]
    values = _read_values(parts, kind.parameters.names(), where=f"{what} {text!r}")
    return kind.build(kind.parameters.from_mapping(values, where=f"{what} {text!r}"))


def _read_values(parts: list[str], names: tuple[str, ...], *, where: str) -> dict[str, str]:
    values: dict[str, str] = {}
    positions = iter(names)
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            key, value = next(positions, ""), part
            if not key:
                raise ConfigError(f"{where}: {part!r} is one value too many, or lacks its key=")
        else:
            positions = iter(())  # Python's rule: after a named value, position says nothing
        if not (key and value):
            raise ConfigError(f"{where}: {part!r} is not key=value")
        if key in values:
            raise ConfigError(f"{where}: {key} is given twice")
        values[key] = value
    return values
