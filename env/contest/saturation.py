"""Throughput where memory binds: every request there at once, and no target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchpilot.env.contest.crew import Crew
from batchpilot.env.contest.lineup import contestant, is_hand_tuned, saturated_lineup
from batchpilot.env.contest.results import Result, Row, run_all
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.summary import Spread, spread
from batchpilot.env.contest.trial import Trial

#: Policies that cannot do without a target.
_NEED_A_TARGET = ("sla", "sla-guarded", "memory+sla")


@dataclass(frozen=True)
class SaturationRow(Row):
    """A contestant in a scenario without targets."""

    @property
    def tokens_per_s(self) -> Spread:
        """Output tokens per second over the seeds."""
        return spread([outcome.tokens_per_s for outcome in self.outcomes])

    @property
    def preemptions(self) -> Spread:
        """Preemptions over the seeds."""
        return spread([float(outcome.preemptions) for outcome in self.outcomes])


@dataclass(frozen=True)
class SaturationResult(Result[SaturationRow]):
    """A scenario's contestants where memory binds."""

    @property
    def best_by_hand(self) -> SaturationRow:
        """The static pair or watermark with the highest median throughput."""
        candidates = (row for row in self.rows if is_hand_tuned(row.policy))
        return max(candidates, key=lambda row: row.tokens_per_s.median)


def compare_saturated(
    settings: ContestSettings, crew: Crew, folder: Path
) -> list[SaturationResult]:
    """Runs everybody who needs no target, in every scenario, on every seed."""
    results = []
    for scenario in settings.saturated_scenarios():
        trials = {
            label: [Trial(scenario, contestant(label), seed=seed) for seed in settings.all_seeds]
            for label in settings.lineup(scenario, saturated_lineup(scenario))
            if label.partition(":")[0] not in _NEED_A_TARGET
        }
        outcomes = run_all(f"saturation, {scenario.label}", trials, crew, folder)
        rows = tuple(SaturationRow(label, found) for label, found in outcomes.items())
        results.append(SaturationResult(scenario, rows))
    return results
