"""`memory-peak`: what it falls back to, when it looks, and that what it admits fits."""

import math

import numpy as np
import pytest

from batchpilot.agents import memory_peak
from batchpilot.agents.limits import (
    BatchLimits,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    SequenceState,
    StepRecord,
)
from batchpilot.agents.memory_peak import (
    TURNOVER_RISK,
    MemoryPeakParameters,
    MemoryPeakPolicy,
)

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=500, block_size=16)  # 8,000 tokens


class Queue:
    """Running and waiting sequences; counts how often they are read."""

    def __init__(self, running, waiting):
        self.running, self.waiting, self.reads = running, waiting, 0

    def snapshot(self):
        used = sum(-(-s.kv_tokens // 16) for s in self.running)
        return EngineSnapshot(
            FACTS,
            0.0,
            running=len(self.running),
            waiting=len(self.waiting),
            used_blocks=used,
            read_running=self._read_running,
            read_waiting=lambda count: self.waiting[:count],
        )

    def _read_running(self):
        self.reads += 1
        return self.running


def step(**content):
    return StepRecord(0.02, 8, content.pop("decode_seqs", 8), 0, **content)


def taught(output_tokens, prompt_tokens=100, count=200, epsilon=0.2):
    """A policy that has seen `count` requests finish."""
    policy = MemoryPeakPolicy(MemoryPeakParameters(memory_overflow_probability=epsilon))
    for _ in range(count):
        finished = (FinishedRequest(prompt_tokens, output_tokens, True),)
        policy.observe(step(finished=finished, arrived=(prompt_tokens,)))
    return policy


def test_until_something_has_finished_it_takes_sequences_to_grow_by_a_third_of_what_they_hold():
    policy = MemoryPeakPolicy(MemoryPeakParameters())
    queue = Queue([SequenceState(160, 10, 0)] * 10, [SequenceState(0, 0, 150)] * 50)
    decision = policy.decide(queue.snapshot())
    assert decision.limits.max_num_seqs == 500 * 3 // (4 * 10)
    assert decision.reason == "blocks held per sequence now"


def test_a_shared_prefix_is_held_once_and_the_share_held_is_told():
    policy = taught(output_tokens=204)
    alone = Queue([SequenceState(192, 92, 0)] * 10, [SequenceState(0, 0, 100)] * 60)
    limit = policy.decide(alone.snapshot()).limits.max_num_seqs
    assert policy.held_share == 1.0
    policy = taught(output_tokens=204)
    shared = alone.snapshot()._replace(used_blocks=alone.snapshot().used_blocks // 2)
    assert policy.decide(shared).limits.max_num_seqs > limit
    assert policy.held_share == 0.5


def test_equal_lengths_admit_exactly_what_fits_at_the_peak():
    # Ten sequences, each at 192 of its 304 tokens (19 whole blocks); each newcomer ends at 304,
    # when the ten are long gone: 112 steps from now they hold 10 * 304, newcomers 216 each.
    policy = taught(output_tokens=204)
    queue = Queue([SequenceState(192, 92, 0)] * 10, [SequenceState(0, 0, 100)] * 60)
    limit = policy.decide(queue.snapshot()).limits.max_num_seqs
    fit_at_first_peak = (8000 - 10 * 304) // (100 + 112)
    fit_at_last_peak = 8000 // 304
    assert limit == 10 + min(fit_at_first_peak, fit_at_last_peak)


def test_old_sequences_about_to_end_leave_more_room_than_young_ones():
    waiting = [SequenceState(0, 0, 100)] * 60
    old = Queue([SequenceState(280, 180, 0)] * 20, waiting)
    young = Queue([SequenceState(280, 20, 0)] * 20, waiting)  # long prompts, just begun
    limits = [taught(200).decide(q.snapshot()).limits.max_num_seqs for q in (old, young)]
    assert limits[0] > limits[1] >= 20


def admitted(epsilon, running=20):
    policy = MemoryPeakPolicy(MemoryPeakParameters(memory_overflow_probability=epsilon))
    for length in np.ceil(np.random.default_rng(1).exponential(150, 400)).astype(int):
        finished = (FinishedRequest(100, int(length), True),)
        policy.observe(step(finished=finished, arrived=(100,)))
    ages = np.random.default_rng(0).integers(1, 150, running).tolist()
    queue = Queue(
        [SequenceState(100 + age, age, 0) for age in ages], [SequenceState(0, 0, 100)] * 60
    )
    return policy.decide(queue.snapshot()).limits.max_num_seqs


def test_a_smaller_overflow_probability_admits_fewer():
    assert admitted(0.01) < admitted(0.08) < admitted(0.2)


@pytest.mark.parametrize("running", [30, 40])
def test_a_larger_batch_risks_fewer_overflows_while_it_is_replaced_once(monkeypatch, running):
    bound = admitted(0.4, running)
    assert bound == admitted(TURNOVER_RISK / running**2, running)
    monkeypatch.setattr(memory_peak, "TURNOVER_RISK", math.inf)
    assert admitted(0.4, running) > bound


def test_it_reads_the_sequences_only_when_an_admission_is_at_hand():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(480, 180, 0)] * 16, [])
    for _ in range(10):
        policy.decide(queue.snapshot())
    assert queue.reads == 0  # nothing waits
    queue.waiting = [SequenceState(0, 0, 3000)] * 3
    for _ in range(10):
        policy.decide(queue.snapshot())
        policy.observe(step())
    assert queue.reads == 1  # the door is closed, and nothing has happened since
    queue.running = queue.running[1:]  # one has ended
    policy.decide(queue.snapshot())
    assert queue.reads == 2


def test_those_granted_may_come_in_over_several_steps_and_nobody_beside_them():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(96, 190, 0)] * 40, [SequenceState(0, 0, 100)] * 60)
    granted = policy.decide(queue.snapshot()).limits.max_num_seqs - 40
    assert granted > 3
    queue.running = queue.running + [SequenceState(0, 0, 100)] * 3  # the token budget took three
    decision = policy.decide(queue.snapshot())  # too soon for another look at 43 sequences
    assert decision.limits.max_num_seqs == 40 + granted
    assert queue.reads == 1


