"""Throughput where memory binds: every request there at once, and no target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchpilot.env.contest.capacity import run_one
from batchpilot.env.contest.crew import Crew
from batchpilot.env.contest.lineup import contestant, is_hand_tuned, saturated_lineup
from batchpilot.env.contest.scenario import Scenario
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.summary import Spread, spread
from batchpilot.env.contest.trial import Outcome, Trial


@dataclass(frozen=True)
class SaturationRow:
    """A contestant in a scenario: its outcome on each seed."""

    policy: str
    outcomes: tuple[Outcome, ...]

    @property
    def tokens_per_s(self) -> Spread:
        """Output tokens per second over the seeds."""
        return spread([outcome.tokens_per_s for outcome in self.outcomes])

    @property
    def preemptions(self) -> Spread:
        """Preemptions over the seeds."""
        return spread([float(outcome.preemptions) for outcome in self.outcomes])


@dataclass(frozen=True)
class SaturationResult:
    """A scenario's contestants, in the order of the line-up."""

    scenario: Scenario
    rows: tuple[SaturationRow, ...]

    def row(self, policy: str) -> SaturationRow | None:
        """A contestant's row, None where it took no part."""
        return next((row for row in self.rows if row.policy == policy), None)

    @property
    def best_by_hand(self) -> SaturationRow:
        """The static pair or watermark with the highest median throughput."""
        candidates = (row for row in self.rows if is_hand_tuned(row.policy))
        return max(candidates, key=lambda row: row.tokens_per_s.median)


#: Policies that cannot do without a target.
_NEED_A_TARGET = ("sla", "sla-guarded", "memory+sla")


def compare_saturated(
    settings: ContestSettings, crew: Crew, folder: Path
) -> list[SaturationResult]:
    """Runs everybody who needs no target, in every scenario, on every seed."""
    results = []
    for scenario in settings.saturated_scenarios():
        lineup = tuple(
            label
            for label in settings.lineup(scenario, saturated_lineup(scenario))
            if label.partition(":")[0] not in _NEED_A_TARGET
        )
        tasks = [
            (Trial(scenario, contestant(label), seed=seed), folder)
            for label in lineup
            for seed in settings.all_seeds
        ]
        outcomes = crew.map(f"saturation, {scenario.label}", run_one, tasks)
        count = len(settings.all_seeds)
        rows = tuple(
            SaturationRow(label, tuple(outcomes[place * count : (place + 1) * count]))
            for place, label in enumerate(lineup)
        )
        results.append(SaturationResult(scenario, rows))
    return results
