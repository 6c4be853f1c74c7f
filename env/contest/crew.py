"""Processes that share the contest's work, and one line of progress now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console

from batchpilot.env.process import worker_pool

_PROGRESS_EVERY_SECONDS = 15.0
T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """Runs a function on many arguments, in order of their place, as processes come free."""

    submit: Callable[..., Future[Any]] | None
    console: Console

    def map(
        self, what: str, function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]
    ) -> list[T]:
        """What the function gives for each task, in the tasks' order.

        Args:
            what: Names the work in lines of progress.
            function: Of a module, so that another process can find it.
            tasks: Arguments of each call.
        """
        started = shown = time.monotonic()
        results: dict[int, T] = {}
        for place, result in self._finished(function, tasks):
            results[place] = result
            now = time.monotonic()
            if now - shown >= _PROGRESS_EVERY_SECONDS or len(results) == len(tasks):
                shown = now
                self._show(what, len(results), len(tasks), now - started)
        return [results[place] for place in range(len(tasks))]

    def _finished(
        self, function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, T]]:
        if self.submit is None:
            for place, task in enumerate(tasks):
                yield place, function(*task)
            return
        places = {self.submit(function, *task): place for place, task in enumerate(tasks)}
        waiting = set(places)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield places[future], future.result()

    def _show(self, what: str, done: int, total: int, seconds: float) -> None:
        left = seconds / done * (total - done)
        text = f"{what}: {done}/{total}, {seconds / 60:.1f} min, about {left / 60:.1f} min left"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def open_crew(workers: int, console: Console) -> Iterator[Crew]:
    """A crew of so many processes; one works in this process itself."""
    if workers == 1:
        yield Crew(None, console)
        return
    with worker_pool(workers) as pool:
        yield Crew(pool.submit, console)
