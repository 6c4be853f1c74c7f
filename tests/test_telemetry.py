from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    StepRecord,
)
from batchpilot.agents.telemetry import TelemetryWindow, WindowBuilder

FACTS = EngineFacts(BatchLimits(8, 64), total_blocks=10, block_size=16)
SNAPSHOT = EngineSnapshot(FACTS, 5.0, running=3, waiting=2, prefill_seqs=1, used_blocks=4)
STEPS = [
    StepRecord(
        seconds=0.25,
        running=2,
        decode_seqs=2,
        prefill_tokens=10,
        kv_tokens=64,
        arrived=(7, 5),
        binding=Binding.KV_CACHE,
    ),
    StepRecord(
        seconds=0.5,
        running=4,
        decode_seqs=3,
        prefill_tokens=0,
        kv_tokens=32,
        preemptions=1,
        recomputed_tokens=7,
        finished=(FinishedRequest(5, 9, True), FinishedRequest(4, 2, False)),
        binding=Binding.MAX_NUM_SEQS,
    ),
]


def window_of(steps, seconds: float = 1.0, slow: float | None = 0.3) -> TelemetryWindow:
    builder = WindowBuilder(slow)
    for step in steps:
        builder.add(step)
    return builder.close(SNAPSHOT, seconds=seconds, limits=BatchLimits(4, 32))


def test_a_window_sums_its_steps():
    assert window_of(STEPS) == TelemetryWindow(
        seconds=1.0,
        steps=2,
        busy_seconds=0.75,
        slowest_step_seconds=0.5,
        decode_tokens=5,
        decode_seconds=2.0,
        slow_decode_tokens=3,
        prefill_tokens=10,
        running_seconds=2.5,
        kv_token_seconds=32.0,
        peak_running=4,
        peak_kv_tokens=64,
        preemptions=1,
        recomputed_tokens=7,
        arrived=2,
        arrived_prompt_tokens=12,
        finished=2,
        finished_output_tokens=11,
        kv_bound_steps=1,
        seqs_bound_steps=1,
        tokens_bound_steps=0,
        running=3,
        waiting=2,
        prefill_seqs=1,
        used_blocks=4,
        limits=BatchLimits(4, 32),
    )


def test_means_and_shares():
    window = window_of(STEPS)
    assert window.mean_step_seconds == 0.375
    assert window.mean_itl_seconds == 0.4
    assert window.mean_running == pytest.approx(2.5 / 0.75)
    assert window.mean_kv_tokens == pytest.approx(32 / 0.75)
    assert window.computed_tokens == 15
    assert window.recomputed_share == pytest.approx(7 / 22)


def test_an_empty_window_has_no_means():
    window = window_of([])
    assert window.mean_step_seconds is None
    assert window.mean_itl_seconds is None
    assert (window.mean_running, window.mean_kv_tokens, window.recomputed_share) == (0, 0, 0)


def test_closing_starts_afresh():
    builder = WindowBuilder()
    builder.add(STEPS[0])
    builder.close(SNAPSHOT, seconds=1, limits=BatchLimits(4, 32))
    assert builder.steps == 0
    assert builder.close(SNAPSHOT, seconds=1, limits=BatchLimits(4, 32)).decode_tokens == 0


def test_without_a_target_no_step_is_slow():
    assert window_of(STEPS, slow=None).slow_decode_tokens == 0


@given(st.lists(st.sampled_from(STEPS), max_size=6), st.lists(st.sampled_from(STEPS), max_size=6))
def test_adding_windows_is_one_window_over_both(first, second):
    joined = window_of(first) + window_of(second)
    whole = window_of([*first, *second], seconds=2.0)
    assert joined.limits == whole.limits
    for name in (item.name for item in fields(TelemetryWindow) if item.name != "limits"):
        assert getattr(joined, name) == pytest.approx(getattr(whole, name))
