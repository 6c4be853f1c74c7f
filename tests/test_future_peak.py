import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.future_peak import admissible, future_peak

SEQUENCES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)), max_size=14)


def columns(pairs):
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def simulated_peak(pairs):
    """All grow one token a step; a sequence is freed after the step of its last token."""
    alive = [list(pair) for pair in pairs]
    peak = sum(held for held, _ in alive)
    while alive := [pair for pair in alive if pair[1] > 0]:
        for pair in alive:
            pair[0] += 1
            pair[1] -= 1
        peak = max(peak, sum(held for held, _ in alive))
    return peak


@pytest.mark.parametrize(
    ("pairs", "peak"),
    [
        ([], 0),
        ([(10, 5)], 15),
        # The short one ends at 10+2 + 10+2; the long one alone reaches 15.
        ([(10, 5), (10, 2)], 24),
        # The long one alone is the peak: 5 + 40 against 5+1 + 3+1.
        ([(5, 40), (3, 1)], 45),
        # Memory now is the peak: a large sequence is about to go.
        ([(100, 0), (1, 50)], 101),
        # Equal lengths: all finish together, the worst case a full-length rule assumes.
        ([(10, 7)] * 4, 68),
    ],
)
def test_peak_by_hand(pairs, peak):
    assert future_peak(*columns(pairs)).tokens == peak


@settings(deadline=None)
@given(SEQUENCES)
def test_peak_equals_a_simulation_step_by_step(pairs):
    assert future_peak(*columns(pairs)).tokens == simulated_peak(pairs)


@settings(deadline=None)
@given(SEQUENCES, st.tuples(st.integers(0, 60), st.integers(0, 25)))
def test_one_more_sequence_never_lowers_the_peak(pairs, extra):
    assert future_peak(*columns([*pairs, extra])).tokens >= future_peak(*columns(pairs)).tokens


@settings(deadline=None)
@given(SEQUENCES, st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert future_peak(*columns(shuffled)).tokens == future_peak(*columns(pairs)).tokens


def scanned(running, waiting, capacity):
    """The first j that does not fit ends the scan, as a queue in order would."""
    for count in range(len(waiting) + 1):
        if future_peak(*columns([*running, *waiting[:count]])).tokens > capacity:
            return max(count - 1, 0)
    return len(waiting)


@settings(deadline=None)
@given(SEQUENCES, SEQUENCES, st.integers(0, 900))
def test_admissible_equals_a_linear_scan(running, waiting, capacity):
    got = admissible(*columns(running), *columns(waiting), capacity)
    assert got == scanned(running, waiting, capacity)


def test_admissible_by_hand():
    running = columns([(10, 10)])
    waiting = columns([(5, 5), (5, 5), (5, 5)])
    # With j beside the running one: 10+5 + j*(5+5) when they finish, 20 at the very end.
    assert [admissible(*running, *waiting, capacity) for capacity in (19, 20, 25, 34, 35, 45)] == [
        0,
        0,
        1,
        1,
        2,
        3,
    ]


def test_running_ones_over_capacity_admit_nobody():
    assert admissible(*columns([(50, 50)]), *columns([(0, 0)]), 99) == 0


def test_a_later_smaller_request_does_not_jump_the_queue():
    assert admissible(*columns([]), *columns([(100, 10), (1, 1)]), 50) == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"held has shape \(2,\) and remaining \(1,\)"):
        future_peak(np.zeros(2), np.zeros(1))
