"""Engines as the service sees them, and the stream of what changes about them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.sessions import Session, SessionTable
from batchpilot.service.wire import EngineKey, engine_id

#: Least time between two messages to one watcher, and what stands for 0, in milliseconds.
SHORTEST_WATCH_MS, DEFAULT_WATCH_MS, LONGEST_WATCH_MS = 200, 1000, 60_000
#: Engines in one message: a message stays small, and deciding goes on between two of them.
ENGINES_PER_MESSAGE = 50


def engine_status(session: Session, now: float) -> pb.EngineStatus:
    """A session's state.

    Args:
        session: Whose.
        now: Monotonic seconds.
    """
    status = pb.EngineStatus(
        id=engine_id(session.key),
        hello=session.hello,
        report_age_ms=round((now - session.reported_at) * 1000),
        session_seconds=now - session.started_at,
        canary=session.choice is not None and session.choice.canary,
        problem=session.problem,
        itl_slo_ms=session.targets.itl_slo_ms,
        ttft_slo_ms=session.targets.ttft_slo_ms,
    )
    report = session.report
    if report is not None:
        status.window.CopyFrom(report.window)
        status.binding = report.binding
        status.applied_limits.CopyFrom(report.window.limits)
        status.source = report.source
    if session.lease is not None:
        status.lease.CopyFrom(session.lease)
        status.lease_age_ms = round((now - session.leased_at) * 1000)
    return status


def matching(sessions: SessionTable, group: str, engine: str = "") -> list[Session]:
    """Sessions of a group and an engine, all for empty ones, in the order of their keys."""
    found = [
        session
        for session in sessions
        if group in ("", session.key.group) and engine in ("", session.key.engine)
    ]
    return sorted(found, key=lambda session: session.key)


async def watch(
    sessions: SessionTable, request: pb.WatchEngineRequest
) -> AsyncIterator[pb.WatchEngineResponse]:
    """What changes, message by message; first everything that matches."""
    asked = request.interval_ms or DEFAULT_WATCH_MS
    interval = min(max(asked, SHORTEST_WATCH_MS), LONGEST_WATCH_MS) / 1000
    known: dict[EngineKey, tuple[str, int]] = {}
    first = True
    while True:
        here = matching(sessions, request.group, request.engine)
        stamps = {session.key: (session.session_id, session.version) for session in here}
        changed = [session for session in here if known.get(session.key) != stamps[session.key]]
        gone = [key for key in known if key not in stamps]
        for start in range(0, max(len(changed), 1 if gone or first else 0), ENGINES_PER_MESSAGE):
            part = changed[start : start + ENGINES_PER_MESSAGE]
            now = sessions.clock()
            yield pb.WatchEngineResponse(
                engines=[engine_status(session, now) for session in part],
                gone=[engine_id(key) for key in gone] if start == 0 else [],
            )
        known, first = stamps, False
        await asyncio.sleep(interval)
