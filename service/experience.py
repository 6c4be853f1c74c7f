"""The experience log: every report and its answer, as Parquet files that any tool reads.

    FOLDER/experience-20260131T120000-4711-0001.parquet

`append` never waits: rows go into a bounded queue, and one thread writes them every
`flush_seconds`. A flush writes a whole file beside its place and moves it there, so that each file
is whole at every moment and a process that is killed loses what came since the last flush. The
newest file grows by being replaced with itself and the new rows, until it holds `segment_rows`;
then the next begins. Beyond `max_bytes` the oldest files go.

On a full disk rows are dropped and counted, which is logged once, and again when it is over.

`batchpilot.agents.experience` has the columns. To read them all:

    pandas.read_parquet(FOLDER)    polars.read_parquet(f"{FOLDER}/*.parquet")
    duckdb.sql(f"FROM '{FOLDER}/*.parquet'")
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchpilot.agents.experience import (
    COLUMNS,
    EXPERIENCE_SCHEMA,
    NULLABLE,
    ExperienceRow,
    to_columns,
)
from batchpilot.agents.parameters import Parameters, parameter

logger = logging.getLogger(__name__)

_TYPES = {
    "timestamp": pa.timestamp("us", tz="UTC"),
    "text": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
}
SCHEMA = pa.schema(
    [pa.field(name, _TYPES[kind], nullable=name in NULLABLE) for name, kind in COLUMNS.items()],
    metadata={"batchpilot_experience_schema": str(EXPERIENCE_SCHEMA)},
)
PREFIX = "experience-"
SUFFIX = ".parquet"
# The dot hides a file from pandas and polars, the ending from duckdb.
UNFINISHED, UNFINISHED_SUFFIX = ".unfinished-", ".tmp"


@dataclass(frozen=True)
class ExperienceSettings(Parameters):
    """How the log is kept."""

    folder: str = parameter(help="where the files go")
    flush_seconds: float = parameter(
        2.0, above=0, maximum=5, help="rows of so long are lost when the process is killed"
    )
    segment_rows: int = parameter(20_000, minimum=1, help="rows after which a file is full")
    queue_rows: int = parameter(50_000, minimum=1, help="rows that wait; further ones are dropped")
    max_bytes: int = parameter(
        2**30, minimum=2**16, help="size of all files after which the oldest go"
    )


class ExperienceLog:
    """Writes rows in the background.

    Args:
        settings: Where and how.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, settings: ExperienceSettings) -> None:
        """Makes the folder and starts the thread."""
        self.settings = settings
        self.written_rows = 0
        self.dropped_rows = 0
        self.failed_flushes = 0
        self._folder = Path(settings.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._queue: deque[ExperienceRow] = deque()
        self._names = itertools.count(1)
        self._segment: Path | None = None
        self._table: Any = None
        self._failing = False
        self._dropped_at_append = 0
        self._stop = threading.Event()
        self._remove_leftovers()
        self._thread = threading.Thread(target=self._run, name="batchpilot-experience", daemon=True)
        self._thread.start()

    @property
    def queued_rows(self) -> int:
        """Rows that wait for the next flush."""
        return len(self._queue)

    def append(self, row: ExperienceRow) -> bool:
        """Takes a row; never waits. To be called from one thread.

        Returns:
            False where the queue is full and the row was dropped.
        """
        if len(self._queue) >= self.settings.queue_rows or self._stop.is_set():
            self._dropped_at_append += 1
            return False
        self._queue.append(row)
        return True

    @property
    def dropped(self) -> int:
        """Rows that were lost: the queue or the disk was full."""
        return self.dropped_rows + self._dropped_at_append

    def close(self) -> None:
        """Writes what waits, and ends the thread; a second call does nothing."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.settings.flush_seconds):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        """Writes what waits; whatever goes wrong, the thread lives on."""
        rows = [self._queue.popleft() for _ in range(len(self._queue))]
        if not rows:
            return
        try:
            table = _to_table(rows)
            self._write(table)
        except Exception as error:
            self.dropped_rows += len(rows)
            self.failed_flushes += 1
            self._table = None  # the next flush begins a file of its own
            if not self._failing:
                logger.exception(
                    "the experience log cannot be written (%s): rows are dropped until it can",
                    error,
                )
            self._failing = True
            return
        self.written_rows += table.num_rows
        self.dropped_rows += len(rows) - table.num_rows
        if self._failing:
            logger.warning(
                "the experience log is written again; %d rows were dropped", self.dropped_rows
            )
            self._failing = False

    def _write(self, new: Any) -> None:
        """Replaces the newest file by itself and the new rows, or begins the next one."""
        if self._table is None or self._table.num_rows >= self.settings.segment_rows:
            self._segment, self._table = self._next_name(), SCHEMA.empty_table()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room()
        assert self._segment is not None
        grown = pa.concat_tables([self._table, new]).combine_chunks()
        unfinished = self._folder / f"{UNFINISHED}{self._segment.name}{UNFINISHED_SUFFIX}"
        try:
            pq.write_table(grown, unfinished, compression="zstd")
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self._segment)
        finally:
            unfinished.unlink(missing_ok=True)
        self._table = grown

    def _next_name(self) -> Path:
        started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        return self._folder / f"{PREFIX}{started}-{os.getpid()}-{next(self._names):04d}{SUFFIX}"

    def _make_room(self) -> None:
        """Removes the oldest files beyond the size allowed; other processes may do so too."""
        sizes = {path: _size(path) for path in sorted(self._folder.glob(f"{PREFIX}*{SUFFIX}"))}
        excess = sum(sizes.values()) - self.settings.max_bytes
        for path, size in sizes.items():
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _remove_leftovers(self) -> None:
        """Removes what a process that was killed left half written, if it is old enough."""
        for path in self._folder.glob(f"{UNFINISHED}*"):
            if time.time() - _modified(path) > 60:
                path.unlink(missing_ok=True)


def _to_table(rows: Sequence[ExperienceRow]) -> Any:
    """Rows as a table, without those that do not fit it, such as a count of more than 63 bits."""
    try:
        return pa.table(to_columns(rows), schema=SCHEMA)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.table(to_columns([row for row in rows if _fits(row)]), schema=SCHEMA)


def _fits(row: ExperienceRow) -> bool:
    try:
        pa.table(to_columns([row]), schema=SCHEMA)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return False
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
