"""How far a learned step time is trusted: with what it has seen, and with more as it sees more."""

import math

import numpy as np
import pytest

from batchpilot.agents.latency_limits import CHECK_STEPS, LARGEST_KNOWN
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, Source, StepRecord
from batchpilot.agents.predictive import PredictiveParameters, PredictivePolicy
from batchpilot.agents.step_time import PromptsAhead, StepTimeEstimator
from batchpilot.agents.trust import TRUSTED_ERROR, Trust, WorkingPoint
from batchpilot.env.profiles import load_profile

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=20_000, block_size=16)
SECONDS = load_profile("llama-3.1-8b-h100").step_time.seconds
CHUNK = 64


def step(rng, decodes, prefill, context=400):
    kv_tokens = int(decodes * context * rng.uniform(0.8, 1.2))
    seconds = SECONDS(decodes, prefill, kv_tokens) * rng.lognormal(sigma=0.03)
    return StepRecord(seconds, decodes, decodes, prefill, kv_tokens)


def learned(most_prefill, steps=1500):
    """An H100's step time, from steps of up to so many prompt tokens."""
    rng = np.random.default_rng(0)
    model = StepTimeEstimator()
    for _ in range(steps):
        prefill = int(rng.integers(0, most_prefill)) if rng.random() < 0.5 else 0
        model.observe(step(rng, int(rng.integers(20, 60)), prefill))
    return model


def known_prefill(model, wanted):
    trust = Trust(model, itl_slo_seconds=0.02, least_chunk=CHUNK)
    now = WorkingPoint(50, 20_000, wanted, PromptsAhead())
    trust.update(now, now._replace(prefill_tokens=CHUNK))
    return trust.known_prefill


def test_a_model_that_has_seen_all_it_would_choose_is_trusted_with_all():
    assert known_prefill(learned(most_prefill=1000), wanted=900) == math.inf


@pytest.mark.parametrize("seen", [150, 300])
def test_one_that_has_seen_only_short_prompts_is_trusted_with_not_many_more(seen):
    model = learned(most_prefill=seen)
    known = known_prefill(model, wanted=2000)
    assert seen / 2 <= known <= 4 * seen
    assert model.relative_error(50, int(known), 20_000) <= TRUSTED_ERROR
    assert model.relative_error(50, 2000, 20_000) > TRUSTED_ERROR


def test_one_that_knows_nothing_is_not_trusted():
    assert known_prefill(StepTimeEstimator(), wanted=900) == 0


def test_a_batch_larger_than_any_seen_is_not_believed_on_top():
    model = learned(most_prefill=150)
    trust = Trust(model, itl_slo_seconds=0.02, least_chunk=CHUNK)
    now = WorkingPoint(50, 20_000, 2000, PromptsAhead())
    model._covariance *= 100.0  # as if far fewer steps had been seen
    trust.update(now, WorkingPoint(2000, 800_000, CHUNK, PromptsAhead()))
    assert trust.known_prefill == 0


def test_prefill_it_does_not_know_is_tried_step_by_step():
    """Long prompts after a day of short ones: the budget grows with what is known of it."""
    rng = np.random.default_rng(1)
    policy = PredictivePolicy(PredictiveParameters(itl_slo_ms=30.0))
    snapshot = EngineSnapshot(FACTS, 0.0, running=50, waiting=0, used_blocks=20_000 // 16)
    budgets = []

    def run(steps, most_prefill):
        for _ in range(steps):
            decision = policy.decide(snapshot)
            budget = decision.limits.max_num_batched_tokens - 50
            policy.observe(step(rng, 50, min(budget, most_prefill)))
            budgets.append(budget)
        return decision

    decision = run(2000, most_prefill=100)
    assert decision.source is Source.PREDICTIVE
    assert decision.reason == LARGEST_KNOWN
    assert 100 <= budgets[-1] < 1000
    run(10 * CHECK_STEPS, most_prefill=10_000)
    assert SECONDS(50, budgets[-1], 20_000) == pytest.approx(0.030, rel=0.1)
