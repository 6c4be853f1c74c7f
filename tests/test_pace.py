"""What may be spent: late gaps of the last per cent, and the mean time per token."""

import pytest

from batchpilot.agents.late_gaps import LATE_SHARE, LateGapBudget
from batchpilot.agents.limits import StepRecord
from batchpilot.agents.pace import MeanPace


def step(seconds, decode_seqs=10):
    return StepRecord(seconds, decode_seqs, decode_seqs, 0)


def test_the_budget_is_earned_gap_by_gap():
    budget = LateGapBudget(0.03)
    assert not budget.allows(1)
    for _ in range(200):
        budget.observe(step(0.02))
    assert budget.allows(11)  # 0.6 % of not quite 2,000 gaps
    assert not budget.allows(12)
    assert budget.used == 0


def test_late_steps_count_whoever_made_them():
    budget = LateGapBudget(0.03)
    for number in range(1000):
        budget.observe(step(0.05 if number % 100 == 0 else 0.02))
    assert budget.late_share == pytest.approx(0.01, rel=0.06)
    assert budget.used == pytest.approx(0.01 / LATE_SHARE, rel=0.06)
    assert not budget.allows(1)


def test_what_is_scheduled_and_not_back_yet_is_spent_already():
    budget = LateGapBudget(0.03)
    for _ in range(200):
        budget.observe(step(0.02))
    budget.plan(10)
    assert not budget.allows(10)
    budget.plan(0)
    budget.plan(0)
    assert budget.allows(10)


@pytest.mark.parametrize("life, slow_steps", [(100, 16), (400, 65)])
def test_a_longer_life_affords_more_slow_steps(life, slow_steps):
    pace = MeanPace(0.03)
    pace.set_life(life)
    for _ in range(5000):
        pace.observe(step(0.015))
    afforded = 0
    while pace.affords(0.06, share=0.92):
        pace.observe(step(0.06))
        afforded += 1
    assert afforded == slow_steps
    assert pace.mean_seconds <= 0.92 * 0.03


def test_nothing_is_afforded_before_something_is_saved():
    pace = MeanPace(0.03)
    assert not pace.affords(0.06, share=0.92)
    pace.observe(StepRecord(0.001, 1, 0, 100))  # no decode: no gap
    assert pace.mean_seconds == 0.03
