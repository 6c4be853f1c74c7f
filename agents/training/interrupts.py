"""Ctrl-C that saves: the first asks the training to stop at its next checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the training to stop."""

    def __init__(self) -> None:
        """Nobody has."""
        self.is_set = False


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask once; the second one interrupts at once."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if request.is_set:
            raise KeyboardInterrupt(f"signal {number}, again")
        request.is_set = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
