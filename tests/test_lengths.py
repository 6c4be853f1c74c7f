from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.lengths import LengthEstimator
from batchpilot.agents.limits import FinishedRequest, StepRecord
from batchpilot.agents.parameters import ConfigError

SHAREGPT = np.loadtxt(
    Path(__file__).parent / "data" / "sharegpt_lengths.csv", delimiter=",", skiprows=1, dtype=int
)


def draw(kind, count, seed):
    rng = np.random.default_rng(seed)
    if kind == "sharegpt":
        return rng.choice(SHAREGPT[:, 1], count)
    if kind == "lognormal":
        return np.maximum(1, np.round(rng.lognormal(np.log(150) - 0.5, 1.0, count))).astype(int)
    return rng.geometric(1 / float(kind.removeprefix("exponential ")), count)


TRUE_MEAN = {"sharegpt": SHAREGPT[:, 1].mean(), "lognormal": 150.0, "exponential 150": 150.0}


class Server:
    """A fixed number of slots, refilled as requests finish; each gets one token a step."""

    def __init__(self, lengths, slots, window=2048):
        self.estimator = LengthEstimator(window)
        self.finished = []
        self.ages = np.zeros(0, dtype=int)
        self._ends = np.zeros(0, dtype=int)
        self._waiting = np.asarray(lengths)
        self._slots = slots

    def step(self):
        started = self._waiting[: self._slots - len(self.ages)]
        self._waiting = self._waiting[len(started) :]
        decoding = len(self.ages)
        self._ends = np.concatenate((self._ends, started))
        self.ages = np.concatenate((self.ages, np.zeros(len(started), dtype=int))) + 1
        over = self.ages >= self._ends
        ended = self._ends[over].tolist()
        self.ages, self._ends = self.ages[~over], self._ends[~over]
        self.finished += ended
        self.estimator.observe(
            StepRecord(
                seconds=0.01,
                running=len(over),
                decode_seqs=decoding,
                prefill_tokens=10 * len(started),
                finished=tuple(FinishedRequest(10, length, True) for length in ended),
                arrived=(10,) * len(started),
            )
        )

    def run_until(self, finished):
        while len(self.finished) < finished:
            self.step()
        return self.estimator.estimate(self.ages)


def step(*finished, arrived=(), decode_seqs=1):
    return StepRecord(
        seconds=0.01,
        running=1,
        decode_seqs=decode_seqs,
        prefill_tokens=0,
        finished=finished,
        arrived=arrived,
    )


def completed(length, prompt=10):
    return FinishedRequest(prompt, length, True)


def aborted(length):
    return FinishedRequest(10, length, False)


# By hand


def estimate_of(finished, ages=()):
    """As after enough steps that none was running when the record began."""
    estimator, nothing = LengthEstimator(), step()
    for _ in range(1100):
        estimator.observe(nothing)
    estimator.observe(step(*finished))
    return estimator.estimate(ages)


def test_kaplan_meier_by_hand():
    # At 10: 1 of 4 ends. 20 is aborted. At 30: 1 of 2 ends. The running one is 40 old.
    estimate = estimate_of([completed(10), aborted(20), completed(30)], ages=[40])
    assert estimate.output.survival([0, 9, 10, 29, 30]).tolist() == [1, 1, 0.75, 0.75, 0.375]
    # Beyond 30 memoryless: 2 completions in 10 + 20 + 30 + 40 tokens, 50 tokens more.
    assert estimate.mean == pytest.approx(10 + 0.75 * 20 + 0.375 * 50)
    assert estimate.mean_remaining(40) == pytest.approx(50)
    assert estimate.mean_remaining(10) == pytest.approx(20 + 0.375 * 50 / 0.75)
    assert estimate.num_completed == 2
    second = 10**2 + 0.75 * (30**2 - 10**2) + 0.375 * 2 * (30 * 50 + 50**2)
    assert estimate.variance == pytest.approx(second - estimate.mean**2)


def test_quantiles_by_hand():
    estimate = estimate_of([completed(10), aborted(20), completed(30)], ages=[40])
    assert estimate.quantile_remaining(0, [0.1, 0.25, 0.3, 0.625]).tolist() == [10, 10, 30, 30]
    assert estimate.quantile_remaining([0, 5, 9, 10], 0.25).tolist() == [10, 5, 1, 20]
    # In the tail: half of what is alive ends within 50 ln 2 = 34.7 tokens.
    assert estimate.quantile_remaining([30, 40, 1000], 0.5).tolist() == [35, 35, 35]
    # From 10 on: survival 0.75, of which 0.1 is left where 0.375 exp(-r / 50) = 0.075.
    assert estimate.quantile_remaining(10, 0.9) == 20 + np.ceil(50 * np.log(5))


