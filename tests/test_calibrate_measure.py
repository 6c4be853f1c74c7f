"""Measuring, on an engine whose step times are known: what was put in must come out."""

from dataclasses import replace

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.runner import EngineStalledError
from batchpilot.env.calibrate.fit import StepSample, fit_step_times
from batchpilot.env.calibrate.measure import FULL_GRID, QUICK_GRID, cells, measure, noise
from batchpilot.env.engine import EngineStep
from batchpilot.env.profiles import load_profile
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig

PROFILE = load_profile("llama-3.1-8b-rtxpro6000")


def virtual(**config):
    settings = {"profile": PROFILE, "max_num_seqs": 128, "enable_prefix_caching": False}
    return VirtualEngine(VirtualEngineConfig(**{**settings, **config}))


def run(engine, grid=FULL_GRID, progress=lambda *part: None):
    return measure(
        engine,
        grid,
        max_model_len=engine.max_model_len,
        vocab_size=1000,
        seed=0,
        progress=progress,
    )


def kinds(measured):
    return {(c.sample.decode_seqs > 0, c.sample.prefill_tokens > 0) for c in measured}


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_the_profile_of_a_virtual_gpu_comes_back(async_scheduling):
    with virtual(async_scheduling=async_scheduling) as engine:
        measured = run(engine)
        assert not engine.has_unfinished_requests()
    assert kinds(measured) == {(True, False), (False, True), (True, True)}
    assert noise(measured) < 0.001
    fit = fit_step_times([cell.sample for cell in measured])
    assert fit.error.p90_relative < 0.002
    truth, found = PROFILE.step_time, fit.model
    for name in ("floor_ms", "linear_base_ms", "token_ms", "kv_token_ms", "prefill_squared_ms"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.05)
    assert found.decode_seq_ms == pytest.approx(
        truth.decode_seq_ms + truth.overhead_decode_seq_ms, rel=0.05
    )


def test_noise_is_measured_and_does_not_get_in_the_way():
    with virtual(noise=0.04, seed=3) as engine:
        measured = run(engine)
    assert noise(measured) == pytest.approx(0.04, abs=0.015)
    model = fit_step_times([cell.sample for cell in measured]).model
    for batch in ((1, 0, 64), (64, 0, 64 * 200), (32, 512, 32 * 200)):
        assert model.seconds(*batch) == pytest.approx(PROFILE.step_time.seconds(*batch), rel=0.05)


def test_batches_stay_inside_a_small_engine():
    with virtual(max_num_seqs=16, max_num_batched_tokens=300, kv_blocks=80) as engine:
        measured = run(engine)
        facts = engine.facts
    assert max(cell.sample.decode_seqs for cell in measured) == 8
    for cell in measured:
        sample = cell.sample
        assert sample.decode_seqs + sample.prefill_tokens <= 300
        assert sample.kv_tokens + sample.prefill_tokens <= facts.kv_capacity_tokens


def test_each_part_is_told_before_it_runs():
    told = []
    with virtual() as engine:
        run(engine, QUICK_GRID, lambda *part: told.append(part))
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert {total for _, _, total in told} == {len(told) - 1}
    assert told[0][0] == "prefill, 1 x 128 tokens"
    assert told[-1][0] == "done"


def test_an_engine_too_small_for_any_batch():
    grid = replace(QUICK_GRID, contexts=(512,))
    with (
        virtual(max_num_seqs=4, kv_blocks=33) as engine,
        pytest.raises(ConfigError, match="too small to calibrate: no batch of 512-token prompts"),
    ):
        run(engine, grid)


def test_an_engine_that_stands_still():
    with virtual() as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", lambda: EngineStep(0.0))
        with pytest.raises(EngineStalledError, match="gave no token in 1000 steps"):
            run(engine)


def test_cells_are_medians_of_equal_steps_in_a_row():
    steps = [StepSample(s, 4, 0, k, 0) for s, k in ((1.0, 40), (9.0, 44), (2.0, 48))]
    first, second, third = cells([*steps, StepSample(5.0, 4, 7, 52, 49), steps[0]])
    assert first.sample == StepSample(2.0, 4, 0, 44, 0)
    assert first.steps == 3
    assert first.spread == pytest.approx(1.4826 / 2)
    assert (second.sample, second.steps, second.spread) == (StepSample(5.0, 4, 7, 52, 49), 1, None)
    assert third.sample == steps[0]
    assert noise([first, second, third]) == pytest.approx(0.7413)
    assert noise([second]) == 0.0
