"""The text form `name:key=value` in which workloads and arrivals are asked for.

What changes as time goes by is written as phases, the first from the start and each other from the
second behind its `@`: `poisson:4,poisson:16@60`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

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


class Phase(NamedTuple):
    """One part of a text in phases: from when it holds, and what."""

    start_s: float
    text: str


def split_phases(text: str, *, what: str) -> list[Phase]:
    """Reads `A,B@60,C@120`: A from the start, B from second 60, C from second 120.

    Args:
        text: One phase or more.
        what: What it is, for error messages.

    Raises:
        ConfigError: A start that is missing, no number, or not after the one before it.
    """
    first, *others = text.split(",")
    phases = [Phase(0.0, first)]
    for part in others:
        body, at, start = part.rpartition("@")
        start_s = _finite(start) if at else None
        if start_s is None or start_s <= phases[-1].start_s:
            raise ConfigError(
                f"{what} {text!r}: {part!r} must end in @SECONDS, more than "
                f"{phases[-1].start_s:g}, where this phase begins"
            )
        phases.append(Phase(start_s, body))
    return phases


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


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
