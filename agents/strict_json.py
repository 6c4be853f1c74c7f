"""JSON objects from files that may be damaged or hostile: read whole, checked, never guessed at."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from batchpilot.agents.parameters import ConfigError


def parse_object(text: str | bytes, *, where: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        text: UTF-8.
        where: What it belongs to, for error messages.

    Raises:
        ConfigError: It is no JSON object, gives a key twice, or holds NaN or infinity.
    """
    try:
        values = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON, or cut off: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: not a JSON object")
    return values


def check_keys(values: object, keys: tuple[str, ...], *, where: str) -> dict[str, Any]:
    """Makes sure that a value is an object with exactly these keys; returns it.

    Raises:
        ConfigError: It is not; the text names the first key that is unknown or missing.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {values!r} is not a JSON object")
    for key in values:
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(keys)}")
    for key in keys:
        if key not in values:
            raise ConfigError(f"{where}: {key} is missing")
    return values


def _refuse_constant(text: str) -> NoReturn:
    """JSON has no NaN and no infinity, though Python reads them."""
    raise ConfigError(f"{text} is not a number")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of two values."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"{key} is given twice")
        values[key] = value
    return values
