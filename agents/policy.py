"""The one face every policy has."""

from __future__ import annotations

from typing import Protocol

from batchpilot.agents.limits import Decision, EngineSnapshot, StepRecord


class LimitPolicy(Protocol):
    """Decides both limits before each step, from what it has been told of the steps before.

    A policy holds no clock, does no I/O and knows no engine. Both methods are O(1) unless an
    admission is at hand, and neither is ever called from two threads.
    """

    def observe(self, step: StepRecord) -> None:
        """Learns from a step that has finished."""

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Proposes the limits of the step about to be scheduled; the shield has the last word."""
