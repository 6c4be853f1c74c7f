"""Recorded traffic: a CSV file with one request a line."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from batchpilot.agents.parameters import ConfigError, Parameters, parameter


@dataclass(frozen=True)
class TraceRow(Parameters):
    """One request of a trace: the columns it must have."""

    arrival_s: float = parameter(minimum=0, help="seconds since the trace began")
    input_tokens: int = parameter(minimum=1, help="length of the prompt")
    output_tokens: int = parameter(minimum=1, help="length of the output")


class TraceLine(NamedTuple):
    """A request and the line of the file it stands on, counted from 1."""

    number: int
    row: TraceRow


def read_trace(path: Path, *, num_requests: int | None = None) -> list[TraceLine]:
    """Reads a CSV file with a header and the columns of `TraceRow`; others are ignored.

    Args:
        path: The file.
        num_requests: Only so many from the top are read; None reads all.

    Raises:
        ConfigError: The file cannot be read, is empty, lacks a column, or has a line that does not
            fit or arrives before the one above it. The text names file and line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(itertools.islice(_parse(file, path), num_requests))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read workload file {path}: {error}") from error
    if not lines:
        raise ConfigError(f"{path} has a header but no requests")
    return lines


def _parse(file: Iterable[str], path: Path) -> Iterator[TraceLine]:
    records = _records(file, path)
    _, header = next(records, (0, []))
    positions = _column_positions(header, path)
    previous = 0.0
    for number, record in records:
        where = f"{path} line {number}"
        values = {name: _cell(record, i, name, where) for name, i in positions.items()}
        row = TraceRow.from_mapping(values, where=where)
        if row.arrival_s < previous:
            raise ConfigError(
                f"{where}: arrival_s={row.arrival_s:g} is before the line above ({previous:g}); "
                "sort the file by arrival_s"
            )
        previous = row.arrival_s
        yield TraceLine(number, row)


def _records(file: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and stripped cells; blank lines are left out."""
    reader = csv.reader(file)
    try:
        for record in reader:
            cells = [cell.strip() for cell in record]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: {error}") from error


def _column_positions(header: list[str], path: Path) -> dict[str, int]:
    names = TraceRow.names()
    if not header:
        raise ConfigError(f"{path} is empty; its first line must be: {','.join(names)}")
    missing = [name for name in names if name not in header]
    if missing:
        raise ConfigError(
            f"{path} line 1: no column {missing[0]}; the header is {','.join(header)!r}, "
            f"needed are {','.join(names)}"
        )
    return {name: header.index(name) for name in names}


def _cell(record: list[str], position: int, name: str, where: str) -> str:
    value = record[position] if position < len(record) else ""
    if not value:
        raise ConfigError(f"{where}: {name} is missing")
    return value
