"""Between the wire and the vocabulary: protocol buffers to the values that policies know, and back.

Messages reach this file after `validation` has passed them.
"""

from __future__ import annotations

from typing import NamedTuple

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.kv_growth import EVERY_TOKEN, KvGrowth
from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    EngineFacts,
    FinishedRequest,
    SequenceState,
    StepRecord,
)
from batchpilot.agents.telemetry import TelemetryWindow
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb

BINDINGS: tuple[Binding, ...] = (
    Binding.NONE,
    Binding.NONE,
    Binding.KV_CACHE,
    Binding.MAX_NUM_SEQS,
    Binding.TOKEN_BUDGET,
)


class EngineKey(NamedTuple):
    """Which engine: one data-parallel rank of one server of one group."""

    group: str
    engine: str
    rank: int

    def __str__(self) -> str:
        """As logs and errors name it."""
        return f"{self.group}/{self.engine}/{self.rank}"


def engine_key(message: pb.EngineId) -> EngineKey:
    """The key of an id."""
    return EngineKey(message.group, message.engine, message.data_parallel_rank)


def engine_id(key: EngineKey) -> pb.EngineId:
    """The id of a key."""
    return pb.EngineId(group=key.group, engine=key.engine, data_parallel_rank=key.rank)


def batch_limits(message: pb.BatchLimits) -> BatchLimits:
    """Limits from the wire."""
    return BatchLimits(message.max_num_seqs, message.max_num_batched_tokens)


def engine_facts(message: pb.EngineFacts) -> EngineFacts:
    """Facts from the wire."""
    return EngineFacts(
        startup_limits=batch_limits(message.startup_limits),
        total_blocks=message.total_blocks,
        block_size=message.block_size,
        tokens_per_decode=message.tokens_per_decode,
        unchunked_prefill_tokens=message.unchunked_prefill_tokens,
        kv_growth=(
            KvGrowth(message.kv_growth_share, message.kv_window_tokens)
            if message.HasField("kv_growth_share")
            else EVERY_TOKEN
        ),
    )


def latency_targets(message: pb.EngineHello) -> LatencyTargets:
    """The targets an engine has stated."""
    return LatencyTargets(
        message.itl_slo_ms if message.HasField("itl_slo_ms") else None,
        message.ttft_slo_ms if message.HasField("ttft_slo_ms") else None,
    )


def telemetry_window(message: pb.TelemetryWindow) -> TelemetryWindow:
    """A window from the wire; the fields bear the same names on both sides."""
    return TelemetryWindow(
        seconds=message.seconds,
        steps=message.steps,
        busy_seconds=message.busy_seconds,
        slowest_step_seconds=message.slowest_step_seconds,
        decode_tokens=message.decode_tokens,
        decode_seconds=message.decode_seconds,
        slow_decode_tokens=message.slow_decode_tokens,
        prefill_tokens=message.prefill_tokens,
        running_seconds=message.running_seconds,
        kv_token_seconds=message.kv_token_seconds,
        peak_running=message.peak_running,
        peak_kv_tokens=message.peak_kv_tokens,
        preemptions=message.preemptions,
        recomputed_tokens=message.recomputed_tokens,
        arrived=message.arrived,
        arrived_prompt_tokens=message.arrived_prompt_tokens,
        finished=message.finished,
        finished_output_tokens=message.finished_output_tokens,
        kv_bound_steps=message.kv_bound_steps,
        seqs_bound_steps=message.seqs_bound_steps,
        tokens_bound_steps=message.tokens_bound_steps,
        running=message.running,
        waiting=message.waiting,
        prefill_seqs=message.prefill_seqs,
        used_blocks=message.used_blocks,
        limits=batch_limits(message.limits),
    )


def step_record(message: pb.StepRecord) -> StepRecord:
    """A step from the wire."""
    return StepRecord(
        seconds=message.seconds,
        running=message.running,
        decode_seqs=message.decode_seqs,
        prefill_tokens=message.prefill_tokens,
        kv_tokens=message.kv_tokens,
        preemptions=message.preemptions,
        recomputed_tokens=message.recomputed_tokens,
        finished=tuple(
            FinishedRequest(f.prompt_tokens, f.output_tokens, f.completed) for f in message.finished
        ),
        arrived=tuple(message.arrived_prompt_tokens),
        binding=BINDINGS[message.binding],
        regular=message.regular,
        prefill_squares=message.prefill_squares,
        cached_tokens=message.cached_tokens,
    )


def sequences(message: pb.SequenceColumns) -> tuple[SequenceState, ...]:
    """Sequences from their columns."""
    return tuple(
        map(
            SequenceState,
            message.kv_tokens,
            message.output_tokens,
            message.prefill_tokens_left,
        )
    )
