"""TunerService: streams of reports in, leases out.

The path from a report to its lease is the service's hot path: one read, one decision, one write,
no task and no lock of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.access import Caller, Role
from batchpilot.service.gate import Gate, check_speaks_for
from batchpilot.service.meters import Meters
from batchpilot.service.refusals import RefusalError, answering
from batchpilot.service.sessions import Session, SessionTable
from batchpilot.service.status import engine_status, matching, watch
from batchpilot.service.steering import Steering, welcome_message
from batchpilot.service.validation import ReportError, check_hello, check_id, check_report
from batchpilot.service.wire import EngineKey, engine_key

logger = logging.getLogger("batchpilot.service")

#: A report costs one of its engine's bucket, one more for so many steps, and one more for so many
#: sequences in all of them together: a policy may look at each in every step.
STEPS_PER_COST = 64
SEQUENCES_PER_COST = 50_000
#: Reports of more bytes are not kept whole until the next one.
KEPT_BYTES = 1024
#: Listing so many engines costs a client as much as one other call.
ENGINES_PER_COST = 20
#: An engine that opens a stream says hello within this time.
HELLO_SECONDS = 10.0

_ENGINES = (Role.ENGINE, Role.ADMIN)
_READERS = (Role.VIEWER, Role.ADMIN)


@dataclass(slots=True, eq=False)
class Watcher:
    """One WatchEngine stream.

    Attributes:
        caller: Who opened it.
        task: The stream's.
        end: Why the service has ended it.
    """

    caller: Caller
    task: asyncio.Task[object]
    end: RefusalError | None = None


class TunerServicer(tuner_pb2_grpc.TunerServiceServicer):
    """Answers engines and those who watch them.

    Attributes:
        watchers: The WatchEngine streams.

    Args:
        gate: Admits callers.
        sessions: The engines here.
        steering: Decides for them.
        meters: Counts.
        max_watchers: WatchEngine streams at once.
    """

    def __init__(
        self,
        gate: Gate,
        sessions: SessionTable,
        steering: Steering,
        meters: Meters,
        max_watchers: int,
    ) -> None:
        """Serves the sessions of one service."""
        self.watchers: set[Watcher] = set()
        self._gate = gate
        self._sessions = sessions
        self._steering = steering
        self._meters = meters
        self._max_watchers = max_watchers
        self._shut: RefusalError | None = None

    async def Tune(self, request_iterator: AsyncIterator[pb.TuneRequest], context: Any) -> None:
        """Holds one engine's session until either side ends it."""
        del request_iterator
        async with answering("Tune", context, self._meters):
            caller = self._gate.admit(context, *_ENGINES)
            hello = await self._hello(caller, context)
            why_not = self._shut or self._gate.why_no_longer(caller)  # it may have taken its time
            if why_not is not None:
                raise why_not
            session = self._sessions.open(hello, caller, asyncio.current_task())
            logger.info("session %s of %s begins", session.session_id, session.key)
            try:
                await self._serve(session, context)
            except asyncio.CancelledError:
                if session.end is None:
                    raise  # the engine has gone
                raise session.end from None
            finally:
                self._sessions.close(session)
                logger.info("session %s of %s ends", session.session_id, session.key)

    async def GetLimits(self, request: pb.GetLimitsRequest, context: Any) -> pb.GetLimitsResponse:
        """The newest lease, or a decision on the report that the request brings."""
        async with answering("GetLimits", context, self._meters):
            caller = self._gate.admit(context, *Role)
            check_id(request.id)
            key = engine_key(request.id)
            if request.HasField("report"):
                return pb.GetLimitsResponse(lease=self._answer_once(caller, key, request))
            if caller.role is Role.ENGINE:
                check_speaks_for(caller, key)
            session = self._sessions.get(key)
            if session is None:
                raise _no_session(key)
            return pb.GetLimitsResponse(lease=session.lease)

    async def ListEngines(
        self, request: pb.ListEnginesRequest, context: Any
    ) -> pb.ListEnginesResponse:
        """The engines here."""
        async with answering("ListEngines", context, self._meters):
            cost = 1 + len(self._sessions) / ENGINES_PER_COST
            self._gate.admit(context, *_READERS, cost=cost)
            now = self._sessions.clock()
            found = matching(self._sessions, request.group)
            return pb.ListEnginesResponse(engines=[engine_status(s, now) for s in found])

    async def WatchEngine(self, request: pb.WatchEngineRequest, context: Any) -> None:
        """What changes about the engines here."""
        async with answering("WatchEngine", context, self._meters):
            cost = 1 + len(self._sessions) / ENGINES_PER_COST
            watcher = self._open_watcher(self._gate.admit(context, *_READERS, cost=cost))
            try:
                async for response in watch(self._sessions, request):
                    await context.write(response)  # where a watcher reads too slowly, it ends here
            except asyncio.CancelledError:
                if watcher.end is None:
                    raise  # the watcher has gone
                raise watcher.end from None
            finally:
                self.watchers.discard(watcher)

    def shut(self, why: RefusalError) -> None:
        """Ends every stream, for the same reason."""
        self._shut = why
        for session in self._sessions:
            self._sessions.end(session, why)
        for watcher in list(self.watchers):
            _end_watcher(watcher, why)

    def end_unknown(self) -> None:
        """Ends the streams of callers that the gate would not admit any more."""
        for session in self._sessions:
            why = self._gate.why_no_longer(session.caller)
            if why is not None:
                self._sessions.end(session, why)
        for watcher in list(self.watchers):
            why = self._gate.why_no_longer(watcher.caller)
            if why is not None:
                _end_watcher(watcher, why)

    def _open_watcher(self, caller: Caller) -> Watcher:
        """Begins to count a WatchEngine stream, the one whose task this is.

        Raises:
            RefusalError: There are too many.
        """
        if len(self.watchers) >= self._max_watchers:
            raise RefusalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "too_many_watchers",
                f"this service holds its most of {self._max_watchers} watchers",
            )
        task = asyncio.current_task()
        assert task is not None
        watcher = Watcher(caller, task)
        self.watchers.add(watcher)
        return watcher

    async def _hello(self, caller: Caller, context: Any) -> pb.EngineHello:
        try:
            first = await asyncio.wait_for(context.read(), HELLO_SECONDS)
        except TimeoutError:
            raise ReportError(f"no hello within {HELLO_SECONDS:g} s") from None
        if first is grpc.aio.EOF or first.WhichOneof("kind") != "hello":
            raise ReportError("the first request must be a hello")
        hello: pb.EngineHello = first.hello
        check_hello(hello)
        check_speaks_for(caller, engine_key(hello.id))
        return hello

    async def _serve(self, session: Session, context: Any) -> None:
        steering, read, write = self._steering, context.read, context.write
        await write(pb.TuneResponse(welcome=steering.welcome(session)))
        while (request := await read()) is not grpc.aio.EOF:
            if request.WhichOneof("kind") != "report":
                raise ReportError("every request after the first must be a report")
            report = request.report
            self._accept(session, report)
            if steering.is_outdated(session):
                await write(pb.TuneResponse(welcome=steering.welcome(session)))
            works = session.decider is not None
            lease = steering.answer(session, report)
            if lease is not None:
                await write(pb.TuneResponse(lease=lease))
            elif works and session.decider is None and session.choice is not None:
                await write(pb.TuneResponse(welcome=welcome_message(session, session.choice)))

    def _answer_once(
        self, caller: Caller, key: EngineKey, request: pb.GetLimitsRequest
    ) -> pb.LimitsLease | None:
        """Decides for an engine that has no stream."""
        if caller.role is Role.VIEWER:
            raise RefusalError(
                grpc.StatusCode.PERMISSION_DENIED, "role", "a viewer may not report for an engine"
            )
        check_speaks_for(caller, key)
        session = self._sessions.get(key)
        if session is not None and session.task is not None:
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "has_a_stream",
                f"{key} has a stream here; it reports there",
            )
        if session is None:
            session = self._open_without_stream(caller, key, request)
        self._accept(session, request.report)
        if self._steering.is_outdated(session):
            self._steering.welcome(session)
        return self._steering.answer(session, request.report, always=True)

    def _open_without_stream(
        self, caller: Caller, key: EngineKey, request: pb.GetLimitsRequest
    ) -> Session:
        if not request.HasField("hello"):
            raise _no_session(key)
        check_hello(request.hello)
        if engine_key(request.hello.id) != key:
            raise ReportError(f"the hello's id is not {key}")
        session = self._sessions.open(request.hello, caller, None)
        self._steering.welcome(session)
        return session

    def _accept(self, session: Session, report: pb.Report) -> None:
        """Takes a report in, if it can be real and comes no faster than it may.

        Raises:
            ReportError: It cannot.
            RefusalError: It comes too fast.
        """
        now = self._sessions.clock()
        if not session.bucket.take(now, _cost(report)):
            raise RefusalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "too_many_reports",
                f"reports come faster than {self._sessions.reports_per_second:g} a second",
            )
        if report.sequence <= session.sequence:
            raise ReportError(
                f"sequence={report.sequence} must be greater than the last, {session.sequence}"
            )
        check_report(report, session.hello.facts)
        session.sequence = report.sequence
        session.report = report if report.ByteSize() <= KEPT_BYTES else _without_detail(report)
        session.reported_at = now
        session.version += 1


def _end_watcher(watcher: Watcher, why: RefusalError) -> None:
    watcher.end = why
    watcher.task.cancel()


def _cost(report: pb.Report) -> float:
    """What a report takes out of its engine's bucket."""
    steps = len(report.steps)
    sequences = len(report.running.kv_tokens) + len(report.waiting.kv_tokens)
    return 1 + steps / STEPS_PER_COST + steps * sequences / SEQUENCES_PER_COST


def _without_detail(report: pb.Report) -> pb.Report:
    """What watchers and metrics are shown of a report; the rest would only take memory."""
    kept = pb.Report(sequence=report.sequence, source=report.source, binding=report.binding)
    kept.window.CopyFrom(report.window)
    kept.DiscardUnknownFields()
    return kept


def _no_session(key: EngineKey) -> RefusalError:
    return RefusalError(
        grpc.StatusCode.NOT_FOUND, "no_session", f"{key} has no session here; send its hello too"
    )
