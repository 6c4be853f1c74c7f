"""Runs the search for capacity: every policy's at once, each rate's rounds at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from statistics import fmean

from batchpilot.env.bench.capacity import Capacity, Point, best_of, search
from batchpilot.env.bench.cells import Cell, Cells
from batchpilot.env.bench.measure import RunMeasurement
from batchpilot.env.bench.plan import BenchPlan
from batchpilot.env.bench.runner import BenchRun


def find_capacities(
    plan: BenchPlan, cells: Cells, tried: Callable[[str, Point], None]
) -> tuple[tuple[Capacity, ...], list[BenchRun]]:
    """Searches for every policy at once.

    Args:
        plan: The bench.
        cells: Runs its cells.
        tried: Hears of every rate that has been tried, in requests per second.

    Returns:
        The capacities in the policies' order, and every policy's runs at its own, by round.

    Raises:
        ConfigError: A cell cannot be run.
        EngineStalledError: An engine stopped making progress.
    """
    searches = [
        _Search(plan, Cell(plan.settings, contestant, 1), cells) for contestant in plan.contestants
    ]
    active = searches
    while active:
        running = [f for search in active for f in search.futures if not f.done()]
        if running:
            wait(running, return_when=FIRST_COMPLETED)
        for current in active:
            if all(future.done() for future in current.futures):
                tried(current.policy, current.advance())
        active = [current for current in active if current.capacity is None]
    runs = [current.best_runs for current in searches]
    found = tuple(c.capacity for c in searches if c.capacity is not None)
    return found, [run for group in zip(*runs, strict=True) for run in group]


class _Search:
    """One policy's search: a rate at a time, its rounds at once."""

    def __init__(self, plan: BenchPlan, cell: Cell, cells: Cells) -> None:
        """Starts the first rate."""
        self.policy = cell.contestant.label
        self.capacity: Capacity | None = None
        self.best_runs: list[BenchRun] = []
        self.futures: list[Future[RunMeasurement]] = []
        self._cell = cell
        self._cells = cells
        self._rounds = plan.settings.rounds
        self._target = plan.settings.attainment
        # Requests per second, and the time they take to come, at a rate scale of 1.
        scale = plan.settings.rate_scale
        lasts = [(len(w.requests), w.requests[-1].arrival_seconds) for w in plan.workloads]
        self._own_rate = fmean(count / seconds for count, seconds in lasts) / scale
        self._own_seconds = fmean(seconds for _, seconds in lasts) * scale
        self._runs: dict[float, list[BenchRun]] = {}
        self._steps = search(self._target, plan.settings.rate_scale)
        self._start(next(self._steps))

    def advance(self) -> Point:
        """Takes in the rate that has been tried, and starts the next or ends the search."""
        runs = [
            BenchRun(self.policy, index + 1, self._cell.settings.seed + index, future.result())
            for index, future in enumerate(self.futures)
        ]
        self._runs[self._scale] = runs
        inside = sum(run.measurement.requests_inside_slo for run in runs)
        attainment = inside / sum(run.measurement.submitted for run in runs)
        point = self._in_seconds(Point(self._scale, attainment))
        try:
            self._start(self._steps.send(attainment))
        except StopIteration as end:
            self._finish(end.value)
        return point

    def _start(self, rate_scale: float) -> None:
        self._scale = rate_scale
        scaled = self._cell.at_rate_scale(rate_scale)
        cells = [replace(scaled, round=index + 1) for index in range(self._rounds)]
        self.futures = [self._cells.start(cell) for cell in cells]

    def _finish(self, points: tuple[Point, ...]) -> None:
        best = best_of(points, self._target)
        chosen = best or min(points)
        self.best_runs = self._runs[chosen.rate]
        self.capacity = Capacity(
            policy=self.policy,
            rate_per_s=self._in_seconds(best).rate if best else 0.0,
            attainment=chosen.attainment,
            arrivals_s=self._own_seconds / chosen.rate,
            points=tuple(map(self._in_seconds, points)),
            is_bounded=any(point.attainment < self._target for point in points),
        )

    def _in_seconds(self, point: Point) -> Point:
        return Point(point.rate * self._own_rate, point.attainment)
