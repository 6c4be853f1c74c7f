"""A policy under observation: all that it was shown and all that it decided, to be shown again.

Written down on one engine, shown to a fresh policy of the same kind: equal decisions prove that a
policy depends on nothing but its records and snapshots, so that what is seen on a simulated engine
is what a live one would get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from batchpilot.agents.limits import Decision, EngineSnapshot, SequenceState, StepRecord
from batchpilot.agents.policy import LimitPolicy


@dataclass(slots=True)
class Sight:
    """One snapshot a policy was shown, what it read of the sequences, and what it decided."""

    snapshot: EngineSnapshot
    running: Sequence[SequenceState] | None = None
    waiting: dict[int, Sequence[SequenceState]] = field(default_factory=dict)
    decision: Decision | None = None

    def read_running(self) -> Sequence[SequenceState]:
        """The running sequences as they were.

        Raises:
            LookupError: The witnessed policy did not read them.
        """
        if self.running is None:
            raise LookupError("the witnessed policy did not read the running sequences here")
        return self.running

    def read_waiting(self, count: int) -> Sequence[SequenceState]:
        """The next waiting requests as they were.

        Raises:
            LookupError: The witnessed policy did not read that many.
        """
        if count not in self.waiting:
            raise LookupError(f"the witnessed policy did not read {count} waiting requests here")
        return self.waiting[count]


class WitnessedPolicy:
    """Passes everything on to a policy and writes it down; implements `LimitPolicy`.

    Attributes:
        events: Records and sights in the order they came.
    """

    def __init__(self, policy: LimitPolicy) -> None:
        """Starts with an empty list."""
        self.events: list[StepRecord | Sight] = []
        self._policy = policy

    @property
    def records(self) -> list[StepRecord]:
        """The step records alone."""
        return [event for event in self.events if isinstance(event, StepRecord)]

    @property
    def decisions(self) -> list[Decision]:
        """The decisions alone."""
        sights = [event for event in self.events if isinstance(event, Sight)]
        return [sight.decision for sight in sights if sight.decision is not None]

    def observe(self, step: StepRecord) -> None:
        """Writes the record down and passes it on."""
        self.events.append(step)
        self._policy.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Writes down the snapshot, what is read through it, and the decision."""
        sight = Sight(snapshot)
        self.events.append(sight)

        def read_running() -> Sequence[SequenceState]:
            sight.running = tuple(snapshot.read_running())
            return sight.running

        def read_waiting(count: int) -> Sequence[SequenceState]:
            sight.waiting[count] = tuple(snapshot.read_waiting(count))
            return sight.waiting[count]

        watched = snapshot._replace(read_running=read_running, read_waiting=read_waiting)
        sight.decision = self._policy.decide(watched)
        return sight.decision


def decides_again(events: Sequence[StepRecord | Sight], policy: LimitPolicy) -> int:
    """Shows a fresh policy what another was shown.

    Args:
        events: A `WitnessedPolicy`'s.
        policy: Of the same kind, and new.

    Returns:
        In how many sights it decided the same.
    """
    same = 0
    for event in events:
        if isinstance(event, StepRecord):
            policy.observe(event)
            continue
        shown = event.snapshot._replace(
            read_running=event.read_running, read_waiting=event.read_waiting
        )
        try:
            same += policy.decide(shown) == event.decision
        except LookupError:
            continue
    return same
