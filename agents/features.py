"""What an agent sees: one window of telemetry as a vector in [-1, 1].

The one place that makes observations: environment, hook and service all call `observation`, so
that an agent sees in service what it saw in training. A trained policy records
`FEATURES_VERSION`; any change of a feature, of their order or of their scale is a new version.

Shares are stretched to [-1, 1] by 2x - 1. Times are compared with their target as
log2(time / target) / 4, cut at -1 and 1: 0 is on target, 0.25 twice too slow; nothing measured is
-1, and without a target the reference below stands in. Other amounts are placed between two ends
on a log scale, -1 at the low end.

    index  name                      from (before scaling)
    0      max_num_seqs              limit in force, from 1 to the start-up value, log
    1      max_num_batched_tokens    limit in force, from 1 to the start-up value, log
    2      running                   sequences in RUNNING / start-up max_num_seqs, share
    3      mean_running              the same, averaged over the window
    4      prefilling                sequences still in their prompt / RUNNING, share
    5      waiting                   w / (w + start-up max_num_seqs), share
    6      kv_cache_usage            used / total KV blocks at the end, share
    7      peak_kv_cache_usage       most KV tokens held / capacity, share
    8      busy                      time in steps / time, share
    9      mean_itl                  mean inter-token latency, against the ITL target
    10     slowest_step              longest step, against the ITL target
    11     slow_tokens               decoded tokens whose step broke the ITL target, share
    12     queue_delay               waiting / requests finished per second, against the TTFT target
    13     step_fill                 tokens computed / (steps x max_num_batched_tokens), share
    14     prefill_share             prompt tokens / tokens computed, share
    15     recomputed_share          tokens preemption threw away / (those + computed), share
    16     preemptions               preempted / (preempted + finished), share
    17     arrival_balance           arrived / (arrived + finished), share; 0 where neither is
    18     mean_prompt               tokens of an arrived prompt, 1 to KV capacity, log
    19     mean_output               tokens of a finished output, 1 to KV capacity, log
    20     kv_bound                  steps that KV blocks bound, share
    21     seqs_bound                steps that max_num_seqs bound, share
    22     tokens_bound              steps that max_num_batched_tokens bound, share
    23     kv_tokens_per_seq         KV capacity / start-up max_num_seqs, 1 to 65,536 tokens, log
    24     itl_slo                   ITL target, 1 to 1,000 ms, log; 1 without one
    25     ttft_slo                  TTFT target, 10 to 100,000 ms, log; 1 without one
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchpilot.agents.actions import log_position
from batchpilot.agents.limits import EngineFacts
from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.agents.telemetry import TelemetryWindow

FEATURES_VERSION = 1
FEATURE_NAMES = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "running",
    "mean_running",
    "prefilling",
    "waiting",
    "kv_cache_usage",
    "peak_kv_cache_usage",
    "busy",
    "mean_itl",
    "slowest_step",
    "slow_tokens",
    "queue_delay",
    "step_fill",
    "prefill_share",
    "recomputed_share",
    "preemptions",
    "arrival_balance",
    "mean_prompt",
    "mean_output",
    "kv_bound",
    "seqs_bound",
    "tokens_bound",
    "kv_tokens_per_seq",
    "itl_slo",
    "ttft_slo",
)
#: Stand in for a target that is not set, in seconds.
REFERENCE_ITL_SECONDS = 0.05
REFERENCE_TTFT_SECONDS = 1.0


@dataclass(frozen=True)
class LatencyTargets(Parameters):
    """The latency targets that observation and reward are about."""

    itl_slo_ms: float | None = parameter(None, above=0, help="target for inter-token latency")
    ttft_slo_ms: float | None = parameter(None, above=0, help="target for time to first token")

    @property
    def itl_slo_seconds(self) -> float | None:
        """The inter-token target in seconds."""
        return None if self.itl_slo_ms is None else self.itl_slo_ms / 1e3

    @property
    def ttft_slo_seconds(self) -> float | None:
        """The first-token target in seconds."""
        return None if self.ttft_slo_ms is None else self.ttft_slo_ms / 1e3


def observation(
    window: TelemetryWindow, engine: EngineFacts, targets: LatencyTargets
) -> npt.NDArray[np.float32]:
    """Turns a window into what an agent sees; the module's table says how.

    Args:
        window: What happened.
        engine: Where.
        targets: The latency targets.

    Returns:
        Shape (26,), each in [-1, 1], in the order of `FEATURE_NAMES`.
    """
    values = (
        *_state_features(window, engine),
        *_latency_features(window, targets),
        *_work_features(window, engine),
        *_constant_features(engine, targets),
    )
    return np.array(values, dtype=np.float32)


def _state_features(window: TelemetryWindow, engine: EngineFacts) -> tuple[float, ...]:
    """Features 0 to 8."""
    startup, limits = engine.startup_limits, window.limits
    return (
        log_position(limits.max_num_seqs, 1, startup.max_num_seqs),
        log_position(limits.max_num_batched_tokens, 1, startup.max_num_batched_tokens),
        _share(window.running, startup.max_num_seqs),
        _share(window.mean_running, startup.max_num_seqs),
        _share(window.prefill_seqs, window.running),
        _share(window.waiting, window.waiting + startup.max_num_seqs),
        _share(window.used_blocks, engine.total_blocks),
        _share(window.peak_kv_tokens, engine.kv_capacity_tokens),
        _share(window.busy_seconds, window.seconds),
    )


def _latency_features(window: TelemetryWindow, targets: LatencyTargets) -> tuple[float, ...]:
    """Features 9 to 12."""
    itl_seconds = targets.itl_slo_seconds or REFERENCE_ITL_SECONDS
    return (
        _against(window.mean_itl_seconds, itl_seconds),
        _against(window.slowest_step_seconds, itl_seconds),
        _share(window.slow_decode_tokens, window.decode_tokens),
        _against(_queue_seconds(window), targets.ttft_slo_seconds or REFERENCE_TTFT_SECONDS),
    )


def _work_features(window: TelemetryWindow, engine: EngineFacts) -> tuple[float, ...]:
    """Features 13 to 22."""
    budget = window.steps * window.limits.max_num_batched_tokens
    flow = window.arrived + window.finished
    return (
        _share(window.computed_tokens, budget),
        _share(window.prefill_tokens, window.computed_tokens),
        _share(window.recomputed_share, 1),
        _share(window.preemptions, window.preemptions + window.finished),
        _share(window.arrived, flow) if flow else 0.0,
        _mean_length(window.arrived_prompt_tokens, window.arrived, engine),
        _mean_length(window.finished_output_tokens, window.finished, engine),
        _share(window.kv_bound_steps, window.steps),
        _share(window.seqs_bound_steps, window.steps),
        _share(window.tokens_bound_steps, window.steps),
    )


def _constant_features(engine: EngineFacts, targets: LatencyTargets) -> tuple[float, ...]:
    """Features 23 to 25: what tells engines and targets apart."""
    per_seq = engine.kv_capacity_tokens / engine.startup_limits.max_num_seqs
    return (
        log_position(per_seq, 1, 65_536),
        log_position(targets.itl_slo_ms or math.inf, 1, 1_000),
        log_position(targets.ttft_slo_ms or math.inf, 10, 100_000),
    )


def _share(part: float, whole: float) -> float:
    """A share of 0 to 1 as -1 to 1; a share of nothing is none."""
    if whole <= 0:
        return -1.0
    return min(max(2.0 * part / whole - 1.0, -1.0), 1.0)


def _against(seconds: float | None, target_seconds: float) -> float:
    """A time against its target."""
    if not seconds:
        return -1.0
    return min(max(math.log2(seconds / target_seconds) / 4.0, -1.0), 1.0)


def _queue_seconds(window: TelemetryWindow) -> float | None:
    """How long the queue would take at the window's pace, by Little's law; None where it is empty.

    A window in which nothing finished says only that it takes longer than the window.
    """
    if window.waiting == 0:
        return None
    return window.waiting * window.seconds / max(window.finished, 1)


def _mean_length(tokens: int, requests: int, engine: EngineFacts) -> float:
    mean = tokens / requests if requests else 0.0
    return log_position(mean, 1, engine.kv_capacity_tokens)
