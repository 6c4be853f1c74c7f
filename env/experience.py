"""Reads the tuning service's experience log back, as arrays that training can use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    seen = [observation(window_of(row), facts_of(row), targets_of(row)) for row in rows]
    pairs = [
        (at, at + 1)
        for at in range(len(rows) - 1)
        if rows[at]["session"] == rows[at + 1]["session"]
        and rows[at]["sequence"] + 1 == rows[at + 1]["sequence"]
    ]
    before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    continued = set(after)
    windows = [window_of(rows[at]) for at in after]
    stacked = np.array(seen, dtype=np.float32).reshape(len(rows), len(FEATURE_NAMES))
    return Experience(
        observations=stacked[before],
        next_observations=stacked[after],
        limits=_pairs(rows, before, "limit"),
        base_limits=_pairs(rows, before, "local"),
        startup_limits=_pairs(rows, before, "startup"),
        seconds=_floats([window.seconds for window in windows]),
        good_tokens_per_s=_floats(
            [(w.decode_tokens - w.slow_decode_tokens) / max(w.seconds, 1e-9) for w in windows]
        ),
        recomputed_share=_floats([window.recomputed_share for window in windows]),
        starts=np.array([at not in continued for at in before], dtype=np.bool_),
    )


def _read_rows(folder: Path) -> list[Mapping[str, Any]]:
    """Every row, session by session in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("experience-*.parquet"))
    if not paths:
        raise ConfigError(f"no experience log in {folder}: it has no experience-*.parquet")
    try:
        tables = [_checked(pq.read_table(path), path) for path in paths]
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read the experience log {folder}: {error}") from None
    order = [("session", "ascending"), ("sequence", "ascending")]
    rows: list[Mapping[str, Any]] = pa.concat_tables(tables).sort_by(order).to_pylist()
    return rows


def _checked(table: Any, path: Path) -> Any:
    version = (table.schema.metadata or {}).get(b"batchpilot_experience_schema", b"none").decode()
    if version != str(EXPERIENCE_SCHEMA) or tuple(table.column_names) != tuple(COLUMNS):
        raise ConfigError(
            f"{path} has schema {version}; this batchpilot reads {EXPERIENCE_SCHEMA} only"
        )
    return table


def _pairs(rows: list[Mapping[str, Any]], at: list[int], prefix: str) -> Integers:
    names = (f"{prefix}_max_num_seqs", f"{prefix}_max_num_batched_tokens")
    values = [[rows[index][name] or 0 for name in names] for index in at]
    return np.array(values, dtype=np.int64).reshape(len(at), 2)


def _floats(values: list[float]) -> Floats32:
    return np.array(values, dtype=np.float32)
