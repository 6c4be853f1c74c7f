"""Workloads described in a YAML file: the same description as on a command line.

Phases may be written as a list; each is then a kind with its parameters, and from the second on
`at_s`, the second it begins at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from batchpilot.agents.parameters import ConfigError

AT = "at_s"
_PHASED = ("workload", "arrivals")
_OF_FILES = ("trace", "empirical")  # kinds whose `path` may be a file


def read_workload_file(path: Path) -> dict[str, Any]:
    """Reads the keys of `WorkloadSpec`, lists of phases turned into their text form.

    A CSV file named in it is looked for beside it, and then in the working directory.

    Raises:
        ConfigError: The file cannot be read, or is not such a description; names file and key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read workload file {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a list of `key: value` lines")
    values = {str(key): value for key, value in content.items()}
    for key in _PHASED:
        if values.get(key) is not None:
            values[key] = _text_form(values[key], where=f"{path}: {key}")
    if values.get("workload") is not None:
        values["workload"] = _beside(path.parent, values["workload"])
    return values


def _beside(folder: Path, workload: str) -> str:
    """The same with each file that lies in the folder named by where it lies."""
    if "," not in workload and (folder / workload).is_file():
        return str(folder / workload)
    return ",".join(_phase_beside(folder, phase) for phase in workload.split(","))


def _phase_beside(folder: Path, phase: str) -> str:
    kind, *parts = phase.split(":")
    if kind.strip() not in _OF_FILES:
        return phase
    return ":".join([kind, *(_value_beside(folder, part) for part in parts)])


def _value_beside(folder: Path, part: str) -> str:
    key, equals, value = part.rpartition("=")
    name, at, start = value.partition("@")
    if key not in ("", "path") or not (folder / name).is_file():
        return part
    return f"{key}{equals}{folder / name}{at}{start}"


def _text_form(value: Any, *, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}={value!r} is neither a text nor a list of phases")
    phases = [_phase(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if "@" in phases[0]:
        raise ConfigError(f"{where}[0]: the first phase begins at the start; leave {AT} out")
    return ",".join(phases)


def _phase(item: Any, where: str) -> str:
    """One phase as `kind:key=value@start`."""
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        raise ConfigError(f"{where}={item!r} is neither a text nor `kind: parameters`")
    kinds = [key for key in item if key != AT]
    if len(kinds) != 1:
        raise ConfigError(f"{where}={item!r} must name one kind, and may have {AT}")
    parameters = item[kinds[0]]
    start = f"@{_scalar(item[AT], f'{where}.{AT}')}" if AT in item else ""
    return ":".join([str(kinds[0]), *_pairs(parameters, f"{where}.{kinds[0]}")]) + start


def _pairs(parameters: Any, where: str) -> list[str]:
    if parameters is None:
        return []
    if isinstance(parameters, Mapping):
        given = {key: value for key, value in parameters.items() if value is not None}
        return [f"{key}={_scalar(value, f'{where}.{key}')}" for key, value in given.items()]
    if isinstance(parameters, int | float | str):
        return [str(parameters)]
    raise ConfigError(f"{where}={parameters!r} is not `key: value` pairs")


def _scalar(value: Any, where: str) -> int | float | str:
    if not isinstance(value, int | float | str):
        raise ConfigError(f"{where}={value!r} is neither a number nor a text")
    return value
