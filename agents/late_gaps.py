"""How many inter-token gaps have been longer than the target, and whether more may be."""

from __future__ import annotations

from collections import deque

from batchpilot.agents.limits import StepRecord

#: A target is about the 99th percentile; what is spent on purpose stays below the last percent.
LATE_SHARE = 0.006
#: Steps over which the share is reckoned.
MEMORY_STEPS = 10_000
#: Steps that may be scheduled before the first of them is back: vLLM works one ahead.
STEPS_IN_FLIGHT = 2


class LateGapBudget:
    """An error budget: the share of gaps beyond the target that a 99th percentile leaves open.

    Formula: with D sequences decoding in a step, late = sum of D over late steps and all = sum of D
    over all steps, both discounted by 1 - 1/`MEMORY_STEPS` a step. Another step may be late while
    (late + planned + D) <= `LATE_SHARE` all, where planned are late steps not back yet.
    """

    def __init__(self, target_seconds: float) -> None:
        """Starts with nothing to spend."""
        self._target = target_seconds
        self._late = self._all = 0.0
        self._planned: deque[int] = deque([0] * STEPS_IN_FLIGHT, maxlen=STEPS_IN_FLIGHT)

    @property
    def late_share(self) -> float:
        """Share of recent gaps beyond the target."""
        return self._late / self._all if self._all else 0.0

    @property
    def used(self) -> float:
        """Late gaps as a share of those that may be: 1 where the budget is spent."""
        return self._late / (LATE_SHARE * self._all) if self._all else 1.0

    def observe(self, step: StepRecord) -> None:
        """Counts a step's gaps, whoever made them late."""
        keep = 1 - 1 / MEMORY_STEPS
        self._late *= keep
        self._all = self._all * keep + step.decode_seqs
        if step.seconds > self._target:
            self._late += step.decode_seqs

    def allows(self, decode_seqs: int) -> bool:
        """Whether the next step may be late."""
        late = self._late + sum(self._planned) + decode_seqs
        return late <= LATE_SHARE * self._all

    def plan(self, decode_seqs: int) -> None:
        """Notes the gaps of the step about to be scheduled that will be late; 0 for none."""
        self._planned.append(decode_seqs)
