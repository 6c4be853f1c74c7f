"""Prompts that wait for each other: where a long step makes their tokens cheaper."""

import pytest

from batchpilot.agents.bunches import BUSY, RATIO_LOOKS, WORTH, Bunches, StepOption
from batchpilot.agents.limits import StepRecord
from batchpilot.agents.pace import MeanPace

TARGET = 0.04
DECODE = 0.02  # a step without prompts; the target leaves as much again
USUAL = StepOption(0.04, 200)


def slow(worth):
    """A step that delays decodes five times as long, its tokens so many times as cheap."""
    return StepOption(0.12, round(5 * 200 * worth))


def bunches(busy):
    """With this share of the newest steps full of prompts."""
    pace = MeanPace(TARGET)
    for _ in range(2000):
        pace.observe(StepRecord(DECODE + busy * (USUAL.seconds - DECODE), 10, 10, 0))
    return Bunches(pace, least_chunk=64), pace


def learn(waiting, option, looks=8 * RATIO_LOOKS):
    """Looks after which what the option is worth is known."""
    for _ in range(looks):
        waiting.update(DECODE, USUAL, option)


@pytest.mark.parametrize(
    "worth, busy, expected",
    [
        (WORTH + 0.1, BUSY + 0.1, True),
        (WORTH - 0.1, BUSY + 0.1, False),  # many small steps cost hardly more: gaps stay short
        (WORTH + 0.1, BUSY - 0.1, False),  # prompts keep up with the target kept
    ],
)
def test_prompts_wait_where_that_is_cheaper_and_they_hardly_keep_up(worth, busy, expected):
    waiting, _ = bunches(busy)
    learn(waiting, slow(worth))
    assert waiting.is_bunching is expected


def test_it_takes_many_looks_to_believe_that_it_is_cheaper():
    waiting, _ = bunches(BUSY + 0.1)
    learn(waiting, slow(100.0), looks=RATIO_LOOKS // 8)  # a model that is learning a new speed
    assert not waiting.is_bunching
    learn(waiting, slow(1.5))
    assert waiting.is_bunching


def test_once_begun_it_goes_on_until_all_are_in_or_nothing_is_gained():
    waiting, pace = bunches(BUSY + 0.1)
    learn(waiting, slow(1.5))
    for _ in range(2000):
        pace.observe(StepRecord(DECODE, 10, 10, 0))
    learn(waiting, slow(1.05))
    assert waiting.is_bunching
    learn(waiting, slow(0.95))
    assert not waiting.is_bunching
    waiting, _ = bunches(BUSY + 0.1)
    learn(waiting, slow(1.5))
    waiting.end()
    assert not waiting.is_bunching


def test_where_the_target_leaves_no_prompt_tokens_nothing_is_learned():
    waiting, _ = bunches(BUSY + 0.5)
    for _ in range(8 * RATIO_LOOKS):
        waiting.update(0.9 * TARGET, StepOption(TARGET, 64), slow(2.0))
    assert not waiting.is_bunching


def test_where_decoding_alone_misses_the_target_nobody_waits_for_what_cannot_come():
    waiting, _ = bunches(BUSY + 0.1)
    learn(waiting, slow(1.5))
    waiting.update(0.9 * TARGET, StepOption(TARGET, 64), slow(1.5))
    assert waiting.is_bunching
    waiting.update(1.1 * TARGET, StepOption(TARGET, 64), slow(1.5))
    assert not waiting.is_bunching


def test_prompt_tokens_that_cost_nothing_are_not_waited_for():
    waiting, _ = bunches(BUSY + 0.1)
    learn(waiting, StepOption(DECODE, 2000))
    assert not waiting.is_bunching


def test_slow_steps_come_as_often_as_the_mean_pace_allows():
    waiting, pace = bunches(0.0)
    made = 0
    for _ in range(5000):
        due = waiting.is_due(slow(1.5))
        made += due
        pace.observe(StepRecord(0.12 if due else DECODE, 10, 10, 0))
        assert pace.mean_seconds <= TARGET
    assert made / 5000 == pytest.approx(0.2, abs=0.01)  # 0.2 of 120 ms and 0.8 of 20 ms are 40
