"""Beyond capacity: everybody at the rate that smooth traffic would just allow, in bursts.

At that rate queues come and hardly go: what counts is how many requests are inside the targets all
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchpilot.env.contest.crew import Crew
from batchpilot.env.contest.lineup import contestant, slo_lineup
from batchpilot.env.contest.results import Result, Row, run_all
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.trial import Trial


@dataclass(frozen=True)
class OverloadResult(Result[Row]):
    """A scenario's contestants under overload."""

    @property
    def best_static(self) -> Row:
        """The static pair with most requests inside the targets."""
        return max(self.static_rows, key=lambda row: row.inside)


def compare_overloaded(settings: ContestSettings, crew: Crew, folder: Path) -> list[OverloadResult]:
    """Runs everybody in every scenario, on every seed."""
    results = []
    for scenario in settings.overloaded_scenarios():
        trials = {
            label: [Trial(scenario, contestant(label), seed=seed) for seed in settings.all_seeds]
            for label in settings.lineup(scenario, slo_lineup(scenario))
        }
        outcomes = run_all(f"overload, {scenario.label}", trials, crew, folder)
        rows = tuple(Row(label, found) for label, found in outcomes.items())
        results.append(OverloadResult(scenario, rows))
    return results
