"""Regret where traffic or the GPU changes half-way.

The oracle of a phase is the static pair whose runs had the most requests of that phase inside the
targets, over all seeds; another pair may be it in the other phase. Regret is the share of the
oracle's requests that a contestant lacks: 1 - inside / sum over phases of the oracle's inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchpilot.env.contest.crew import Crew
from batchpilot.env.contest.lineup import DEFAULT, OURS, PUBLISHED, contestant, static_grid
from batchpilot.env.contest.results import Result, Row, run_all
from batchpilot.env.contest.scenario import Scenario, Shift
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.summary import median_of
from batchpilot.env.contest.trial import Trial

_OTHERS = ("watermark:0.05", PUBLISHED, "memory+sla", "aimd", "p-pas", "trtllm")


@dataclass(frozen=True)
class ShiftRow(Row):
    """A contestant in a scenario of several phases."""

    def inside_phase(self, phase: int) -> int:
        """Requests of a phase inside the targets, over all seeds."""
        return sum(outcome.phases[phase].inside for outcome in self.outcomes)

    @property
    def inside_by_seed(self) -> list[int]:
        """Requests of all phases inside the targets."""
        return [sum(phase.inside for phase in outcome.phases) for outcome in self.outcomes]

    @property
    def regained_s(self) -> list[float | None]:
        """On each seed, engine time from the shift until the target is regained."""
        return [outcome.phases[-1].regained_s for outcome in self.outcomes]

    def itl_p99_ms_of(self, phase: int) -> float | None:
        """Median over the seeds of a phase's 99th percentile of token gaps."""
        return median_of([outcome.phases[phase].itl_p99_ms for outcome in self.outcomes])


@dataclass(frozen=True)
class ShiftResult(Result[ShiftRow]):
    """A scenario's contestants through its phases."""

    def oracle(self, phase: int) -> ShiftRow:
        """The static pair that was best in a phase."""
        return max(self.static_rows, key=lambda row: row.inside_phase(phase))

    @property
    def phases(self) -> range:
        """The phases' indices."""
        return range(len(self.rows[0].outcomes[0].phases))

    @property
    def oracle_share(self) -> float:
        """Share of all requests that the oracle had inside the targets."""
        submitted = sum(o.submitted for o in self.rows[0].outcomes)
        return self._oracle_inside / submitted

    @property
    def _oracle_inside(self) -> int:
        return sum(self.oracle(phase).inside_phase(phase) for phase in self.phases)

    def regret(self, row: ShiftRow) -> float:
        """Share of the oracle's requests that a contestant lacks; below 0 where it has more."""
        best = self._oracle_inside
        return 1 - sum(row.inside_by_seed) / best if best else 0.0


def compare_shifts(settings: ContestSettings, crew: Crew, folder: Path) -> list[ShiftResult]:
    """Runs everybody through every shift, on every seed."""
    results = []
    for shift in settings.shift_scenarios():
        trials = {
            label: [_trial(shift, label, seed) for seed in settings.all_seeds]
            for label in settings.lineup(shift.scenario, _lineup(shift.scenario))
        }
        outcomes = run_all(f"shifts, {shift.scenario.label}", trials, crew, folder)
        rows = tuple(ShiftRow(label, found) for label, found in outcomes.items())
        results.append(ShiftResult(shift.scenario, rows))
    return results


def _lineup(scenario: Scenario) -> tuple[str, ...]:
    return (*(DEFAULT, OURS), *static_grid(scenario), *_OTHERS)


def _trial(shift: Shift, label: str, seed: int) -> Trial:
    return Trial(
        shift.scenario,
        contestant(label),
        seed=seed,
        phase_starts_s=shift.phase_starts_s,
        slow_factor=shift.slow_factor,
    )
