"""Between batchpilot's vocabulary and the wire's, as the engine speaks it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    EngineFacts,
    SequenceState,
    StepRecord,
)
from batchpilot.agents.remote import LeaseOffer
from batchpilot.agents.telemetry import TelemetryWindow, WindowBuilder
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
from batchpilot.scheduler_hook.remote import EngineReport

#: Steps that a detailed report tells one by one, the newest ones.
MOST_DETAILED_STEPS = 512

BINDINGS = {
    Binding.NONE: wire.BINDING_NONE,
    Binding.KV_CACHE: wire.BINDING_KV_CACHE,
    Binding.MAX_NUM_SEQS: wire.BINDING_MAX_NUM_SEQS,
    Binding.TOKEN_BUDGET: wire.BINDING_TOKEN_BUDGET,
}


class ReportFacts(NamedTuple):
    """What a report tells of its stream.

    Attributes:
        sequence: Its number in the session.
        dropped_reports: Reports that were dropped since the last.
        lease_remaining_seconds: How much longer the lease in force runs; None without one.
        itl_slo_seconds: Steps longer than this are slow; None: none is.
    """

    sequence: int
    dropped_reports: int
    lease_remaining_seconds: float | None
    itl_slo_seconds: float | None


def joined(reports: Sequence[EngineReport]) -> EngineReport:
    """Reports that waited together, as one: sums of what is summed, the newest of the rest."""
    clamps: Counter[str] = Counter()
    for report in reports:
        clamps.update(report.clamps)
    return reports[-1]._replace(
        steps=tuple(step for report in reports for step in report.steps),
        seconds=sum(report.seconds for report in reports),
        clamps=clamps,
    )


def report_message(report: EngineReport, facts: ReportFacts) -> wire.Report:
    """The report as it is sent."""
    remaining = facts.lease_remaining_seconds
    message = wire.Report(
        sequence=facts.sequence,
        window=window_message(_window(report, facts.itl_slo_seconds)),
        source=report.source,
        binding=BINDINGS[report.snapshot.binding],
        clamps=report.clamps,
        dropped_reports=facts.dropped_reports,
        lease_remaining_ms=None if remaining is None else round(1e3 * remaining),
        local_limits=limits_message(report.local_limits),
        tokens_per_decode=report.snapshot.tokens_per_decode,
        outside_blocks=report.snapshot.outside_blocks,
    )
    if report.running is not None:
        message.steps.extend(map(step_message, report.steps[-MOST_DETAILED_STEPS:]))
        message.running.CopyFrom(_columns(report.running))
        message.waiting.CopyFrom(_columns(report.waiting or ()))
    return message


def limits_message(limits: BatchLimits) -> wire.BatchLimits:
    """Both limits."""
    return wire.BatchLimits(
        max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens
    )


def facts_message(facts: EngineFacts) -> wire.EngineFacts:
    """What does not change while an engine runs."""
    return wire.EngineFacts(
        startup_limits=limits_message(facts.startup_limits),
        total_blocks=facts.total_blocks,
        block_size=facts.block_size,
        tokens_per_decode=facts.tokens_per_decode,
        unchunked_prefill_tokens=facts.unchunked_prefill_tokens,
        kv_growth_share=facts.kv_growth.share,
        kv_window_tokens=facts.kv_growth.window_tokens,
    )


def window_message(window: TelemetryWindow) -> wire.TelemetryWindow:
    """A window; the wire's fields have the vocabulary's names."""
    message = wire.TelemetryWindow(
        **{name: getattr(window, name) for name in _WINDOW_FIELDS if name != "limits"}
    )
    message.limits.CopyFrom(limits_message(window.limits))
    return message


def step_message(step: StepRecord) -> wire.StepRecord:
    """One step."""
    return wire.StepRecord(
        seconds=step.seconds,
        running=step.running,
        decode_seqs=step.decode_seqs,
        prefill_tokens=step.prefill_tokens,
        kv_tokens=step.kv_tokens,
        preemptions=step.preemptions,
        recomputed_tokens=step.recomputed_tokens,
        finished=[wire.FinishedRequest(**request._asdict()) for request in step.finished],
        arrived_prompt_tokens=step.arrived,
        binding=BINDINGS[step.binding],
        regular=step.regular,
        prefill_squares=step.prefill_squares,
        cached_tokens=step.cached_tokens,
    )


def itl_target_ms(message: wire.Welcome) -> float | None:
    """The target in force; None where a service names none, or none that can be meant."""
    target = message.itl_slo_ms  # 0 where it is absent
    return target if 0 < target < math.inf else None  # false for NaN too


def lease_offer(message: wire.LimitsLease) -> LeaseOffer:
    """What an answer says; nothing of it is believed yet."""
    limits = None
    if message.HasField("limits"):
        limits = BatchLimits(message.limits.max_num_seqs, message.limits.max_num_batched_tokens)
    return LeaseOffer(
        sequence=message.sequence,
        limits=limits,
        lease_seconds=message.lease_ms / 1e3,
        reason=": ".join(filter(None, (message.policy, message.reason))),
    )


_WINDOW_FIELDS = tuple(field.name for field in wire.TelemetryWindow.DESCRIPTOR.fields)


def _window(report: EngineReport, itl_slo_seconds: float | None) -> TelemetryWindow:
    builder = WindowBuilder(itl_slo_seconds)
    for step in report.steps:
        builder.add(step)
    return builder.close(report.snapshot, seconds=max(0.0, report.seconds), limits=report.limits)


def _columns(sequences: Sequence[SequenceState]) -> wire.SequenceColumns:
    return wire.SequenceColumns(
        kv_tokens=[sequence.kv_tokens for sequence in sequences],
        output_tokens=[sequence.output_tokens for sequence in sequences],
        prefill_tokens_left=[sequence.prefill_tokens_left for sequence in sequences],
    )