def test_the_door_is_shut_as_soon_as_all_who_were_granted_are_in():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(96, 190, 0)] * 40, [SequenceState(0, 0, 100)] * 60)
    open_door = policy.decide(queue.snapshot())
    assert open_door.wanted_seqs is None  # the limit means itself
    queue.running = queue.running + [SequenceState(0, 0, 100)] * (
        open_door.limits.max_num_seqs - 40
    )
    shut = policy.decide(queue.snapshot())  # too soon for another look
    assert (shut.limits, shut.wanted_seqs, queue.reads) == (open_door.limits, 0, 1)


def test_who_comes_between_two_looks_does_not_wait_for_the_next():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(96, 100, 0)] * 10, [SequenceState(0, 0, 100)] * 2)
    assert policy.decide(queue.snapshot()).limits.max_num_seqs >= 15
    queue.running = queue.running + [SequenceState(100, 1, 0)]  # the token budget took one of two
    queue.waiting = [SequenceState(0, 0, 100)] * 4  # and three have come
    assert policy.decide(queue.snapshot()).limits.max_num_seqs >= 15
    assert queue.reads == 1


def test_a_sequence_that_ends_makes_no_room_before_the_next_look():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(192, 92, 0)] * 41, [SequenceState(0, 0, 3000)] * 3)
    assert policy.decide(queue.snapshot()).limits.max_num_seqs == 41
    queue.running = queue.running[1:]
    assert policy.decide(queue.snapshot()).limits.max_num_seqs == 40


@pytest.mark.parametrize("running", [1, 40, 256])
def test_the_limit_stays_between_n_and_b_max(running):
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(31, 1, 0)] * running, [SequenceState(0, 0, 5)] * 500)
    for _ in range(20):
        limit = policy.decide(queue.snapshot()).limits.max_num_seqs
        assert running <= limit <= 256
        policy.observe(step(finished=(FinishedRequest(30, 2, True),)))


def test_it_does_not_look_while_those_granted_still_come_in():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(96, 190, 0)] * 10, [SequenceState(0, 0, 100)] * 60)
    granted = policy.decide(queue.snapshot()).limits.max_num_seqs - 10
    for admitted in range(1, min(granted, 15)):
        queue.running = queue.running + [SequenceState(0, 0, 100)]
        assert policy.decide(queue.snapshot()).limits.max_num_seqs == 10 + granted
        assert (admitted, queue.reads) == (admitted, 1)


def test_it_does_not_look_where_nobody_could_come_in():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(16, 1, 0)] * 256, [SequenceState(0, 0, 5)] * 60)
    policy.decide(queue.snapshot())
    for _ in range(40):
        assert policy.decide(queue.snapshot()).limits.max_num_seqs == 256
    assert queue.reads <= 1


def test_a_preemption_takes_the_grant_back():
    policy = taught(output_tokens=200)
    queue = Queue([SequenceState(96, 190, 0)] * 40, [SequenceState(0, 0, 100)] * 60)
    assert policy.decide(queue.snapshot()).limits.max_num_seqs > 40
    policy.observe(step(preemptions=1, recomputed_tokens=96))
    queue.running = queue.running[1:]
    assert policy.decide(queue.snapshot()).limits.max_num_seqs == 39
