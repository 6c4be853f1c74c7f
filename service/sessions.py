"""The engines that are here now: one session each.

A session holds nothing that its engine does not bring again when it reconnects, to this service or
to another: the hello, the newest report, and a policy that learns from the reports to come.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.agents.shield import Clamp
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.access import Caller
from batchpilot.service.decider import Decider
from batchpilot.service.groups import PolicyChoice
from batchpilot.service.rates import TokenBucket
from batchpilot.service.refusals import RefusalError
from batchpilot.service.wire import EngineKey, engine_facts, engine_key, latency_targets

#: An engine without a stream that has not reported for so long has gone.
SILENT_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class Session:
    """One engine's session.

    Attributes:
        key: Which engine.
        session_id: Names it in logs.
        caller: Who opened it.
        hello: The engine's first words.
        facts: Those of the hello.
        targets: Those in force: the engine's own, or else, once it is welcome, its group's.
        bucket: Its reports.
        task: The stream's; None for an entry that GetLimits opened.
        started_at: Monotonic seconds.
        choice: Who decides for it; None before its welcome.
        generation: Of the groups, when that was last looked up.
        detail: How much it is asked to report.
        decider: The policy at work; None once it has failed.
        problem: Why it has none.
        sequence: The newest report's.
        report: The newest one; None before the first.
        reported_at: When it came, in monotonic seconds; the start before the first.
        lease: The newest one sent.
        leased_at: When the report came that it answers, in monotonic seconds.
        clamp: Why its limits differ from what the policy wanted.
        desired: What the policy wanted, before the shield.
        recorded: Whether its reports go to the experience log; None before the first.
        version: Counts its changes, for watchers.
        end: Why the service has ended it.
    """

    key: EngineKey
    session_id: str
    caller: Caller
    hello: pb.EngineHello
    facts: EngineFacts
    targets: LatencyTargets
    bucket: TokenBucket
    task: asyncio.Task[object] | None
    started_at: float
    reported_at: float
    choice: PolicyChoice | None = None
    generation: int = -1
    detail: pb.Detail = pb.DETAIL_WINDOW
    decider: Decider | None = None
    problem: str = ""
    sequence: int = 0
    report: pb.Report | None = None
    lease: pb.LimitsLease | None = None
    leased_at: float = 0.0
    clamp: Clamp = Clamp.NONE
    desired: BatchLimits | None = None
    recorded: bool | None = None
    version: int = 0
    end: RefusalError | None = None

    def has_lease(self, now: float) -> bool:
        """Whether its newest lease still runs, at that time in monotonic seconds."""
        return self.lease is not None and now < self.leased_at + self.lease.lease_ms / 1e3


@dataclass(slots=True)
class SessionTable:
    """Every session by its engine.

    Attributes:
        max_sessions: Engines at once.
        reports_per_second: Reports one engine may send.
        report_burst: Reports it may send at once.
        clock: Seconds, monotonic.
    """

    max_sessions: int
    reports_per_second: float
    report_burst: int
    clock: Callable[[], float] = time.monotonic
    _sessions: dict[EngineKey, Session] = field(default_factory=dict)
    _buckets: dict[EngineKey, TokenBucket] = field(default_factory=dict)

    def __len__(self) -> int:
        """Engines here now."""
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """Those of one moment; sessions may come and go meanwhile."""
        return iter(list(self._sessions.values()))

    def get(self, key: EngineKey) -> Session | None:
        """The engine's session, if it has one."""
        return self._sessions.get(key)

    def open(
        self, hello: pb.EngineHello, caller: Caller, task: asyncio.Task[object] | None
    ) -> Session:
        """Begins a session; an earlier one of the same engine ends with ABORTED.

        Raises:
            RefusalError: There are too many.
        """
        key = engine_key(hello.id)
        earlier = self._sessions.get(key)
        if earlier is None and len(self._sessions) >= self.max_sessions:
            raise RefusalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "too_many_sessions",
                f"this service holds its most of {self.max_sessions} sessions",
            )
        if earlier is not None:
            text = f"a new session of {key} has replaced this one"
            self.end(earlier, RefusalError(grpc.StatusCode.ABORTED, "replaced", text))
        now = self.clock()
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            bucket = TokenBucket(self.reports_per_second, self.report_burst, now)
        session = Session(
            key=key,
            session_id=secrets.token_hex(6),
            caller=caller,
            hello=hello,
            facts=engine_facts(hello.facts),
            targets=latency_targets(hello),
            bucket=bucket,
            task=task,
            started_at=now,
            reported_at=now,
        )
        self._sessions[key] = session
        return session

    def sweep(self) -> None:
        """Forgets the entries of engines without a stream whose reports have stopped."""
        oldest = self.clock() - SILENT_SECONDS
        for session in self:
            if session.task is None and session.reported_at < oldest:
                self.close(session)

    def end(self, session: Session, why: RefusalError) -> None:
        """Ends a session from the service's side; its stream is told why."""
        session.end = why
        self.close(session)
        if session.task is not None:
            session.task.cancel()

    def close(self, session: Session) -> None:
        """Forgets a session, unless a newer one has taken its place."""
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            # Who comes back soon has no new one: a session is quickly opened.
            self._buckets[session.key] = session.bucket
            if len(self._buckets) > self.max_sessions:
                del self._buckets[next(iter(self._buckets))]
