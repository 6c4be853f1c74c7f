"""Ctrl-C that saves: the first asks the training to stop at its next checkpoint.

What ends a group of processes may send the same signal twice, to the process and to its group, so
that only one that comes a moment later counts as the second.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds within which signals are one.
ONE_SIGNAL_SECONDS = 1.0
_SAVES_FIRST = b"\nsaves and stops at the end of this rollout; once more stops at once\n"


class StopRequest:
    """Whether somebody asked the training to stop."""

    def __init__(self) -> None:
        """Nobody has."""
        self.asked_at: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether somebody has."""
        return self.asked_at is not None


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask once; the second one interrupts at once."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if request.asked_at is not None and now - request.asked_at > ONE_SIGNAL_SECONDS:
            raise KeyboardInterrupt(f"signal {number}, again")
        if request.asked_at is None:
            request.asked_at = now
            os.write(2, _SAVES_FIRST)  # no lock is taken: this may interrupt whoever has it

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