def test_a_sequence_already_running_when_the_window_began_is_truncated():
    # Seen for one step only: at risk from 98 on, so it says nothing of younger ages.
    estimator = LengthEstimator()
    estimator.observe(step(completed(100)))
    estimate = estimator.estimate([1, 1, 1])
    assert estimate.output.survival(99) == 1
    assert estimate.mean > 100


@pytest.mark.parametrize("length", [1, 64, 1024])
def test_equal_lengths_are_known_exactly(length):
    estimate = estimate_of([completed(length)] * 500)
    assert estimate.mean == pytest.approx(length, rel=0.002)
    assert estimate.quantile_remaining(0, 0.99) == length
    assert estimate.relative_error < 0.01


def test_one_completion_states_an_error_as_large_as_itself():
    assert estimate_of([completed(100)]).relative_error >= 1


@pytest.mark.parametrize("ages", [[], [5, 50, 500]])
def test_no_completion_is_no_data(ages):
    estimator = LengthEstimator()
    assert estimator.estimate(ages) is None
    estimator.observe(step(aborted(30), arrived=(5, 6)))
    assert estimator.estimate(ages) is None
    assert estimator.latest is None


def test_requests_that_generated_nothing_do_not_count():
    assert estimate_of([completed(50), aborted(0)], ages=[0, 0]).mean == pytest.approx(
        estimate_of([completed(50)]).mean
    )


def test_prompts_count_at_arrival():
    estimator = LengthEstimator()
    estimator.observe(step(arrived=(10, 30)))
    estimator.observe(step(completed(20, prompt=10)))
    estimate = estimator.estimate([])
    assert (estimate.prompt_mean, estimate.prompt_variance) == (20, 100)


def test_finished_prompts_stand_in_where_no_arrival_was_seen():
    assert estimate_of([completed(50, prompt=7), completed(50, prompt=9)]).prompt_mean == 8


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_probabilities_outside_are_refused(probability):
    with pytest.raises(ValueError, match="must be in"):
        estimate_of([completed(50)]).quantile_remaining(0, probability)


def test_small_windows_are_refused():
    with pytest.raises(ConfigError, match="window=63 must be at least 64"):
        LengthEstimator(63)


# Caching


def test_rebuilds_after_a_twentieth_more_completions():
    server = Server(draw("exponential 150", 2000, 0), slots=128)
    first = server.run_until(1000)
    assert not server.estimator.is_stale
    assert server.estimator.estimate(server.ages) is first
    needed = len(server.finished) // 20
    while len(server.finished) < 1000 + needed // 2:
        server.step()
    assert server.estimator.estimate(server.ages) is first
    assert server.run_until(len(server.finished) + needed) is not first


def test_rebuilds_when_running_requests_have_grown_without_any_completion():
    estimator = LengthEstimator()
    estimator.observe(step(completed(4)))
    first = estimator.estimate([4] * 9)
    for _ in range(7):
        estimator.observe(step())
    assert estimator.estimate([11] * 9) is first
    estimator.observe(step())
    assert estimator.estimate([12] * 9).mean > first.mean


# Without bias

SEEDS = range(20)


@pytest.mark.parametrize(
    ("kind", "slots", "finished", "within"),
    [
        ("exponential 150", 2000, 200, 0.05),
        ("exponential 150", 128, 200, 0.05),
        ("lognormal", 2000, 1000, 0.10),
        ("lognormal", 128, 1000, 0.10),
        ("sharegpt", 2000, 1000, 0.10),
        ("sharegpt", 128, 1000, 0.10),
    ],
)
def test_mean_is_unbiased_while_most_still_run(kind, slots, finished, within):
    estimates, naive = [], []
    for seed in SEEDS:
        server = Server(draw(kind, 2000, seed), slots)
        estimates.append(server.run_until(finished).mean)
        naive.append(np.mean(server.finished))
    assert np.mean(estimates) == pytest.approx(TRUE_MEAN[kind], rel=within)
    if slots == 2000:
        assert np.mean(naive) < 0.7 * TRUE_MEAN[kind]


@pytest.mark.parametrize("kind", TRUE_MEAN)
@pytest.mark.parametrize("slots", [128, 2000])
def test_stated_error_covers_the_true_one(kind, slots):
    covered = []
    for seed in SEEDS:
        server = Server(draw(kind, 2000, seed), slots)
        for finished in (60, 200, 1000):
            estimate = server.run_until(finished)
            error = abs(estimate.mean - TRUE_MEAN[kind])
            covered.append(error <= 2 * estimate.relative_error * estimate.mean)
    assert np.mean(covered) >= 0.85


