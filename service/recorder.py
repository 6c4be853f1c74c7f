"""Between the service and its experience log: one row for every report that was answered."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from batchpilot.agents.canary import is_canary as is_chosen
from batchpilot.agents.experience import ExperienceRow
from batchpilot.agents.features import LatencyTargets
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.decider import ShieldedDecision
from batchpilot.service.sessions import Session
from batchpilot.service.wire import batch_limits, latency_targets, telemetry_window

if TYPE_CHECKING:
    from batchpilot.service.experience import ExperienceLog


class Recorder:
    """Writes reports and their answers to the log; never waits.

    Args:
        log: Where to.
        share: Of the engines that are recorded: always the same ones, with all their reports.
    """

    def __init__(self, log: ExperienceLog, share: float = 1.0) -> None:
        """Records nothing yet."""
        self.log = log
        self._share = share

    @property
    def rows(self) -> dict[str, int]:
        """Rows `written` to files, and `dropped` because the queue or the disk was full."""
        return {"written": self.log.written_rows, "dropped": self.log.dropped}

    def record(self, session: Session, report: pb.Report, decided: ShieldedDecision) -> None:
        """Appends a row, if the engine is one of those recorded."""
        hello, key = session.hello, session.key
        if session.recorded is None:
            session.recorded = is_chosen(key.engine, share=self._share, salt=key.group)
        if not session.recorded:
            return
        has_local = report.HasField("local_limits")
        self.log.append(
            ExperienceRow(
                recorded_at=time.time(),
                session=session.session_id,
                sequence=report.sequence,
                engine_group=key.group,
                engine=key.engine,
                data_parallel_rank=key.rank,
                model_name=hello.model_name,
                facts=session.facts,
                targets=_counted_by(session),
                window=telemetry_window(report.window),
                policy="" if session.choice is None else session.choice.policy,
                proposed=decided.decision.limits,
                limits=decided.limits,
                source=decided.decision.source,
                reason=decided.decision.reason,
                clamp=decided.clamp,
                local_limits=batch_limits(report.local_limits) if has_local else None,
            )
        )


def _counted_by(session: Session) -> LatencyTargets:
    """The targets of a row: older engines count slow tokens by none but their own."""
    if session.hello.follows_targets:
        return session.targets
    own = latency_targets(session.hello)
    return LatencyTargets(own.itl_slo_ms, session.targets.ttft_slo_ms)
