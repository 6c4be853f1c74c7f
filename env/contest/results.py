"""What all sections have in common: a contestant's outcomes, a scenario's rows, and the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from batchpilot.env.contest.crew import Crew
from batchpilot.env.contest.lineup import is_static
from batchpilot.env.contest.scenario import Scenario
from batchpilot.env.contest.summary import Spread, median_of, spread
from batchpilot.env.contest.trial import Outcome, OutcomeStore, Trial, run_stored


@dataclass(frozen=True)
class Row:
    """A contestant in a scenario.

    Attributes:
        policy: Its label.
        outcomes: One for each seed.
    """

    policy: str
    outcomes: tuple[Outcome, ...]

    @property
    def inside(self) -> int:
        """Requests inside the targets, of all seeds."""
        return sum(outcome.inside for outcome in self.outcomes)

    @property
    def attainment(self) -> Spread:
        """Share of the requests inside the targets, over the seeds."""
        return spread([outcome.attainment for outcome in self.outcomes])

    @property
    def pooled_attainment(self) -> float:
        """Share inside the targets of the requests of all seeds."""
        return self.inside / sum(outcome.submitted for outcome in self.outcomes)

    @property
    def itl_p99_ms(self) -> float | None:
        """The median over seeds."""
        return median_of([outcome.itl_p99_ms for outcome in self.outcomes])

    @property
    def ttft_p99_ms(self) -> float | None:
        """The median over seeds."""
        return median_of([outcome.ttft_p99_ms for outcome in self.outcomes])


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Result(Generic[RowT]):
    """A scenario's contestants.

    Attributes:
        scenario: Where.
        rows: In the order of the line-up.
    """

    scenario: Scenario
    rows: tuple[RowT, ...]

    def row(self, policy: str) -> RowT | None:
        """A contestant's row, None where it took no part."""
        return next((row for row in self.rows if row.policy == policy), None)

    @property
    def static_rows(self) -> tuple[RowT, ...]:
        """Those of the fixed pairs, vLLM's default among them."""
        return tuple(row for row in self.rows if is_static(row.policy))


def run_all(
    what: str, trials: Mapping[str, Sequence[Trial]], crew: Crew, folder: Path
) -> dict[str, tuple[Outcome, ...]]:
    """Every contestant's trials, each to its end.

    Args:
        what: Names the work in lines of progress.
        trials: By contestant.
        crew: Does the work.
        folder: Of the outcomes.
    """
    tasks = [(trial, folder) for several in trials.values() for trial in several]
    outcomes = iter(crew.map(what, _run_one, tasks))
    return {label: tuple(next(outcomes) for _ in several) for label, several in trials.items()}


def _run_one(trial: Trial, folder: Path) -> Outcome:
    """Runs in a process of the crew."""
    return run_stored(trial, OutcomeStore(folder))
