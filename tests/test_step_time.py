"""The learned step time: what it recovers, what does not move it, and what it says of itself."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.limits import StepRecord
from batchpilot.agents.step_time import (
    PromptsAhead,
    StepTimeEstimator,
    StepTimeForm,
    nonnegative_least_squares,
)
from batchpilot.env.profiles import load_profile

H100 = load_profile("llama-3.1-8b-h100").step_time.seconds
PROFILES = ("llama-3.1-8b-rtx4090", "llama-3.1-8b-h100", "llama-3.1-70b-h200-tp4")


def load(rng):
    """A step's content: decodes, prompt tokens, KV tokens."""
    decode_seqs = rng.randrange(0, 128)
    prefill_tokens = rng.choice([0, 0, rng.randrange(1, 512), rng.randrange(512, 2048)])
    return max(decode_seqs, 1), prefill_tokens, decode_seqs * rng.randrange(200, 1500)


def record(content, seconds, **more):
    decode_seqs, prefill_tokens, kv_tokens = content
    return StepRecord(seconds, decode_seqs, decode_seqs, prefill_tokens, kv_tokens, **more)


def taught(seconds=H100, steps=400, noise=0.0, seed=0):
    rng = random.Random(seed)
    model = StepTimeEstimator()
    for _ in range(steps):
        content = load(rng)
        model.observe(record(content, seconds(*content) * (1 + noise * rng.gauss(0, 1))))
    return model


def errors(model, seconds=H100, seed=1):
    rng = random.Random(seed)
    contents = [load(rng) for _ in range(200)]
    return [abs(model.predict(*content) / seconds(*content) - 1) for content in contents]


@pytest.mark.parametrize("profile", PROFILES)
def test_400_steps_teach_it_a_gpu_to_within_two_per_cent(profile):
    seconds = load_profile(profile).step_time.seconds
    assert np.mean(errors(taught(seconds), seconds)) < 0.01
    assert np.quantile(errors(taught(seconds), seconds), 0.95) < 0.03


@pytest.mark.parametrize("profile", PROFILES)
def test_noise_of_five_per_cent_costs_it_little(profile):
    seconds = load_profile(profile).step_time.seconds
    model = taught(seconds, noise=0.05, steps=800)
    assert np.mean(errors(model, seconds)) < 0.03
    assert 0.03 < model.noise < 0.08


def test_a_straight_line_is_recovered_coefficient_by_coefficient():
    model = taught(lambda d, p, k: 0.005 + 4e-5 * d + 5e-8 * k + 2e-5 * (d + p))
    base, per_decode, per_kv, mixed, squared, per_token, *bends = model.weights
    assert base == pytest.approx(0.005, rel=0.01)
    assert per_kv == pytest.approx(5e-8, rel=0.02)
    # A decode and its token always come together; only their sum shows.
    assert per_decode + per_token == pytest.approx(6e-5, rel=0.02)
    assert sum((per_token, *bends)) == pytest.approx(2e-5, rel=0.02)
    assert mixed == pytest.approx(0, abs=1e-9)
    assert squared == pytest.approx(0, abs=1e-10)


def test_pauses_and_spikes_do_not_move_it():
    calm, shaken = StepTimeEstimator(), StepTimeEstimator()
    rng = random.Random(0)
    for step in range(600):
        content = load(rng)
        pause = 20.0 if step % 50 == 49 else 1.0
        calm.observe(record(content, H100(*content)))
        shaken.observe(record(content, pause * H100(*content)))
    assert np.mean(errors(shaken)) < np.mean(errors(calm)) + 0.02


