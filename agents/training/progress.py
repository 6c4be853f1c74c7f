"""What a training says while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_SECONDS_BETWEEN_LINES = 15.0


class Progress(Protocol):
    """Hears how far a training is."""

    def __call__(self, step: int, text: str = "") -> None:
        """So many steps are done; the text, where there is one, is what happened."""


@contextmanager
def show_progress(console: Console, total: int) -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere.

    Args:
        console: Where to.
        total: Steps of the whole training.
    """
    if not console.is_terminal:
        yield _Lines(console, total)
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(
        *columns, TextColumn("{task.description}"), console=console, refresh_per_second=2
    ) as bars:
        task = bars.add_task("training", total=total)

        def show(step: int, text: str = "") -> None:
            bars.update(task, completed=step)
            if text:
                bars.update(task, description=text)

        yield show


class _Lines:
    """A line for each text, and one every few seconds."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._last = time.monotonic()

    def __call__(self, step: int, text: str = "") -> None:
        now = time.monotonic()
        if not text and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        self._console.print(
            f"[{step}/{self._total}] {text or 'training'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
