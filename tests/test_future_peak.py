"""The memory of the future: its mean and variance over all futures, and who may still join."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.future_peak import AGE_GROUPS, Growing, admissible, forecast
from batchpilot.agents.kv_growth import EVERY_TOKEN, KvGrowth
from batchpilot.agents.survival import SurvivalCurve, SurvivalSample

LENGTHS = np.ceil(np.random.default_rng(0).lognormal(4.0, 0.8, 400))


def curve_of(lengths):
    """The distribution of lengths that were all seen from start to end."""
    lengths = np.asarray(lengths, dtype=np.float64)
    return SurvivalCurve(SurvivalSample(lengths, np.zeros_like(lengths), lengths > 0))


def growing(*pairs):
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return Growing(table[:, 0], table[:, 1])


OUTPUT = curve_of(LENGTHS)
ALL_ALIKE = curve_of([100.0] * 2000)
SEQUENCES = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 200)), max_size=40)
SOME = SEQUENCES.filter(bool)


def simulated(running, steps, futures=4000, growth=EVERY_TOKEN):
    """Memory at each step in many futures, lengths drawn from those seen; shape (futures, t)."""
    rng = np.random.default_rng(1)
    memory = np.zeros((futures, len(steps)))
    context = running.held if running.context is None else running.context
    for held, age, tokens in zip(running.held, running.ages, context, strict=True):
        ends = rng.choice(LENGTHS[age < LENGTHS], futures) - age
        grown = growth.held(tokens + steps) - growth.held(tokens)
        memory += np.where(steps <= ends[:, None], held + grown, 0.0)
    return memory


def test_mean_and_variance_are_those_of_simulated_futures():
    rng = np.random.default_rng(2)
    running = Growing(
        rng.integers(50, 900, 20).astype(float), rng.integers(0, 60, 20).astype(float)
    )
    got = forecast(running, OUTPUT)
    early = got.steps <= 200
    memory = simulated(running, got.steps[early])
    assert got.mean[early] == pytest.approx(memory.mean(axis=0), rel=0.02)
    assert np.sqrt(got.variance[early]) == pytest.approx(memory.std(axis=0), rel=0.06, abs=1)


@pytest.mark.parametrize(
    "growth",
    [KvGrowth(1 / 6, 128), KvGrowth(0.5, 1024), KvGrowth(0.25, 16)],
    ids=["five of six windowed", "half, hardly filled", "three of four constant"],
)
def test_layers_that_keep_a_window_grow_only_until_it_is_full(growth):
    rng = np.random.default_rng(2)
    context = rng.integers(50, 900, 20).astype(float)
    running = Growing(growth.held(context), rng.integers(0, 60, 20).astype(float), context)
    got = forecast(running, OUTPUT, growth)
    early = got.steps <= 200
    memory = simulated(running, got.steps[early], growth=growth)
    assert got.mean[early] == pytest.approx(memory.mean(axis=0), rel=0.03)
    assert got.mean.max() <= forecast(running, OUTPUT).mean.max()


def test_more_requests_are_admissible_where_layers_keep_a_window():
    growth = KvGrowth(0.25, 100)
    context = np.full(10, 100.0)  # every window is full
    run = Growing(context, np.zeros(10), context)
    wait = Growing(context, np.zeros(10), context)
    admitted = [
        admissible(run, wait, ALL_ALIKE, capacity=2000, growth=kind)
        for kind in (EVERY_TOKEN, growth)
    ]
    assert admitted == [0, 6]  # of 200 tokens each at their end, and of 125


def test_many_sequences_in_groups_are_forecast_as_they_are_one_by_one():
    rng = np.random.default_rng(3)
    held, ages = rng.integers(50, 900, 512).astype(float), rng.integers(0, 120, 512).astype(float)
    together = forecast(Growing(held, ages), OUTPUT)
    memory = simulated(Growing(held, ages), together.steps, futures=400)
    peak = float(together.mean.max())
    assert np.abs(together.mean - memory.mean(axis=0)).max() < 0.02 * peak


def test_equal_lengths_are_known_exactly():
    # Both are at 10 of 100 tokens: they hold 190 each in their 90th step, and nothing later.
    got = forecast(growing((100, 10), (100, 10)), ALL_ALIKE)
    at = dict(zip(got.steps.tolist(), got.mean.tolist(), strict=True))
    assert at[90] == pytest.approx(2 * 190)
    assert max(at.values()) == at[90]
    assert np.sqrt(got.variance.max()) < 0.02 * at[90]


def test_admissible_by_hand():
    # When the running one ends, 60 steps on, it holds 150, and each newcomer 50 + 60. Later the
    # newcomers are alone, and hold 150 each in their last step.
    running, waiting = growing((90, 40)), growing((50, 0), (50, 0), (50, 0))
    admitted = [
        admissible(running, waiting, ALL_ALIKE, capacity=capacity)
        for capacity in (149, 151, 259, 261, 369, 371, 481)
    ]
    assert admitted == [0, 0, 0, 1, 1, 2, 3]


@settings(deadline=None)
@given(SOME, SEQUENCES, st.integers(0, 20_000))
def test_whoever_is_admitted_fits_and_the_next_would_not(running, waiting, capacity):
    run, wait = growing(*running), growing(*waiting)
    admitted = admissible(run, wait, OUTPUT, capacity=capacity, deviations=1.0)
    assert 0 <= admitted <= len(waiting)
    for more, fits in ((0, True), (1, False)):
        count = admitted + more
        if count == 0 or count > len(waiting):
            continue
        taken = growing(*waiting[:count])
        assert (admissible(run, taken, OUTPUT, capacity=capacity, deviations=1.0) == count) is fits


@settings(deadline=None)
@given(SOME, SOME, st.integers(0, 20_000), st.lists(st.floats(0, 3), min_size=2, max_size=2))
def test_more_reserve_and_less_capacity_admit_no_more(running, waiting, capacity, reserves):
    run, wait = growing(*running), growing(*waiting)
    few, many = (
        admissible(run, wait, OUTPUT, capacity=capacity, deviations=theta)
        for theta in sorted(reserves, reverse=True)
    )
    assert few <= many
    less = admissible(run, wait, OUTPUT, capacity=0.8 * capacity, deviations=max(reserves))
    assert less <= few


@settings(deadline=None)
@given(SOME, st.randoms(use_true_random=False))
def test_the_order_of_those_that_run_does_not_matter(running, random):
    shuffled = list(running)
    random.shuffle(shuffled)
    one, other = forecast(growing(*running), OUTPUT), forecast(growing(*shuffled), OUTPUT)
    if len(running) <= AGE_GROUPS:
        assert one.mean == pytest.approx(other.mean)
        assert one.variance == pytest.approx(other.variance)


def test_running_ones_over_capacity_admit_nobody():
    assert admissible(growing((500, 5)), growing((0, 0)), ALL_ALIKE, capacity=400) == 0


def test_a_later_smaller_request_does_not_jump_the_queue():
    waiting = growing((1000, 0), (1, 0))
    assert admissible(growing((1, 0)), waiting, ALL_ALIKE, capacity=500) == 0


def test_bad_arguments_are_named():
    short = Growing(np.zeros(2), np.zeros(1))
    with pytest.raises(ValueError, match=r"waiting: held has shape \(2,\) and ages \(1,\)"):
        admissible(growing((1, 1)), short, OUTPUT, capacity=10)
    with pytest.raises(ValueError, match="nothing runs"):
        admissible(growing(), growing((1, 1)), OUTPUT, capacity=10)
