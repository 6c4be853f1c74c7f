"""Files that may change while the service runs: looked at now and then, and when told to.

A file that cannot be used is logged once and what was read before stays in force.
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

FileState = tuple[int, int, int] | None


@dataclass
class WatchedFile:
    """A file, and what takes it up.

    Attributes:
        path: Where it is.
        load: Reads it and puts it in force; raises ConfigError and changes nothing otherwise.
        seen: What it was like when it was last read.
    """

    path: Path
    load: Callable[[], None]
    seen: FileState = field(default=None)

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
        """Reads a file again if it has changed, or in any case."""
        state = file_state(file.path)
        if state == file.seen and not forced:
            return
        file.seen = state
        try:
            file.load()
        except ConfigError as error:
            self._meters.reloads["failed"] += 1
            logger.error("what was read before stays in force: %s", error)
        except Exception:  # a fault of ours; the other files, and the next change, are read still
            self._meters.reloads["failed"] += 1
            logger.exception("%s: what was read before stays in force", file.path)
        else:
            self._meters.reloads["ok"] += 1
            logger.info("%s is in force", file.path)


def file_state(path: Path) -> FileState:
    """What tells one content of a file from another; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
