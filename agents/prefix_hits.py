"""How much of the prompts the prefix cache holds, learned online."""

from __future__ import annotations

from batchpilot.agents.limits import StepRecord

#: Steps with prompt tokens after which what was counted is worth half.
MEMORY_STEPS = 256


class PrefixHits:
    """The share of prompt tokens that need not be computed.

    Formula: cached / (cached + computed), both summed over the newest steps, older ones for less:
    whenever `MEMORY_STEPS` more steps had prompts in them, both sums are halved.

    Limitations: what a preempted request computes again counts as computed. One share stands for
    all prompts, also where some are cached whole and others not at all.

    Attributes:
        share: 0 to 1; 0 before the first hit.
    """

    def __init__(self) -> None:
        """Starts with nothing cached."""
        self._cached = self._computed = 0.0
        self._steps = 0
        self.share = 0.0

    def observe(self, step: StepRecord) -> None:
        """Counts the prompt tokens of a step."""
        if not (step.prefill_tokens or step.cached_tokens):
            return
        self._cached += step.cached_tokens
        self._computed += step.prefill_tokens
        self._steps += 1
        if self._steps >= MEMORY_STEPS:
            self._cached, self._computed, self._steps = self._cached / 2, self._computed / 2, 0
        if self._cached:
            self.share = self._cached / (self._cached + self._computed)
