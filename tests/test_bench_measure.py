from __future__ import annotations

import numpy as np
import pytest
from bench_engine import QueueEngine
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.measure import Distribution, RunRecorder, Slo
from batchpilot.env.engine import EngineStep


def record(running=0, kv_tokens=0, preemptions=0, recomputed_tokens=0):
    return StepRecord(
        seconds=0.01,
        running=running,
        decode_seqs=running,
        prefill_tokens=0,
        kv_tokens=kv_tokens,
        preemptions=preemptions,
        recomputed_tokens=recomputed_tokens,
    )


def recorder_at(clock_seconds, slo=None):
    engine = QueueEngine(total_blocks=100, block_size=1)
    engine.clock_seconds = clock_seconds
    return RunRecorder(engine, slo or Slo()), engine


def test_one_request_by_hand():
    recorder, _ = recorder_at(10.0)
    recorder.submitted("a", 0.5, 4)
    recorder.stepped(EngineStep(10.75, {"a": 1}))
    recorder.stepped(EngineStep(11.0, {"a": 1}))
    recorder.stepped(EngineStep(12.0, {"a": 2}, ("a",)))
    result = recorder.result()
    # Arrival is intended at 10.5. Two tokens in one emission are two gaps of half its gap.
    assert result.ttft_ms.tolist() == [250.0]
    assert result.itl_ms.tolist() == [250.0, 500.0, 500.0]
    assert result.tpot_ms.tolist() == [pytest.approx(1250 / 3)]
    assert (result.submitted, result.completed, result.failed) == (1, 1, 0)
    assert (result.duration_s, result.output_tokens) == (2.0, 4)
    assert result.output_tokens_per_s == 2.0
    assert result.goodput_per_s == 0.5
    assert result.slo_attainment is None


def test_a_first_emission_of_several_tokens_has_no_gap():
    recorder, _ = recorder_at(0.0)
    recorder.submitted("a", 0.0, 3)
    recorder.stepped(EngineStep(1.0, {"a": 3}, ("a",)))
    result = recorder.result()
    assert result.itl_ms.tolist() == []
    assert result.ttft_ms.tolist() == [1000.0]
    assert result.tpot_ms.tolist() == [0.0]


@pytest.mark.parametrize(
    ("slo", "inside"),
    [
        (Slo(itl_slo_ms=100.0), 2),
        (Slo(itl_slo_ms=99.0), 1),
        (Slo(ttft_slo_ms=200.0), 1),
        (Slo(ttft_slo_ms=300.0), 2),
        (Slo(itl_slo_ms=99.0, ttft_slo_ms=200.0), 0),
    ],
)
def test_share_inside_targets(slo, inside):
    recorder, _ = recorder_at(0.0, slo)
    recorder.submitted("slow start, one token", 0.0, 1)
    recorder.submitted("fast start, slow tokens", 0.0, 2)
    recorder.submitted("never ends", 0.0, 5)
    recorder.stepped(EngineStep(0.2, {"fast start, slow tokens": 1, "never ends": 1}))
    recorder.stepped(
        EngineStep(
            0.3,
            {"slow start, one token": 1, "fast start, slow tokens": 1},
            ("slow start, one token", "fast start, slow tokens"),
        )
    )
    result = recorder.result()
    assert result.requests_inside_slo == inside
    assert result.slo_attainment == inside / 3
    assert result.goodput_per_s == pytest.approx(inside / 0.3)


def test_a_request_cut_short_failed():
    recorder, _ = recorder_at(0.0)
    recorder.submitted("cut", 0.0, 9)
    recorder.submitted("refused", 0.0, 9)
    recorder.refused("refused")
    recorder.stepped(EngineStep(1.0, {"cut": 1}, ("cut",)))
    result = recorder.result()
    assert (result.submitted, result.completed, result.failed) == (2, 0, 2)
    assert result.duration_s == 0.0
    assert result.output_tokens_per_s == 0.0
    assert recorder.unfinished() == []


def test_the_timeline_weighs_running_by_time_and_counts_idle_as_none():
    recorder, engine = recorder_at(0.0)
    engine.clock_seconds = 1.0
    recorder.idled()
    recorder.submitted("a", 1.0, 5)
    recorder.stepped(EngineStep(1.5, {"a": 1}, record=record(running=4, kv_tokens=50)))
    recorder.stepped(EngineStep(2.0, {"a": 1}, record=record(2, 20, 3, 90)))
    result = recorder.result()
    assert [(s.seconds, s.running) for s in result.timeline] == [(1.0, 0), (1.5, 4), (2.0, 2)]
    assert [s.kv_cache_usage for s in result.timeline] == [0.0, 0.5, 0.2]
    assert [s.preemptions for s in result.timeline] == [0, 0, 3]
    assert result.mean_running == pytest.approx((0 * 1.0 + 4 * 0.5 + 2 * 0.5) / 2.0)
    assert result.peak_running == 4
    assert (result.preemptions, result.recomputed_tokens) == (3, 90)


def test_nothing_served_has_no_statistics():
    recorder, _ = recorder_at(0.0)
    result = recorder.result()
    assert Distribution.of(result.itl_ms) == Distribution(None, None, None, None)
    assert (result.mean_running, result.peak_running) == (0.0, 0)


def test_percentiles_are_linear():
    assert Distribution.of(list(range(101))) == Distribution(50.0, 50.0, 95.0, 99.0)
    assert Distribution.of([1.0, 2.0]).p50 == 1.5


@pytest.mark.parametrize("value", [0, -1, "nan", "inf", "soon"])
@pytest.mark.parametrize("name", ["itl_slo_ms", "ttft_slo_ms"])
def test_bad_targets_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Slo(**{name: value})


@given(
    st.lists(
        st.tuples(st.floats(0.001, 5.0), st.integers(1, 4)),
        min_size=2,
        max_size=40,
    )
)
def test_gaps_add_up_to_the_time_from_first_to_last_token(emissions):
    recorder, _ = recorder_at(0.0)
    total = sum(count for _, count in emissions)
    recorder.submitted("a", 0.0, total)
    clock = 0.0
    for gap, count in emissions:
        clock += gap
        recorder.stepped(EngineStep(clock, {"a": count}))
    recorder.stepped(EngineStep(clock, {}, ("a",)))
    result = recorder.result()
    assert len(result.itl_ms) == total - emissions[0][1]
    assert np.sum(result.itl_ms) == pytest.approx((clock - emissions[0][0]) * 1e3)
    assert result.tpot_ms[0] == pytest.approx(np.sum(result.itl_ms) / (total - 1))
    assert result.output_tokens == total
