"""Shows a bench going on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from batchpilot.env.bench import runner
from batchpilot.env.bench.measure import Sample
from batchpilot.env.bench.runner import BenchRun

PLAIN_EVERY_SECONDS = 15.0


@contextmanager
def show_progress(console: Console, runs: int | None, rounds: int) -> Iterator[runner.Progress]:
    """The right display for a console, for as long as the bench runs."""
    if not console.is_terminal:
        yield PlainProgress(console, runs, rounds)
        return
    # Two refreshes a second: the display shares the interpreter with the engine it watches.
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        refresh_per_second=2,
    ) as bars:
        yield BarProgress(bars, runs, rounds)


class BarProgress:
    """A bar for the whole bench and one for the run."""

    def __init__(self, bars: Progress, runs: int | None, rounds: int) -> None:
        """Sets both bars up."""
        self._bars = bars
        self._rounds = rounds
        self._all: TaskID = bars.add_task("runs", total=runs, status="")
        self._run: TaskID = bars.add_task("", total=None, status="", visible=False)

    def run_started(self, policy: str, round_index: int, requests: int) -> None:
        """Starts the lower bar again."""
        name = _run_name(policy, round_index, self._rounds)
        self._bars.reset(self._run, total=requests, description=name, status="", visible=True)

    def advanced(self, ended: int, tokens_per_s: float, sample: Sample) -> None:
        """Moves the lower bar."""
        status = _status(tokens_per_s, sample)
        self._bars.update(self._run, completed=ended, status=status)

    def run_finished(self, run: BenchRun) -> None:
        """Moves the upper bar, and leaves one line about the run."""
        self._bars.console.print(_summary(run, self._rounds), highlight=False, markup=False)
        self._bars.advance(self._all)


class PlainProgress:
    """Lines for logs: the end of every run, and a sign of life in long ones."""

    def __init__(self, console: Console, runs: int | None, rounds: int) -> None:
        """Counts runs."""
        self._console = console
        self._runs = runs
        self._rounds = rounds
        self._finished = 0
        self._name = ""
        self._requests = 0
        self._next_line_seconds = PLAIN_EVERY_SECONDS

    def run_started(self, policy: str, round_index: int, requests: int) -> None:
        """Remembers the run."""
        self._name = _run_name(policy, round_index, self._rounds)
        self._requests = requests
        self._next_line_seconds = PLAIN_EVERY_SECONDS
        if round_index == 0:
            self._line(self._name)

    def advanced(self, ended: int, tokens_per_s: float, sample: Sample) -> None:
        """A line every now and then."""
        if sample.seconds >= self._next_line_seconds:
            self._next_line_seconds = sample.seconds + PLAIN_EVERY_SECONDS
            status = _status(tokens_per_s, sample)
            self._line(f"{self._name}: {ended}/{self._requests} requests, {status}")

    def run_finished(self, run: BenchRun) -> None:
        """One line about the run."""
        self._finished += 1
        total = "?" if self._runs is None else self._runs
        self._line(f"[{self._finished}/{total}] {_summary(run, self._rounds)}")

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _run_name(policy: str, round_index: int, rounds: int) -> str:
    return policy if round_index == 0 else f"round {round_index}/{rounds} {policy}"


def _status(tokens_per_s: float, sample: Sample) -> str:
    return (
        f"{tokens_per_s:,.0f} tok/s, {sample.running} running, {sample.waiting} waiting, "
        f"limit {sample.limits.max_num_seqs}"
    )


def _summary(run: BenchRun, rounds: int) -> str:
    measured = run.measurement
    return (
        f"{_run_name(run.policy, run.round, rounds)}: {measured.completed}/{measured.submitted} "
        f"requests, {measured.output_tokens_per_s:,.0f} tok/s, {measured.preemptions} preemptions, "
        f"{measured.duration_s:.1f} s"
    )
