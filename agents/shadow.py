"""A second policy beside the one that steers: it decides on the same records, and is only watched.

So that a policy can be trusted before it is used: what it would have done is there, step by step,
beside what was done.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, StepRecord
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shield import SafetyBounds, shield


class Agreement(StrEnum):
    """In what the shadow's limits differ from those that apply, both shielded."""

    SAME = "same"
    MAX_NUM_SEQS = "max_num_seqs"
    MAX_NUM_BATCHED_TOKENS = "max_num_batched_tokens"
    BOTH = "both"


_AGREEMENTS = {
    (False, False): Agreement.SAME,
    (True, False): Agreement.MAX_NUM_SEQS,
    (False, True): Agreement.MAX_NUM_BATCHED_TOKENS,
    (True, True): Agreement.BOTH,
}


class ShadowedPolicy:
    """Steers by one policy and asks another what it would have done.

    Formula: the first policy's decision, whatever the second says. The second's is shielded by the
    same bounds, so that what is compared are limits that would have applied.

    Regimes: an exception in the second ends the shadow and nothing else; `failure` then says what
    happened and `limits` is None. An exception in the first is the caller's, as ever.

    Limitations: the shadow sees an engine that it does not steer. A policy that learns from what
    its own limits do, such as a search, learns nothing of them here; one that computes its limits
    from what it sees loses nothing. It costs what a second policy costs.

    Attributes:
        limits: What the shadow would have applied to the newest step; None before the first, and
            from a failure on.
        decision: Its decision behind that.
        agreement: Steps, by what differed.
        failure: What ended the shadow; None while it goes on.
    """

    def __init__(
        self, applied: LimitPolicy, shadow: LimitPolicy, bounds: SafetyBounds | None = None
    ) -> None:
        """Keeps both.

        Args:
            applied: Steers.
            shadow: Is watched.
            bounds: What the shield allows.
        """
        self.limits: BatchLimits | None = None
        self.decision: Decision | None = None
        self.agreement: Counter[Agreement] = Counter()
        self.failure: str | None = None
        self._applied = applied
        self._shadow: LimitPolicy | None = shadow
        self._bounds = bounds or SafetyBounds()

    def observe(self, step: StepRecord) -> None:
        """Shows the step to both."""
        self._applied.observe(step)
        if self._shadow is not None:
            try:
                self._shadow.observe(step)
            except Exception as error:
                self._end(error)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The first policy's decision; notes the second's."""
        decision = self._applied.decide(snapshot)
        if self._shadow is not None:
            try:
                self._compare(self._shadow.decide(snapshot), decision, snapshot)
            except Exception as error:
                self._end(error)
        return decision

    def _compare(self, own: Decision, applied: Decision, snapshot: EngineSnapshot) -> None:
        limits = shield(own.limits, snapshot, self._bounds).limits
        other = shield(applied.limits, snapshot, self._bounds).limits
        differs = (
            limits.max_num_seqs != other.max_num_seqs,
            limits.max_num_batched_tokens != other.max_num_batched_tokens,
        )
        self.limits, self.decision = limits, own
        self.agreement[_AGREEMENTS[differs]] += 1

    def _end(self, error: Exception) -> None:
        self._shadow = self.limits = self.decision = None
        self.failure = f"{type(error).__name__}: {error}"
