"""Recorded traffic: CSV files with one request a line, ours and the user's, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import IO, Generic, NamedTuple, TypeVar

from batchpilot.agents.parameters import ConfigError, Parameters, parameter

Row = TypeVar("Row", bound=Parameters)


@dataclass(frozen=True)
class LengthRow(Parameters):
    """One request's lengths: the columns that a file of lengths must have."""

    input_tokens: int = parameter(minimum=1, help="length of the prompt")
    output_tokens: int = parameter(minimum=1, help="length of the output")


@dataclass(frozen=True)
class TraceRow(Parameters):
    """One request of a trace: the columns it must have, and those it may have.

    Attributes:
        arrival_s: Seconds since the trace began.
        input_tokens: Length of the prompt.
        output_tokens: Length of the output.
        shared_prefix_tokens: How much of the prompt, from its start, an earlier request had too:
            what a prefix cache without limits would save. The column may be left out.
    """

    arrival_s: float = parameter(minimum=0, help="seconds since the trace began")
    input_tokens: int = parameter(minimum=1, help="length of the prompt")
    output_tokens: int = parameter(minimum=1, help="length of the output")
    shared_prefix_tokens: int = parameter(
        0, minimum=0, help="tokens of the prompt's start that an earlier request had too"
    )

    def __post_init__(self) -> None:
        """Checks each value, then what must hold between them."""
        super().__post_init__()
        if self.shared_prefix_tokens > self.input_tokens:
            raise ConfigError(
                f"shared_prefix_tokens={self.shared_prefix_tokens} is more than "
                f"input_tokens={self.input_tokens}"
            )


class TraceLine(NamedTuple, Generic[Row]):
    """A request and the line of the file it stands on, counted from 1."""

    number: int
    row: Row


@dataclass(frozen=True, slots=True)
class BundledTrace:
    """A trace that comes with batchpilot, and whose it is.

    Attributes:
        file: Its name in the package's data folder.
        summary: What it holds.
        source: Where it was published.
        licence: Under which licence.
        credit: Whom its licence asks to name.
        changes: What was done to the published file.
        jitter_s: How coarse its clock is; replay spreads arrivals over so many seconds.
        has_arrivals: False where it holds lengths only.
    """

    file: str
    summary: str
    source: str
    licence: str
    credit: str
    changes: str
    jitter_s: float
    has_arrivals: bool

    @property
    def path(self) -> Path:
        """Where it lies."""
        return _data_folder() / self.file


@lru_cache(maxsize=1)
def bundled_traces() -> Mapping[str, BundledTrace]:
    """Every trace that comes with batchpilot, by name."""
    sources = json.loads((_data_folder() / "sources.json").read_text(encoding="utf-8"))
    return {name: BundledTrace(**values) for name, values in sources.items()}


def _data_folder() -> Path:
    return Path(str(resources.files("batchpilot.env") / "data"))


def read_trace(path: Path, *, num_requests: int | None = None) -> list[TraceLine[TraceRow]]:
    """Reads a CSV file with a header and the columns of `TraceRow`; others are ignored.

    Args:
        path: The file; gzipped where its name ends in `.gz`.
        num_requests: Only so many from the top are read; None reads all.

    Raises:
        ConfigError: The file cannot be read, is empty, lacks a column, or has a line that does not
            fit or arrives before the one above it. The text names file and line.
    """
    return _read(path, TraceRow, num_requests)


def read_lengths(path: Path) -> list[TraceLine[LengthRow]]:
    """Reads a CSV file with a header and the columns of `LengthRow`; others are ignored.

    Raises:
        ConfigError: The file cannot be read, is empty, lacks a column, or has a line that does not
            fit. The text names file and line.
    """
    return _read(path, LengthRow, None)


def _read(path: Path, row_type: type[Row], num_requests: int | None) -> list[TraceLine[Row]]:
    try:
        with _open(path) as file:
            lines = list(itertools.islice(_parse(file, path, row_type), num_requests))
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read workload file {path}: {error}") from error
    if not lines:
        raise ConfigError(f"{path} has a header but no requests")
    return lines


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8-sig")
    return path.open(newline="", encoding="utf-8-sig")


def _parse(file: Iterable[str], path: Path, row_type: type[Row]) -> Iterator[TraceLine[Row]]:
    records = _records(file, path)
    _, header = next(records, (0, []))
    positions = _column_positions(header, path, row_type)
    optional = _optional_columns(row_type)
    previous = 0.0
    for number, record in records:
        where = f"{path} line {number}"
        values = _values(record, positions, optional, where)
        row = row_type.from_mapping(values, where=where)
        if isinstance(row, TraceRow):
            _check_order(row.arrival_s, previous, where)
            previous = row.arrival_s
        yield TraceLine(number, row)


def _check_order(arrival_s: float, previous: float, where: str) -> None:
    if arrival_s < previous:
        raise ConfigError(
            f"{where}: arrival_s={arrival_s:g} is before the line above ({previous:g}); "
            "sort the file by arrival_s"
        )


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


def _optional_columns(row_type: type[Parameters]) -> frozenset[str]:
    return frozenset(item.name for item in fields(row_type) if item.default is not MISSING)


def _column_positions(header: list[str], path: Path, row_type: type[Parameters]) -> dict[str, int]:
    optional = _optional_columns(row_type)
    needed = [name for name in row_type.names() if name not in optional]
    if not header:
        raise ConfigError(f"{path} is empty; its first line must be: {','.join(needed)}")
    missing = [name for name in needed if name not in header]
    if missing:
        raise ConfigError(
            f"{path} line 1: no column {missing[0]}; the header is {','.join(header)!r}, "
            f"needed are {','.join(needed)}"
        )
    return {name: header.index(name) for name in row_type.names() if name in header}


def _values(
    record: list[str], positions: Mapping[str, int], optional: frozenset[str], where: str
) -> dict[str, str]:
    values = {}
    for name, position in positions.items():
        value = record[position] if position < len(record) else ""
        if value:
            values[name] = value
        elif name not in optional:
            raise ConfigError(f"{where}: {name} is missing")
    return values
