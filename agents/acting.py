"""Carries out an agent's actions: between two of them, the newest goes on holding.

The same object is the environment's hand on the engine while an agent trains and the trained
agent's own in service, so that an action does in both what it did in one.
"""

from __future__ import annotations

from batchpilot.agents.actions import Action, ActionDesign
from batchpilot.agents.limits import Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.policy import LimitPolicy

FOLLOWS_ACTION = "follows the agent's action"
BASE_DECIDES = "no action yet: the base policy decides"


class ActingPolicy:
    """Turns the newest action into limits, step by step.

    Formula: `batchpilot.agents.actions` has the mapping of each design. The base policy observes
    and decides in every step; without an action, and after an action of 0, its limits are the ones
    proposed.

    Limitations: none of its own; it is as good as its actions.

    Args:
        design: What an action means.
        base: The policy that actions are relative to.
    """

    def __init__(self, design: ActionDesign, base: LimitPolicy) -> None:
        """Starts without an action."""
        self.design = design
        self._base = base
        self._action: Action | None = None
        self._based_on: tuple[Decision, int, int] | None = None
        self._decision: Decision | None = None
        self._reason = BASE_DECIDES

    @property
    def action(self) -> Action | None:
        """The newest action; None where the base policy decides alone."""
        return self._action

    def act(self, action: Action | None, reason: str = FOLLOWS_ACTION) -> None:
        """Takes an action; it holds until the next.

        Args:
            action: None hands over to the base policy.
            reason: Why, for logs.
        """
        self._action, self._reason, self._based_on = action, reason, None

    def observe(self, step: StepRecord) -> None:
        """Shows the step to the base policy."""
        self._base.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The action's limits, relative to what the base decides for this step."""
        base = self._base.decide(snapshot)
        based_on = (base, snapshot.running, snapshot.prefill_seqs)
        if self._decision is None or based_on != self._based_on:
            self._decision = self._map(base, snapshot)
            self._based_on = based_on
        return self._decision

    def _map(self, base: Decision, snapshot: EngineSnapshot) -> Decision:
        if self._action is None:
            return Decision(
                base.limits, Source.FALLBACK, self._reason, wanted_seqs=base.wanted_seqs
            )
        limits, wanted = self.design.to_limits(self._action, base, snapshot), None
        if limits.max_num_seqs <= snapshot.running:
            wanted = self.design.wanted_seqs(self._action, base, snapshot.engine)
        return Decision(limits, Source.LEARNED, self._reason, wanted_seqs=wanted)
