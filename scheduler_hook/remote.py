"""Mode `remote`, the engine's side: follow the lease while it runs, the local policy otherwise.

Everything here runs in the engine's thread. Per step it costs an attribute, a clock and an append;
at each report's interval it hands what happened to the client's thread as one immutable object.
It never calls the service, waits or locks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, Protocol

from batchpilot.agents.limits import (
    BatchLimits,
    Decision,
    EngineSnapshot,
    SequenceState,
    Source,
    StepRecord,
)
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.remote import LeaseHolder

logger = logging.getLogger("vllm.batchpilot")

#: Steps kept for one report; a report is closed early when it has so many.
MOST_STEPS = 4096
#: Waiting requests a detailed report tells of.
MOST_WAITING = 256


class EngineReport(NamedTuple):
    """What happened since the last report, as the engine's thread hands it over.

    Attributes:
        steps: Every step with a result, oldest first.
        seconds: Engine time it spans.
        snapshot: The engine at its end; its readers are not to be called.
        limits: The limits in force at its end.
        source: Who made the newest decision.
        local_limits: What the local policy wants.
        clamps: Decisions that the shield changed, by reason.
        running: The sequences that run; None unless the service asked for detail.
        waiting: The next requests; None unless the service asked for detail.
    """

    steps: tuple[StepRecord, ...]
    seconds: float
    snapshot: EngineSnapshot
    limits: BatchLimits
    source: Source
    local_limits: BatchLimits
    clamps: Mapping[str, int]
    running: tuple[SequenceState, ...] | None = None
    waiting: tuple[SequenceState, ...] | None = None


class Post(Protocol):
    """Takes reports to the service; see `batchpilot.scheduler_hook.tuner_client`."""

    @property
    def interval_seconds(self) -> float:
        """How often the service wants a report."""

    @property
    def wants_detail(self) -> bool:
        """Whether the service wants every step and sequence."""

    def start(self) -> None:
        """Starts sending, in this process; does nothing when it has."""

    def offer(self, report: EngineReport) -> None:
        """Takes a report; returns at once, whatever becomes of it."""


class HookTotals(Protocol):
    """What the hook counts."""

    @property
    def clamps(self) -> Mapping[str, int]:
        """Decisions the shield changed, by reason."""


class HookState(Protocol):
    """What a report tells of the hook."""

    @property
    def applied_limits(self) -> BatchLimits:
        """The limits of the newest step."""

    @property
    def stats(self) -> HookTotals:
        """Totals since the engine started."""


class RemotePolicy:
    """Follows the service's lease while it runs; otherwise the local policy, at once.

    The local policy observes every step whoever decides, and is asked at least once a report, so
    that it is ready when the lease ends.

    Args:
        local: Decides without a lease.
        leases: Where the client's thread puts what the service says.
        post: Takes the reports.
        clock: Monotonic seconds, the one that leases are counted on. Not the engine's own clock,
            which is virtual in a simulation: a lease is an agreement with the world outside.
    """

    def __init__(
        self,
        local: LimitPolicy,
        leases: LeaseHolder,
        post: Post,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without a lease; nothing is sent or opened before the first decision."""
        self._local = local
        self._leases = leases
        self._post = post
        self._clock = clock
        self._hook: HookState | None = None
        self._steps: list[StepRecord] = []
        self._report_at = float("-inf")
        self._reported_at: float | None = None
        self._reported_clamps: dict[str, int] = {}
        self._local_decision: Decision | None = None
        self._fallback: Decision | None = None

    def attach(self, hook: HookState) -> None:
        """Names the hook that applies the decisions: reports tell what became of them."""
        self._hook = hook

    def observe(self, step: StepRecord) -> None:
        """Shows the step to the local policy and keeps it for the next report."""
        self._local.observe(step)
        self._steps.append(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The lease's limits while it runs, the local policy's otherwise."""
        now = self._clock()
        lease = self._leases.current
        leased = lease.decision if lease is not None and now < lease.expires_at else None
        if now < self._report_at and len(self._steps) < MOST_STEPS:
            return leased or self._fall_back(snapshot)
        decision = leased or self._fall_back(snapshot)
        local = decision if leased is None else self._local.decide(snapshot)
        try:
            self._report(snapshot, now, decision, local.wanted)
        except Exception:
            self._stop_reporting()
        return decision

    def _fall_back(self, snapshot: EngineSnapshot) -> Decision:
        local = self._local.decide(snapshot)
        if local is not self._local_decision or self._fallback is None:
            self._local_decision = local
            self._fallback = replace(local, source=Source.FALLBACK)
        return self._fallback

    def _report(
        self, snapshot: EngineSnapshot, now: float, decision: Decision, local_limits: BatchLimits
    ) -> None:
        """Closes the interval and hands it over."""
        post, hook, clock = self._post, self._hook, snapshot.clock_seconds
        post.start()
        self._report_at = now + post.interval_seconds
        started_at, self._reported_at = self._reported_at, clock
        steps, self._steps = tuple(self._steps), []
        if started_at is None:  # the first has seen nothing yet
            return
        detailed = post.wants_detail
        post.offer(
            EngineReport(
                steps=steps,
                seconds=clock - started_at,
                snapshot=snapshot,
                limits=hook.applied_limits if hook else decision.limits,
                source=decision.source,
                local_limits=local_limits,
                clamps=self._new_clamps(),
                running=tuple(snapshot.read_running()) if detailed else None,
                waiting=tuple(snapshot.read_waiting(MOST_WAITING)) if detailed else None,
            )
        )

    def _stop_reporting(self) -> None:
        """After an exception in our code: the local policy goes on, alone and for good."""
        logger.exception("batchpilot reports nothing more; the local policy decides from here on")
        self._report_at = float("inf")
        self._steps = _Nowhere()
        self._leases = LeaseHolder(self._leases.startup_limits, 0.0)

    def _new_clamps(self) -> dict[str, int]:
        if self._hook is None:
            return {}
        totals = {str(reason): count for reason, count in self._hook.stats.clamps.items()}
        before, self._reported_clamps = self._reported_clamps, totals
        return {k: v - before.get(k, 0) for k, v in totals.items() if v > before.get(k, 0)}


class _Nowhere(list[StepRecord]):
    """Where steps go that nobody will hear of."""

    def append(self, step: StepRecord) -> None:
        """Drops the step."""
