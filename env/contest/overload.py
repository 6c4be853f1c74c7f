"""Beyond capacity: everybody at the rate that smooth traffic would just allow, in bursts.

At that rate queues come and hardly go: what counts is how many requests are inside the targets all
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchpilot.env.contest.capacity import run_one
from batchpilot.env.contest.crew import Crew
from batchpilot.env.contest.lineup import contestant, is_static, slo_lineup
from batchpilot.env.contest.scenario import Scenario
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.summary import Spread, median_of, spread
from batchpilot.env.contest.trial import Outcome, Trial


@dataclass(frozen=True)
class OverloadRow:
    """A contestant in a scenario: its outcome on each seed."""

    policy: str
    outcomes: tuple[Outcome, ...]

    @property
    def attainment(self) -> Spread:
        """Share of the requests inside the targets, over the seeds."""
        return spread([outcome.attainment for outcome in self.outcomes])

    @property
    def inside(self) -> int:
        """Requests inside the targets, of all seeds."""
        return sum(outcome.inside for outcome in self.outcomes)

    @property
    def itl_p99_ms(self) -> float | None:
        """The median over seeds."""
        return median_of([outcome.itl_p99_ms for outcome in self.outcomes])

    @property
    def ttft_p99_ms(self) -> float | None:
        """The median over seeds."""
        return median_of([outcome.ttft_p99_ms for outcome in self.outcomes])


@dataclass(frozen=True)
class OverloadResult:
    """A scenario's contestants, in the order of the line-up."""

    scenario: Scenario
    rows: tuple[OverloadRow, ...]

    def row(self, policy: str) -> OverloadRow | None:
        """A contestant's row, None where it took no part."""
        return next((row for row in self.rows if row.policy == policy), None)

    @property
    def best_static(self) -> OverloadRow:
        """The static pair with most requests inside the targets."""
        static = (row for row in self.rows if is_static(row.policy))
        return max(static, key=lambda row: row.inside)


def compare_overloaded(settings: ContestSettings, crew: Crew, folder: Path) -> list[OverloadResult]:
    """Runs everybody in every scenario, on every seed."""
    results = []
    for scenario in settings.overloaded_scenarios():
        lineup = settings.lineup(scenario, slo_lineup(scenario))
        tasks = [
            (Trial(scenario, contestant(label), seed=seed), folder)
            for label in lineup
            for seed in settings.all_seeds
        ]
        outcomes = crew.map(f"overload, {scenario.label}", run_one, tasks)
        count = len(settings.all_seeds)
        rows = tuple(
            OverloadRow(label, tuple(outcomes[place * count : (place + 1) * count]))
            for place, label in enumerate(lineup)
        )
        results.append(OverloadResult(scenario, rows))
    return results
