from __future__ import annotations

import pytest

from batchpilot.env.bench.measure import Sample
from batchpilot.env.fidelity import (
    MEASURES,
    REAL_RUNS,
    Comparison,
    Outcome,
    compare,
    measured_outcome,
    read_rows,
    timed_requests,
)
from batchpilot.env.fidelity_optimum import measure_limit

BY_NAME = {run.name: run for run in REAL_RUNS}


def test_the_real_runs_are_what_they_were():
    outcome = measured_outcome(BY_NAME["rtx4090"])
    assert outcome.makespan_s == pytest.approx(183.569, abs=1e-3)
    assert outcome.ttft_ms == pytest.approx(65_486.34, abs=0.01)
    assert outcome.tpot_ms == pytest.approx(32.447, abs=1e-3)
    assert measured_outcome(BY_NAME["rtxpro6000"]).peak_kv_usage is None


@pytest.mark.parametrize("run", REAL_RUNS, ids=lambda run: run.name)
def test_the_replay_serves_the_same_work(run):
    rows, timed = read_rows(f"{run.name}-requests"), timed_requests(run)
    assert len(timed) == 300
    assert [len(t.request.prompt_token_ids) for t in timed] == [r["input_tokens"] for r in rows]
    assert [t.request.output_tokens for t in timed] == [r["output_tokens"] for r in rows]
    assert [t.arrival_seconds for t in timed] == [r["arrival_s"] for r in rows]


@pytest.mark.parametrize("run", REAL_RUNS, ids=lambda run: run.name)
def test_the_virtual_gpu_is_as_close_as_it_must_be(run):
    comparison = compare(run)
    assert comparison.too_far() == []
    if run.kv_usage_recorded:
        assert comparison.simulated.peak_kv_usage == pytest.approx(
            comparison.measured.peak_kv_usage, abs=0.02
        )
        assert comparison.simulated.mean_kv_usage == pytest.approx(
            comparison.measured.mean_kv_usage, rel=0.05
        )
        assert comparison.preemptions > 0


def outcome(makespan, kv=None):
    return Outcome(makespan, 100.0, 10.0, 5.0, kv, kv)


def test_errors_are_of_the_measured_value():
    comparison = Comparison("x", outcome(200.0), outcome(170.0, kv=0.5), 0)
    assert comparison.error(MEASURES[0]) == pytest.approx(-0.15)
    assert [measure.field for measure in comparison.too_far()] == ["makespan_s"]
    assert comparison.error(MEASURES[-1]) is None


def test_usage_is_averaged_over_time():
    from batchpilot.agents.limits import BatchLimits
    from batchpilot.env.fidelity import _time_weighted

    limits = BatchLimits(1, 1)
    samples = [Sample(3.0, 1, 0, limits, 1.0, 0), Sample(4.0, 1, 0, limits, 0.0, 0)]
    assert _time_weighted(samples) == 0.75


@pytest.mark.slow
def test_more_sequences_stop_helping_on_a_virtual_h100():
    rates = {limit: measure_limit(limit).tokens_per_s for limit in (128, 256, 512, 768, 1024)}
    assert rates[128] < rates[256] < rates[512]
    assert rates[1024] < max(rates[512], rates[768])
    for limit, real in ((128, 7037), (256, 9010), (512, 9806), (768, 9603)):
        assert rates[limit] == pytest.approx(real, rel=0.1)
