"""When the pace is given up for a moment so that a queue that makes everybody late goes away."""

import pytest

from batchpilot.agents.catch_up import CatchUp
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, StepRecord
from batchpilot.agents.pace import MeanPace
from batchpilot.agents.prefill_queue import PrefillQueue
from batchpilot.agents.step_time import PromptsAhead, StepTimeEstimator
from batchpilot.env.profiles import load_profile

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=20_000, block_size=16)
SECONDS = load_profile("llama-3.1-8b-h100").step_time.seconds
TARGET = 1.0
RUNNING = 20


@pytest.fixture(scope="module")
def step_time():
    """An H100's, learned; 2,048 prompt tokens beside 20 decodes take it 43 ms."""
    model = StepTimeEstimator()
    for number in range(200):
        decodes, prefill = 1 + number % 50, 37 * number % 2000
        seconds = SECONDS(decodes, prefill, 500 * decodes)
        model.observe(StepRecord(seconds, decodes, decodes, prefill, 500 * decodes))
    return model


class Scene:
    """Requests that come in a row, wait as long as the test says, and then have a first token."""

    def __init__(self, step_time):
        self.queue = PrefillQueue(TARGET)
        self.pace = MeanPace(0.02)
        self.catch_up = CatchUp(self.queue, step_time, self.pace)
        self.clock = 0.0
        self.waiting = 0

    def arrive(self, *prompts):
        self.queue.observe(StepRecord(0.01, RUNNING, RUNNING, 0, arrived=prompts))
        self.waiting += len(prompts)
        self._update()

    def first_tokens(self, count, after):
        """`count` requests get theirs after so long."""
        self.arrive(*[100] * count)
        self.clock += after
        self.waiting -= count
        self._update()

    def decode(self, seconds):
        """For a long while, in steps that take so long."""
        for _ in range(2000):
            self.pace.observe(StepRecord(seconds, RUNNING, RUNNING, 0))

    def wait(self, seconds):
        self.clock += seconds
        self._update()

    def considered(self):
        self.catch_up.consider(self._snapshot(), PromptsAhead())
        return self.catch_up.is_on

    def _update(self):
        self.queue.update(self._snapshot())
        self.catch_up.update(self._snapshot())

    def _snapshot(self):
        used = RUNNING * 500 // 16
        return EngineSnapshot(FACTS, self.clock, RUNNING, self.waiting, used_blocks=used)


def begins(step_time, *, first_tokens_after=1.2, prompts=10, waited=1.1, decoded_in=0.02):
    """20 first tokens after so long; then prompts of 2,000 tokens that have waited for so long."""
    scene = Scene(step_time)
    scene.decode(decoded_in)
    scene.first_tokens(20, after=first_tokens_after)
    scene.arrive(*[2000] * prompts)
    scene.wait(waited)
    return scene.considered()


def test_where_most_were_late_a_queue_that_can_be_gone_soon_is_caught_up_with(step_time):
    assert begins(step_time)


def test_those_whose_first_token_was_in_time_keep_their_pace(step_time):
    assert not begins(step_time, first_tokens_after=0.8)


def test_those_who_were_so_fast_that_their_mean_affords_it_need_not_keep_it(step_time):
    # 10 steps of 43 ms, over half a mean life of 128 steps: the mean rises by 2.6 ms or so.
    assert begins(step_time, first_tokens_after=0.8, decoded_in=0.015)
    assert not begins(step_time, first_tokens_after=0.8, decoded_in=0.017)
    # However long it takes: 30 steps.
    assert begins(step_time, first_tokens_after=0.8, decoded_in=0.008, prompts=30)


def test_nobody_hurries_while_the_oldest_can_be_in_time(step_time):
    assert not begins(step_time, waited=0.9)


def test_a_queue_that_takes_longer_than_the_target_at_any_pace_is_left_alone(step_time):
    assert not begins(step_time, prompts=30)  # 30 steps of 43 ms


def test_late_ones_make_room_in_time_for_others(step_time):
    scene = Scene(step_time)
    scene.first_tokens(20, after=1.2)
    for _ in range(40):  # of those who run now, few were late
        scene.first_tokens(1, after=0.1)
    scene.arrive(*[2000] * 10)
    scene.wait(1.1)
    assert not scene.considered()


def test_it_ends_once_nobody_has_waited_for_more_than_half_of_the_target(step_time):
    scene = Scene(step_time)
    scene.first_tokens(20, after=1.2)
    scene.arrive(*[2000] * 10)
    scene.wait(1.1)
    assert scene.considered()
    scene.arrive(2000)
    scene.wait(0.4)
    assert scene.catch_up.is_on
    scene.waiting -= 10  # all but the newest have had their first tokens
    scene.wait(0.05)
    assert not scene.catch_up.is_on