@pytest.mark.parametrize("seed", range(5))
def test_prompts_far_longer_than_any_before_are_learned_not_clipped(seed):
    """As prefill starts slowly on an idle GPU: each chunk twice the last while the target holds."""
    seconds = load_profile("llama-3.1-70b-h100-tp4").step_time.seconds
    rng, model = random.Random(seed), StepTimeEstimator()
    contents = [(2, 0, 1400)] * 36
    contents += [(2, chunk, 3000) for chunk in (128, 128, 256, 512, 1024, 2046, 243)]
    contents += [(5, chunk, 12_000) for chunk in (512, 512, 1024, 2044, 1024, 512, 256, 512, 1024)]
    contents += [(7, chunk, 20_000) for chunk in (2042, 1024, 512, 256, 512, 1024, 2042, 1024, 512)]
    contents += [(10, 0, 24_000)] * 6 + [(10, chunk, 25_000) for chunk in (2038, 2038, 68)]
    contents += [(12, 0, 28_000)] * 50
    contents += [(15 + i // 10, rng.randrange(400, 560), 34_000 + 340 * i) for i in range(80)]
    for content in contents:
        model.observe(record(content, seconds(*content) * (1 + 0.05 * rng.gauss(0, 1))))
    for content in ((23, 0, 61_000), (23, 545, 61_000), (24, 2024, 62_000), (46, 64, 124_000)):
        assert model.predict(*content) == pytest.approx(seconds(*content), rel=0.15)


def test_a_cost_that_changes_its_shape_is_learned_anew():
    """Prompt tokens become three times as dear, decodes stay: no factor on the whole fits that."""
    model, rng = taught(noise=0.03), random.Random(2)

    def dearer(decode_seqs, prefill_tokens, kv_tokens):
        return H100(decode_seqs, prefill_tokens, kv_tokens) + 3.5e-5 * prefill_tokens

    for _ in range(1500):
        content = load(rng)
        model.observe(record(content, dearer(*content) * (1 + 0.03 * rng.gauss(0, 1))))
    assert np.mean(errors(model, dearer)) < 0.1


@pytest.mark.parametrize("place", range(4))
def test_a_step_that_came_too_soon_among_the_first_does_not_count_for_hundreds(place):
    """Its result was ready when an engine that had paused asked for it."""
    rng = random.Random(0)
    model = StepTimeEstimator()
    for index in range(300):
        content = load(rng)
        model.observe(record(content, H100(*content) * (0.05 if index == place else 1.0)))
    assert np.quantile(errors(model), 0.95) < 0.05


def test_irregular_and_empty_steps_are_not_looked_at():
    model = taught(steps=64)
    before = model.weights, model.steps, model.speed
    for _ in range(50):
        model.observe(record((10, 0, 5000), 3.0, regular=False))
        model.observe(record((0, 0, 0), 3.0))
        model.observe(record((10, 0, 5000), 0.0))
    assert (model.weights, model.steps, model.speed) == before


def test_a_gpu_that_slows_by_half_is_followed_within_sixteen_steps():
    model = taught(steps=800)
    rng = random.Random(5)
    for _ in range(16):
        content = load(rng)
        model.observe(record(content, 1.5 * H100(*content)))
    assert model.speed == pytest.approx(1.5, abs=0.03)
    # Also for steps unlike those it has seen since.
    assert model.predict(100, 1500, 80_000) == pytest.approx(
        1.5 * H100(100, 1500, 80_000), rel=0.05
    )


def test_what_is_not_excited_keeps_its_value_and_grows_uncertain():
    model = taught(steps=400)
    known, before = model.predict(60, 1024, 40_000), model.relative_error(60, 1024, 40_000)
    stated = []
    for _ in range(5):
        for _ in range(1000):
            model.observe(record((60, 0, 40_000), H100(60, 0, 40_000)))
        stated.append(model.relative_error(60, 1024, 40_000))
    assert model.predict(60, 1024, 40_000) == pytest.approx(known, rel=0.05)
    assert before < stated[0]
    assert stated == sorted(stated)
    assert stated[-1] > 5 * before


def test_before_it_has_seen_anything_its_error_is_infinite():
    model = StepTimeEstimator()
    assert not model.has_weights
    assert model.relative_error(1, 0, 100) == float("inf")
    assert model.predict(1, 0, 100) == 0


def test_a_profile_warms_it_up():
    rng = random.Random(0)
    contents = [load(rng) for _ in range(200)]
    model = StepTimeEstimator()
    model.warm_start([record(content, H100(*content)) for content in contents])
    assert np.mean(errors(model)) < 0.02
    # It is believed for what is not seen, and overruled by what is.
    for _ in range(300):
        content = load(rng)
        model.observe(record(content, 1.3 * H100(*content)))
    assert np.mean(errors(model, lambda d, p, k: 1.3 * H100(d, p, k))) < 0.03


def prompts_ahead(computed, left, length, cached_share):
    return PromptsAhead(computed, left, length, cached_share * length if length < math.inf else 0.0)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 20),
    decode_seqs=st.integers(0, 256),
    context=st.integers(1, 4000),
    seconds=st.floats(0.001, 0.2),
    prompts=st.builds(
        prompts_ahead,
        computed=st.integers(0, 30_000),
        left=st.integers(0, 3000),
        length=st.floats(1, 3000) | st.just(math.inf),
        cached_share=st.floats(0, 0.99),
    ),
)
def test_the_largest_prefill_fits_and_one_token_more_does_not(
    seed, decode_seqs, context, seconds, prompts
):
    model = taught(seed=seed, steps=96, noise=0.02)
    kv_tokens = decode_seqs * context
    largest = model.largest_prefill(decode_seqs, kv_tokens, seconds, prompts)
    assert largest >= 0
    if largest:
        assert model.predict(decode_seqs, largest, kv_tokens, prompts) <= seconds * (1 + 1e-9)
    if largest < 2**20:
        assert model.predict(decode_seqs, largest + 1, kv_tokens, prompts) > seconds * (1 - 1e-9)


