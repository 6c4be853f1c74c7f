from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents import features
from batchpilot.agents.features import FEATURE_NAMES, LatencyTargets, observation
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot
from batchpilot.agents.telemetry import TelemetryWindow, WindowBuilder

FACTS = EngineFacts(BatchLimits(64, 4096), total_blocks=1024, block_size=16)
TARGETS = LatencyTargets(itl_slo_ms=50, ttft_slo_ms=1000)
SNAPSHOT = EngineSnapshot(FACTS, 5.0, running=16, waiting=64, prefill_seqs=4, used_blocks=768)
EMPTY = WindowBuilder().close(SNAPSHOT, seconds=2.0, limits=BatchLimits(8, 64))
WINDOW = replace(
    EMPTY,
    steps=10,
    busy_seconds=1.0,
    slowest_step_seconds=0.1,
    decode_tokens=160,
    decode_seconds=4.0,
    slow_decode_tokens=40,
    prefill_tokens=160,
    running_seconds=32.0,
    peak_kv_tokens=12288,
    preemptions=5,
    recomputed_tokens=80,
    arrived=48,
    arrived_prompt_tokens=48 * 128,
    finished=16,
    finished_output_tokens=16 * 128,
    kv_bound_steps=5,
    seqs_bound_steps=1,
    tokens_bound_steps=0,
)


def test_every_feature_of_a_window():
    assert dict(
        zip(FEATURE_NAMES, observation(WINDOW, FACTS, TARGETS).tolist(), strict=True)
    ) == pytest.approx(
        {
            "max_num_seqs": 0.0,
            "max_num_batched_tokens": 0.0,
            "running": -0.5,
            "mean_running": 0.0,
            "prefilling": -0.5,
            "waiting": 0.0,
            "kv_cache_usage": 0.5,
            "peak_kv_cache_usage": 0.5,
            "busy": 0.0,
            "mean_itl": -0.25,  # half the target
            "slowest_step": 0.25,  # twice the target
            "slow_tokens": -0.5,
            "queue_delay": 0.75,  # 64 wait, 8 leave a second: 8 s
            "step_fill": 0.0,
            "prefill_share": 0.0,
            "recomputed_share": -0.6,
            "preemptions": 2 * 5 / 21 - 1,
            "arrival_balance": 0.5,
            "mean_prompt": 0.0,  # 128 of 16,384 tokens, in logs
            "mean_output": 0.0,
            "kv_bound": 0.0,
            "seqs_bound": -0.8,
            "tokens_bound": -1.0,
            "kv_tokens_per_seq": 0.0,  # 256 of 65,536
            "itl_slo": 2 * np.log(50) / np.log(1000) - 1,
            "ttft_slo": 0.0,
        },
        abs=1e-6,
    )


def test_an_empty_window():
    empty = EngineSnapshot(FACTS, 0.0, running=0, waiting=0)
    window = WindowBuilder().close(empty, seconds=0.0, limits=FACTS.startup_limits)
    seen = dict(
        zip(FEATURE_NAMES, observation(window, FACTS, LatencyTargets()).tolist(), strict=True)
    )
    assert {name for name, value in seen.items() if value != -1.0} == {
        "max_num_seqs",
        "max_num_batched_tokens",
        "arrival_balance",
        "kv_tokens_per_seq",
        "itl_slo",
        "ttft_slo",
    }
    assert (seen["arrival_balance"], seen["itl_slo"], seen["ttft_slo"]) == (0.0, 1.0, 1.0)


_COUNTS = st.integers(0, 10**9)
_SECONDS = st.floats(0, 1e6)


@given(
    st.builds(
        TelemetryWindow,
        **{
            name: _SECONDS if "seconds" in name else _COUNTS
            for name in TelemetryWindow.__dataclass_fields__
            if name != "limits"
        },
        limits=st.builds(BatchLimits, st.integers(1, 10**6), st.integers(1, 10**6)),
    )
)
def test_observations_are_inside_the_space_whatever_happened(window: TelemetryWindow):
    seen = observation(window, FACTS, TARGETS)
    assert seen.shape == (len(FEATURE_NAMES),)
    assert seen.dtype == np.float32
    assert np.all(np.abs(seen) <= 1.0)  # false for NaN too


def test_the_table_lists_every_feature_in_order():
    rows = re.findall(r"^    (\d+) +(\w+) ", features.__doc__ or "", re.MULTILINE)
    assert rows == [(str(i), name) for i, name in enumerate(FEATURE_NAMES)]
