"""TunerService: streams of reports in, leases out.

The path from a report to its lease is the service's hot path: one read, one decision, one write,
no task and no lock of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.refusals import RefusalError, refusals
from batchpilot.service.sessions import Session, SessionTable
from batchpilot.service.steering import Steering
from batchpilot.service.validation import ReportError, check_hello, check_report

logger = logging.getLogger("batchpilot.service")

#: A report costs one of its engine's bucket, and one more for so many steps.
STEPS_PER_COST = 64


class TunerServicer(tuner_pb2_grpc.TunerServiceServicer):
    """Answers engines and those who watch them."""

    def __init__(self, sessions: SessionTable, steering: Steering) -> None:
        """Serves the sessions of one service."""
        self._sessions = sessions
        self._steering = steering

    async def Tune(
        self,
        request_iterator: AsyncIterator[pb.TuneRequest],
        context: grpc.aio.ServicerContext[pb.TuneRequest, pb.TuneResponse],
    ) -> None:
        """Holds one engine's session until either side ends it."""
        del request_iterator
        try:
            with refusals():
                await self._tune(context)
        except RefusalError as refusal:
            await context.abort(refusal.code, str(refusal))

    async def _tune(self, context: Any) -> None:
        first = await context.read()
        if first is grpc.aio.EOF or first.WhichOneof("kind") != "hello":
            raise ReportError("the first request must be a hello")
        check_hello(first.hello)
        session = self._sessions.open(first.hello, asyncio.current_task())
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

    async def _serve(self, session: Session, context: Any) -> None:
        steering, read, write = self._steering, context.read, context.write
        await write(pb.TuneResponse(welcome=steering.welcome(session)))
        while (request := await read()) is not grpc.aio.EOF:
            if request.WhichOneof("kind") != "report":
                raise ReportError("every request after the first must be a report")
            self._accept(session, request.report)
            if steering.is_outdated(session):
                await write(pb.TuneResponse(welcome=steering.welcome(session)))
            lease = steering.answer(session, request.report)
            if lease is not None:
                await write(pb.TuneResponse(lease=lease))

    def _accept(self, session: Session, report: pb.Report) -> None:
        """Takes a report in, if it can be real and comes no faster than it may.

        Raises:
            ReportError: It cannot.
            RefusalError: It comes too fast.
        """
        now = time.monotonic()
        if not session.bucket.take(now, 1 + len(report.steps) / STEPS_PER_COST):
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
        session.report = report
        session.reported_at = now
        session.version += 1
