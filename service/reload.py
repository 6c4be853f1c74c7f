"""Files that may change while the service runs: looked at now and then, and when told to.

A file that cannot be used is logged once, what was read before stays in force, and every look tries
it again: what was wrong may lie elsewhere, as in the rights of its folder.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from batchpilot.agents.parameters import ConfigError
from batchpilot.service.meters import Meters

logger = logging.getLogger("batchpilot.service")

LOOK_SECONDS = 1.0

FileState = tuple[int, int, int, int] | None


@dataclass
class WatchedFile:
    """A file, and what takes it up.

    Attributes:
        path: Where it is.
        load: Reads it and puts it in force; raises ConfigError and changes nothing otherwise.
        seen: What it was like when it was last read.
        problem: Why it could not be used then; empty where it could.
    """

    path: Path
    load: Callable[[], None]
    seen: FileState = field(default=None)
    problem: str = ""

    def __post_init__(self) -> None:
        """Takes the file as it is now for read."""
        self.seen = file_state(self.path)


class Reloader:
    """Takes up changed files.

    Args:
        files: Those watched; already read once.
        meters: Counts.
    """

    def __init__(self, files: list[WatchedFile], meters: Meters) -> None:
        """Watches nothing yet."""
        self._files = files
        self._meters = meters
        self._wake = asyncio.Event()
        self._forced = False

    def now(self) -> None:
        """Reads every file again at once, changed or not."""
        self._forced = True
        self._wake.set()

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)
            self._wake.clear()
            forced, self._forced = self._forced, False
            for file in self._files:
                self.look(file, forced=forced)

    def look(self, file: WatchedFile, *, forced: bool) -> None:
        """Reads a file again if it has changed or could not be used, or in any case."""
        state = file_state(file.path)
        unchanged = state == file.seen and not forced
        if unchanged and not file.problem:
            return
        file.seen = state
        file.problem = self._load(file, file.problem if unchanged else "")
        self._meters.reloads["failed" if file.problem else "ok"] += 1

    def _load(self, file: WatchedFile, logged: str) -> str:
        """Puts a file in force; returns why it cannot be used, which is not logged twice."""
        try:
            file.load()
        except ConfigError as error:
            problem = str(error)
            if problem != logged:
                logger.error("what was read before stays in force: %s", problem)
        except Exception as error:  # a fault of ours; the other files are read still
            problem = repr(error)
            if problem != logged:
                logger.exception("%s: what was read before stays in force", file.path)
        else:
            problem = ""
            logger.info("%s is in force", file.path)
        return problem


def file_state(path: Path) -> FileState:
    """What tells one content of a file, or its mode, from another; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