def test_prompts_ahead_count_what_their_tokens_attend_to():
    rest_of_one = PromptsAhead(computed=1000, left=300, length=200)
    assert rest_of_one.squares(100) == 1100**2 - 1000**2
    assert rest_of_one.squares(300) == 1300**2 - 1000**2
    assert rest_of_one.squares(500) == 1300**2 - 1000**2 + 200**2
    assert rest_of_one.squares(900) == 1300**2 - 1000**2 + 3 * 200**2
    assert PromptsAhead().squares(500) == 500**2


def test_prompts_ahead_begin_where_the_prefix_cache_ends():
    two_of_a_chat = PromptsAhead(length=200, cached=150)
    assert two_of_a_chat.squares(20) == 170**2 - 150**2
    assert two_of_a_chat.squares(50) == 200**2 - 150**2
    assert two_of_a_chat.squares(100) == 2 * (200**2 - 150**2)


def test_later_chunks_of_a_long_prompt_are_smaller_once_their_cost_is_known():
    model, rng = StepTimeEstimator(), random.Random(0)
    for _ in range(400):
        content = load(rng)
        squares = content[1] * (content[1] + 2 * rng.randrange(8000))
        model.observe(record(content, H100(*content, squares), prefill_squares=squares))
    chunks = [
        model.largest_prefill(32, 16_000, 0.03, PromptsAhead(computed, 9000))
        for computed in (0, 2000, 8000)
    ]
    assert chunks[0] > chunks[1] > chunks[2] > 0
    late = PromptsAhead(computed=8000, left=9000)
    measured = H100(32, 512, 16_000, 512 * (512 + 2 * 8000))
    assert model.predict(32, 512, 16_000, late) == pytest.approx(measured, rel=0.05)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 20),
    noise=st.sampled_from([0.0, 0.05, 0.3]),
    content=st.tuples(st.integers(0, 256), st.integers(0, 4096), st.integers(0, 400_000)),
    more=st.tuples(st.integers(0, 50), st.integers(0, 500), st.integers(0, 50_000)),
)
def test_more_work_never_takes_less_time(seed, noise, content, more):
    model = taught(seed=seed, steps=64, noise=noise)
    heavier = tuple(a + b for a, b in zip(content, more, strict=True))
    assert 0 < model.predict(*content) <= model.predict(*heavier) * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_no_direction_improves_the_nonnegative_solution(seed, size):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * size, size))
    information, moment = x.T @ x + 0.01 * np.eye(size), rng.normal(size=size) * 5
    allowed = np.ones(size, dtype=bool)
    start = rng.random(size) < 0.5
    weights = nonnegative_least_squares(information, moment, start, allowed)
    slope = information @ weights - moment
    assert (weights >= 0).all()
    assert (slope[weights == 0] > -1e-6).all()
    assert slope[weights > 0] == pytest.approx(0, abs=1e-6)


def test_a_form_without_a_term_leaves_it_at_zero():
    model = StepTimeEstimator(StepTimeForm((0,), mixed_kv=False, prefill_squared=False))
    rng = random.Random(0)
    for _ in range(100):
        content = load(rng)
        model.observe(record(content, H100(*content)))
    assert model.weights[3:5] == (0, 0)
