"""From a report to a lease: the engine's policy decides, and one that fails is taken out of use.

A policy that cannot be built or that raises leaves its engine without a lease, so that the engine's
hook goes on with its local policy; no other engine notices.
"""

from __future__ import annotations

import logging
import time

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.shield import SafetyBounds
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.canaries import Canaries
from batchpilot.service.decider import Decider, ShieldedDecision
from batchpilot.service.groups import Groups, PolicyChoice
from batchpilot.service.meters import Meters
from batchpilot.service.policy_source import PolicySource, with_its_fix
from batchpilot.service.recorder import Recorder
from batchpilot.service.sessions import Session
from batchpilot.service.wire import latency_targets

logger = logging.getLogger("batchpilot.service")


class Steering:
    """Decides for every session, by the policy of its group."""

    def __init__(
        self,
        groups: Groups,
        source: PolicySource,
        meters: Meters,
        canaries: Canaries | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Asks `groups` which policy, and `source` for the policy itself."""
        self._canaries = canaries
        self._recorder = recorder
        self._groups = groups
        self._source = source
        self._meters = meters

    def is_outdated(self, session: Session) -> bool:
        """Whether the session's group has changed how it is steered since its last welcome."""
        return session.generation != self._groups.generation and (
            self._choose(session) != session.choice
        )

    def welcome(self, session: Session) -> pb.Welcome:
        """Gives the session its group's policy, fresh, and says how to go on."""
        choice = self._choose(session)
        session.choice = choice
        session.targets = _targets(session, choice)
        session.detail = pb.DETAIL_WINDOW
        shared = _shared_settings(session, choice)
        try:
            built = self._source.build(choice.policy, session.key.group, shared)
            session.decider = Decider(built.policy, session.facts, _bounds(session, choice))
            session.problem = ""
            if built.needs_steps:
                session.detail = pb.DETAIL_STEPS
        except ConfigError as error:
            self._give_up(session, with_its_fix(error, session.key.group))
        except Exception:
            logger.exception("policy %s cannot be built for %s", choice.policy, session.key)
            self._give_up(session, "it cannot be built; see the service's log")
        return welcome_message(session, choice)

    def answer(
        self, session: Session, report: pb.Report, *, always: bool = False
    ) -> pb.LimitsLease | None:
        """Decides on a report, and makes the lease that answers it.

        Args:
            session: Whose.
            report: What it is decided on.
            always: Answer also where the engine need not hear of it.

        Returns:
            None while the session has no working policy, and where the lease in force says the same
            and runs on for long enough.
        """
        decider, choice = session.decider, session.choice
        if decider is None or choice is None:
            return None
        started = time.perf_counter()
        try:
            decided = decider.decide(report)
        except Exception:
            logger.exception("policy %s fails for %s", choice.policy, session.key)
            self._give_up(session, "it raised an exception; see the service's log")
            return None
        session.desired = decided.decision.wanted
        session.clamp = decided.clamp
        lease = None
        if always or not _goes_without_saying(session, report, choice, decided.limits):
            lease = session.lease = _lease(report, choice, decided)
            session.leased_at = session.reported_at
            self._meters.leased(session.key.group)
        self._meters.decided(session.key.group, decided.clamp, time.perf_counter() - started)
        if self._canaries is not None:
            self._canaries.observe(session, report)
        if self._recorder is not None:
            self._recorder.record(session, report, decided)
        return lease

    def _choose(self, session: Session) -> PolicyChoice:
        session.generation = self._groups.generation
        return self._groups.choose(session.key)

    def _give_up(self, session: Session, problem: str) -> None:
        session.decider = session.lease = session.desired = None
        session.problem = problem
        self._meters.policy_failed(session.key.group)
        if self._canaries is not None:
            self._canaries.failed(session)
        logger.error("%s goes on with its local policy: %s", session.key, problem)


def welcome_message(session: Session, choice: PolicyChoice) -> pb.Welcome:
    """How an engine is to go on, and what is wrong with its policy."""
    return pb.Welcome(
        session_id=session.session_id,
        report_interval_ms=choice.settings.report_interval_ms,
        detail=session.detail,
        policy=choice.policy,
        itl_slo_ms=session.targets.itl_slo_ms,
        ttft_slo_ms=session.targets.ttft_slo_ms,
        problem=session.problem,
    )


def _goes_without_saying(
    session: Session, report: pb.Report, choice: PolicyChoice, limits: BatchLimits
) -> bool:
    """Whether the newest lease says the same and outlasts the next report by half its time.

    An answer that is left out costs nothing: the next one has half a lease left to come in. What
    the engine says of its lease and its interval counts: it may have cut either to its own bounds.
    """
    lease, settings = session.lease, choice.settings
    interval_ms = max(settings.report_interval_ms, 1000 * report.window.seconds)
    return (
        lease is not None
        and report.lease_remaining_ms >= lease.lease_ms / 2 + interval_ms
        and lease.limits.max_num_seqs == limits.max_num_seqs
        and lease.limits.max_num_batched_tokens == limits.max_num_batched_tokens
        and lease.lease_ms == settings.lease_ms
        and lease.policy == choice.policy
    )


def _lease(report: pb.Report, choice: PolicyChoice, decided: ShieldedDecision) -> pb.LimitsLease:
    decision, limits, _ = decided
    return pb.LimitsLease(
        sequence=report.sequence,
        limits=pb.BatchLimits(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        ),
        lease_ms=choice.settings.lease_ms,
        source=decision.source,
        reason=decision.reason,
        policy=choice.policy,
    )


def _targets(session: Session, choice: PolicyChoice) -> LatencyTargets:
    """An engine's own targets win over its group's."""
    own, settings = latency_targets(session.hello), choice.settings
    return LatencyTargets(
        own.itl_slo_ms or settings.itl_slo_ms, own.ttft_slo_ms or settings.ttft_slo_ms
    )


def _shared_settings(session: Session, choice: PolicyChoice) -> dict[str, float | None]:
    """What policies share; an engine's chunk is its own."""
    return {
        "itl_slo_ms": session.targets.itl_slo_ms,
        "ttft_slo_ms": session.targets.ttft_slo_ms,
        "memory_overflow_probability": choice.settings.memory_overflow_probability,
        "min_prefill_chunk": max(1, session.hello.min_prefill_chunk),
    }


def _bounds(session: Session, choice: PolicyChoice) -> SafetyBounds:
    """The narrower of what the engine's operator and its group allow."""
    hello, settings = session.hello, choice.settings
    return SafetyBounds(
        min_num_seqs=max(1, hello.min_num_seqs, settings.min_num_seqs),
        max_num_seqs=settings.max_num_seqs,
        min_prefill_chunk=max(1, hello.min_prefill_chunk),
    )
