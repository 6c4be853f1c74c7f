"""Typed, validated parameters: one mechanism for policies and for the hook's settings.

A set of parameters is a frozen dataclass that inherits from `Parameters` and declares each field
with `parameter(...)`. Values are checked when it is built, whether from Python, from JSON or from
the text of a command line, and every error names the key, the value and what is allowed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, Self, get_args, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot be used; the text says which, what it was and what is allowed."""


def parameter(
    default: Any = MISSING,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declares a field of a `Parameters` class.

    Args:
        default: Value when none is given; leave out to require one.
        help: One line for `--help` and tables.
        minimum: Least value allowed.
        maximum: Greatest value allowed.
        above: The value must be greater than this.
        below: The value must be less than this.
        choices: The texts allowed.
    """
    rules = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "choices": choices,
    }
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Parameters:
    """Base of every set of parameters; checks each field's type and range when built.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        """Checks every field that `parameter` declared."""
        hints = _type_hints(type(self))
        for item in fields(self):
            if item.metadata:
                value = _coerce(item.name, getattr(self, item.name), hints[item.name])
                _check_range(item.name, value, item.metadata)
                object.__setattr__(self, item.name, value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The keys this set accepts."""
        return tuple(item.name for item in fields(cls))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Builds the set from text or JSON values.

        Args:
            values: Keys and values, as read from JSON, the environment or a command line.
            where: What the values belong to, for error messages.

        Raises:
            ConfigError: An unknown key, a missing one, or a value that does not fit.
        """
        unknown = sorted(set(values) - set(cls.names()), key=str)
        if unknown:
            allowed = ", ".join(cls.names()) or "none"
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; allowed: {allowed}")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ConfigError(f"{where}: {missing[0]} is required")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


# Reading the hints takes longer than all the checks, and a trace builds a set for each line.
_HINTS: dict[type, dict[str, Any]] = {}


def _type_hints(kind: type) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Turns JSON or text into the declared type, refusing what would lose meaning."""
    options = get_args(hint) or (hint,)
    if value is None and NoneType in options:
        return None
    kind = next(option for option in options if option is not NoneType)
    expected = f"{name}={value!r} is not {_KIND_NAMES.get(kind, kind.__name__)}"
    if kind is bool:
        if isinstance(value, str) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        if isinstance(value, bool):
            return value
        raise ConfigError(expected)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(expected)
    if kind is str:
        return str(value)
    try:
        number = float(value)
    except (OverflowError, ValueError):
        raise ConfigError(expected) from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ConfigError(expected)
    return int(number) if kind is int else number


_KIND_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false"}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def range_text(rules: Mapping[str, Any]) -> str:
    """What a field that `parameter` declared allows, in words; empty where all values fit.

    Args:
        rules: The field's metadata.
    """
    if rules["choices"]:
        return ", ".join(rules["choices"])
    bounds = {
        "at least": rules["minimum"],
        "above": rules["above"],
        "at most": rules["maximum"],
        "below": rules["below"],
    }
    return ", ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)


def _check_range(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    """Raises where a value is outside what its field declares."""
    if value is None:
        return
    if rules["choices"]:
        if value not in rules["choices"]:
            raise ConfigError(f"{name}={value!r} is not one of: {', '.join(rules['choices'])}")
        return
    broken = {
        "at least": (rules["minimum"], operator.lt),
        "at most": (rules["maximum"], operator.gt),
        "greater than": (rules["above"], operator.le),
        "less than": (rules["below"], operator.ge),
    }
    for words, (bound, is_broken) in broken.items():
        if bound is not None and is_broken(value, bound):
            raise ConfigError(f"{name}={value!r} must be {words} {bound:g}")
