"""Reads the tuning service's experience log back, as arrays that training can use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchpilot.agents.experience import (
    COLUMNS,
    EXPERIENCE_SCHEMA,
    facts_of,
    targets_of,
    window_of,
)
from batchpilot.agents.features import FEATURE_NAMES, observation
from batchpilot.agents.parameters import ConfigError

Floats32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

#: Rows that are Python objects at a time: as such each takes several kilobytes.
_BATCH_ROWS = 4096
_READ = ["session", *(name for name, kind in COLUMNS.items() if kind in ("integer", "number"))]


@dataclass(frozen=True)
class Experience:
    """Transitions: what was seen, what was done, what came of it.

    All have one entry a transition; those of a session follow each other in time.

    Attributes:
        observations: Shape (n, 26): the window that was reported.
        next_observations: Shape (n, 26): the window after it, which the limits led to.
        limits: Shape (n, 2): what was answered, `max_num_seqs` and `max_num_batched_tokens`.
        base_limits: Shape (n, 2): what the engine's own policy would have applied; 0 where unknown.
        startup_limits: Shape (n, 2): what the engine was started with.
        seconds: Shape (n,): engine time of the window after.
        good_tokens_per_s: Shape (n,): output tokens a second of the window after, without those
            whose step was longer than the ITL target.
        recomputed_share: Shape (n,): of its computed tokens, those thrown away by preemptions.
        starts: Shape (n,): True where a session begins.
    """

    observations: Floats32
    next_observations: Floats32
    limits: Integers
    base_limits: Integers
    startup_limits: Integers
    seconds: Floats32
    good_tokens_per_s: Floats32
    recomputed_share: Floats32
    starts: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """Transitions."""
        return len(self.starts)


def read_experience(folder: Path) -> Experience:
    """Reads every transition of a log.

    A row whose next one is missing (dropped, or not yet written) has no outcome and is left out.

    Args:
        folder: Of the log.

    Raises:
        ConfigError: There is no log, or one that this batchpilot does not know.
    """
    rows = _read_rows(folder)
    order = np.lexsort((rows.sequences, rows.sessions))
    sessions, sequences = rows.sessions[order], rows.sequences[order]
    follows = (sessions[1:] == sessions[:-1]) & (sequences[1:] == sequences[:-1] + 1)
    at = np.flatnonzero(follows)
    before, after = order[at], order[at + 1]
    return Experience(
        observations=rows.observations[before],
        next_observations=rows.observations[after],
        limits=rows.limits[before],
        base_limits=rows.base_limits[before],
        startup_limits=rows.startup_limits[before],
        seconds=rows.seconds[after],
        good_tokens_per_s=rows.good_tokens_per_s[after],
        recomputed_share=rows.recomputed_share[after],
        starts=~np.isin(before, after),
    )


class _Rows(NamedTuple):
    """Rows of a log, one entry a row; its names are those of `Experience`, of each row itself.

    Sessions are numbered in the order of their names.
    """

    sessions: Integers
    sequences: Integers
    observations: Floats32
    limits: Integers
    base_limits: Integers
    startup_limits: Integers
    seconds: Floats32
    good_tokens_per_s: Floats32
    recomputed_share: Floats32


def _read_rows(folder: Path) -> _Rows:
    """Every row, in the order of the files."""
    import pyarrow as pa

    paths = sorted(folder.glob("experience-*.parquet"))
    if not paths:
        raise ConfigError(f"no experience log in {folder}: it has no experience-*.parquet")
    numbers: dict[str, int] = {}
    try:
        parts = [_rows(batch, numbers) for batch in _batches(paths)]
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read the experience log {folder}: {error}") from None
    rows = _Rows(*map(np.concatenate, zip(*parts, strict=True)))
    ranks = np.empty(len(numbers), dtype=np.int64)
    ranks[[numbers[name] for name in sorted(numbers)]] = np.arange(len(numbers))
    return rows._replace(sessions=ranks[rows.sessions])


def _batches(paths: list[Path]) -> Iterator[list[Mapping[str, Any]]]:
    """All files' rows, some at a time; first none."""
    import pyarrow.parquet as pq

    for path in paths:
        _check(pq.read_schema(path), path)
    yield []
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=_READ):
                yield batch.to_pylist()


def _check(schema: Any, path: Path) -> None:
    version = (schema.metadata or {}).get(b"batchpilot_experience_schema", b"none").decode()
    if version != str(EXPERIENCE_SCHEMA) or tuple(schema.names) != tuple(COLUMNS):
        raise ConfigError(
            f"{path} has schema {version}; this batchpilot reads {EXPERIENCE_SCHEMA} only"
        )


def _rows(rows: list[Mapping[str, Any]], numbers: dict[str, int]) -> _Rows:
    """Rows as arrays.

    Args:
        rows: As they were read.
        numbers: Those of the sessions; new ones are added.
    """
    windows = [window_of(row) for row in rows]
    seen = [
        observation(window, facts_of(row), targets_of(row))
        for window, row in zip(windows, rows, strict=True)
    ]
    return _Rows(
        sessions=_integers(numbers.setdefault(row["session"], len(numbers)) for row in rows),
        sequences=_integers(row["sequence"] for row in rows),
        observations=np.array(seen, dtype=np.float32).reshape(len(rows), len(FEATURE_NAMES)),
        limits=_pairs(rows, "limit"),
        base_limits=_pairs(rows, "local"),
        startup_limits=_pairs(rows, "startup"),
        seconds=_floats(window.seconds for window in windows),
        good_tokens_per_s=_floats(
            (w.decode_tokens - w.slow_decode_tokens) / max(w.seconds, 1e-9) for w in windows
        ),
        recomputed_share=_floats(window.recomputed_share for window in windows),
    )


def _pairs(rows: list[Mapping[str, Any]], prefix: str) -> Integers:
    names = (f"{prefix}_max_num_seqs", f"{prefix}_max_num_batched_tokens")
    return _integers(row[name] or 0 for row in rows for name in names).reshape(len(rows), 2)


def _integers(values: Iterable[int]) -> Integers:
    return np.fromiter(values, dtype=np.int64)


def _floats(values: Iterable[float]) -> Floats32:
    return np.fromiter(values, dtype=np.float32)
