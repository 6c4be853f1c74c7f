"""The fit: known coefficients come back, outliers do not bend it."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.calibrate.fit import (
    StepSample,
    fit_error,
    fit_step_times,
    nonnegative_least_squares,
)
from batchpilot.env.profiles import load_profile

TRUTH = load_profile("llama-3.1-8b-rtx4090").step_time
TOLD = ("floor_ms", "linear_base_ms", "token_ms", "kv_token_ms", "mixed_kv_token_ms")


def samples(model=TRUTH, noise=0.0, seed=0):
    rng = random.Random(seed)
    batches = [(d, p, d * c) for d in (1, 8, 32, 64, 128) for p in (0, 128, 512) for c in (64, 512)]
    batches += [(0, p, 0) for p in (64, 128, 256, 512, 1024, 2048)]
    batches = [(*batch, batch[1] ** 2) for batch in batches]
    return [StepSample(model.seconds(*b) * (1 + rng.gauss(0, noise)), *b) for b in batches]


def test_nonnegative_least_squares_stops_at_zero():
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    # The free solution is 4 - x; with both at least 0 the best line is level.
    np.testing.assert_allclose(
        nonnegative_least_squares(matrix, np.array([3.0, 2.0, 1.0])), [2.0, 0.0], atol=1e-12
    )
    np.testing.assert_allclose(
        nonnegative_least_squares(matrix, np.array([3.0, 5.0, 7.0])), [1.0, 2.0], atol=1e-9
    )
    np.testing.assert_array_equal(nonnegative_least_squares(matrix, -np.ones(3)), [0.0, 0.0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, 6))
def test_nonnegative_least_squares_meets_the_optimality_conditions(seed, columns):
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(20, columns)), rng.normal(size=20)
    solution = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ solution)
    assert (solution >= 0).all()
    assert (gradient <= 1e-6).all()
    assert np.abs(gradient[solution > 0]).max(initial=0) <= 1e-6


def test_the_form_that_made_the_samples_comes_back():
    fit = fit_step_times(samples())
    assert fit.error.mean_relative < 1e-3
    for name in TOLD:
        assert getattr(fit.model, name) == pytest.approx(getattr(TRUTH, name), rel=0.02)
    # What the engine itself takes cannot be told apart from the rest of a measured step.
    per_sequence = TRUTH.decode_seq_ms + TRUTH.overhead_decode_seq_ms
    assert fit.model.decode_seq_ms == pytest.approx(per_sequence, rel=0.02)
    assert fit.model.overhead_ms == fit.model.overhead_decode_seq_ms == 0


def test_disturbed_steps_do_not_bend_the_fit():
    disturbed = samples(noise=0.01)
    for index in (3, 17, 30):
        disturbed[index] = disturbed[index]._replace(seconds=disturbed[index].seconds * 4)
    fit = fit_step_times(disturbed)
    assert fit.model.seconds(64, 0, 64 * 300) == pytest.approx(
        TRUTH.seconds(64, 0, 64 * 300), rel=0.02
    )


def test_no_floor_gives_no_floor():
    model = replace(TRUTH, floor_ms=0.0)
    fit = fit_step_times(samples(model))
    assert fit.error.mean_relative < 1e-3
    assert fit.model.floor_ms <= fit.model.linear_base_ms + fit.model.token_ms * 2


@pytest.mark.parametrize("mixed_attention", [True, False])
def test_what_was_not_measured_is_unknown(mixed_attention):
    chosen = samples()
    if mixed_attention:
        chosen = [s for s in chosen if not (s.decode_seqs and s.prefill_tokens)]
    fit = fit_step_times(chosen, mixed_attention=mixed_attention)
    assert fit.model.mixed_kv_token_ms is None


def test_fitted_seconds_are_the_models_own():
    measured = samples(noise=0.05)
    fit = fit_step_times(measured)
    assert fit.fitted_seconds == tuple(fit.model.seconds(*sample[1:]) for sample in measured)
    seconds = np.array([sample.seconds for sample in measured])
    assert fit.error == fit_error(seconds, np.array(fit.fitted_seconds))


def test_fit_error_is_relative_to_the_measured():
    error = fit_error(np.array([1.0, 2.0, 4.0]), np.array([1.1, 2.0, 3.0]))
    assert error.mean_relative == pytest.approx((0.1 + 0 + 0.25) / 3, abs=1e-5)
    assert error.p90_relative == pytest.approx(0.22, abs=1e-5)
    assert error.samples == 3


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (samples()[:11], "11 measured steps are too few to fit; at least 12"),
        ([*samples(), StepSample(0.0, 1, 0, 1, 0)], "no positive time"),
        ([*samples(), StepSample(float("nan"), 1, 0, 1, 0)], "no positive time"),
    ],
)
def test_samples_that_cannot_be_fitted(broken, words):
    with pytest.raises(ConfigError, match=words):
        fit_step_times(broken)