@pytest.mark.parametrize("kind", TRUE_MEAN)
def test_stated_error_falls_as_requests_finish(kind):
    server = Server(draw(kind, 2000, 0), 128)
    errors = [server.run_until(finished).relative_error for finished in (8, 64, 512, 1800)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3
    assert errors[-1] < 0.05


@pytest.mark.parametrize("kind", TRUE_MEAN)
def test_mean_is_unbiased_once_the_window_has_moved_on(kind):
    means = []
    for seed in range(5):
        server = Server(draw(kind, 10_200, seed), 128)
        means.append(server.run_until(10_000).mean)
    assert server.estimator.latest.num_completed == 2048
    assert np.mean(means) == pytest.approx(TRUE_MEAN[kind], rel=0.03)


@pytest.mark.parametrize(("before", "after"), [(100, 400), (400, 100)])
def test_follows_a_shift_of_the_lengths(before, after):
    errors = []
    for seed in range(5):
        old = draw(f"exponential {before}", 3000, seed)
        new = draw(f"exponential {after}", 2000, 100 + seed)
        server = Server(np.concatenate((old, new)), 128)
        while len(server.finished) < 3000 - 128:
            server.step()
            server.estimator.estimate(server.ages)
        assert server.estimator.latest.mean == pytest.approx(before, rel=0.2)
        while len(server.finished) < 3000 - 128 + 1000:
            server.step()
            server.estimator.estimate(server.ages)
        errors.append(server.estimator.latest.mean / after - 1)
    # A window of 2,048 without shift detection is still off by more than a half here.
    assert abs(np.mean(errors)) < 0.2


def test_steady_lengths_are_not_taken_for_a_shift():
    server = Server(draw("sharegpt", 6100, 1), 128)
    while len(server.finished) < 6000:
        server.step()
        server.estimator.estimate(server.ages)
    assert server.estimator.latest.num_completed == 2048


# Invariants

LENGTHS = st.integers(1, 300)
FINISHED = st.lists(st.tuples(LENGTHS, st.booleans()), min_size=1, max_size=40)
RUNNING = st.lists(LENGTHS, max_size=40)
AGES = np.arange(0, 900, 7)


def some_estimate(finished, running):
    requests = [FinishedRequest(10, length, ok) for length, ok in finished]
    return estimate_of([completed(5), *requests], running)


@settings(deadline=None)
@given(FINISHED, RUNNING)
def test_survival_falls_from_one(finished, running):
    survival = some_estimate(finished, running).output.survival(AGES)
    assert survival[0] == 1
    assert np.all(np.diff(survival) <= 0)
    assert np.all(survival >= 0)


@settings(deadline=None)
@given(FINISHED, RUNNING)
def test_everything_is_finite_and_positive(finished, running):
    estimate = some_estimate(finished, running)
    remaining = estimate.mean_remaining(np.append(AGES, 10**7))
    assert np.all((remaining > 0) & np.isfinite(remaining))
    quantiles = estimate.quantile_remaining(np.append(AGES, 10**7), 0.999999)
    assert np.all((quantiles >= 1) & np.isfinite(quantiles))
    assert 0 < estimate.relative_error < np.inf
    assert 0 <= estimate.variance < np.inf
    assert estimate.mean == pytest.approx(float(estimate.mean_remaining(0)))


@settings(deadline=None)
@given(FINISHED, RUNNING, st.integers(0, 600))
def test_quantiles_rise_with_probability(finished, running, age):
    quantiles = some_estimate(finished, running).quantile_remaining(age, np.linspace(0, 0.99, 50))
    assert np.all(np.diff(quantiles) >= 0)


@settings(deadline=None)
@given(FINISHED, RUNNING, st.integers(0, 400), st.floats(0.01, 0.99))
def test_a_quantile_is_the_first_age_at_which_enough_have_ended(finished, running, age, share):
    estimate = some_estimate(finished, running)
    wait = float(estimate.quantile_remaining(age, share))
    survival = estimate.output.survival
    assert survival(age + wait) <= (1 - share) * survival(age) * (1 + 1e-6)
    if wait > 1:
        assert survival(age + wait - 1) >= (1 - share) * survival(age) * (1 - 1e-6)


@settings(deadline=None)
@given(FINISHED, RUNNING, st.integers(0, 300))
def test_a_longer_running_request_never_lowers_the_mean(finished, running, older):
    longest = max([length for length, _ in finished] + running + [5])
    before = some_estimate(finished, running).mean
    after = some_estimate(finished, [*running, longest + older]).mean
    assert after >= before * (1 - 1e-9)
