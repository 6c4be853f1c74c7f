"""Who waits for a first token: followed from counts alone, in order of arrival."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.limits import (
    BatchLimits,
    Decision,
    EngineFacts,
    EngineSnapshot,
    Source,
    StepRecord,
)
from batchpilot.agents.prefill_queue import PrefillQueue
from batchpilot.agents.prefix_hits import PrefixHits
from batchpilot.env.engine import EngineRequest
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig

FACTS = EngineFacts(BatchLimits(64, 2048), total_blocks=500, block_size=16)


def snapshot(clock, waiting, prefill_seqs=0):
    return EngineSnapshot(FACTS, clock, prefill_seqs, waiting, prefill_seqs=prefill_seqs)


def step(prefill_tokens=0, arrived=(), cached_tokens=0):
    return StepRecord(0.02, 4, 4, prefill_tokens, arrived=arrived, cached_tokens=cached_tokens)


def queue(*prompts, clock=0.0):
    """Prompts that came at `clock`, and were seen once the step of 20 ms then begun was over."""
    waiting = PrefillQueue(1.0)
    waiting.observe(step(arrived=prompts))
    waiting.update(snapshot(clock + 0.02, len(prompts)))
    return waiting


def test_prompt_tokens_computed_are_the_oldest_requests():
    waiting = queue(1000, 300)
    waiting.observe(step(prefill_tokens=1100))
    assert waiting.backlog_tokens == 200
    waiting.update(snapshot(0.1, 0, prefill_seqs=1))  # the first has had its token
    assert waiting.backlog_tokens == 200
    waiting.update(snapshot(0.2, 0))
    assert waiting.backlog_tokens == 0


def test_the_last_tokens_of_a_prompt_that_is_done_are_nobody_elses():
    waiting = queue(1000, 300)
    waiting.observe(step(prefill_tokens=600))
    waiting.update(snapshot(0.1, 1))  # the other 400 are scheduled, and not back yet
    assert waiting.backlog_tokens == 300
    waiting.observe(step(prefill_tokens=500))
    assert waiting.backlog_tokens == 200


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_what_is_left_to_compute_is_known_to_the_token_on_vllms_scheduler(async_scheduling):
    class Follower:
        """Decides nothing; holds the backlog against what vLLM's requests say."""

        def __init__(self):
            self.queue = PrefillQueue(1.0)
            self.before = []
            self.looks = 0

        def observe(self, made):
            self.queue.observe(made)

        def decide(self, seen):
            self.queue.update(seen)
            sequences = [*seen.read_running(), *seen.read_waiting(seen.waiting)]
            left = [s.prefill_tokens_left for s in sequences if s.prefill_tokens_left]
            # What the newest step has scheduled is not back where vLLM works one ahead.
            told, self.before = (self.before if async_scheduling else left), left
            if left and seen.clock_seconds > 0:
                self.looks += 1
                assert self.queue.backlog_tokens == sum(told[-len(left) :])
            return Decision(BatchLimits(64, 500), Source.STATIC, "fixed")

    follower = Follower()
    config = VirtualEngineConfig(
        "llama-3.1-8b-h100", max_num_seqs=64, async_scheduling=async_scheduling
    )
    with VirtualEngine(config) as engine:
        engine.set_policy(follower)
        for number, tokens in enumerate([900, 300, 1400, 40, 2500, 700] * 4):
            engine.add_request(EngineRequest(str(number), [number] * tokens, 30))
        while engine.has_unfinished_requests():
            engine.step()
    assert follower.looks > 40


def test_a_prefix_cache_hit_is_forgotten_once_the_prompt_is_done():
    waiting = queue(1000, 300)
    waiting.observe(step(prefill_tokens=100))  # 900 were in the cache
    waiting.update(snapshot(0.1, 1))
    assert waiting.backlog_tokens == 300


def test_what_is_cached_counts_as_done_and_is_expected_of_others():
    hits = PrefixHits()
    waiting = PrefillQueue(1.0, hits)
    first = step(arrived=(1000, 1000), cached_tokens=750, prefill_tokens=150)
    for learns in (hits, waiting):
        learns.observe(first)
    waiting.update(snapshot(0.02, 1, prefill_seqs=1))
    # Of the first 100 are left. Of the second, five sixths are expected to be cached as well.
    assert hits.share == pytest.approx(750 / 900)
    assert waiting.backlog_tokens == 100 + 167
    assert waiting.whole_prompts(300) == 100 + 167
    # The tokens that are computed are the last of their prompts, and attend to all before.
    assert waiting.backlog_work(1e-3) == pytest.approx(100 + 190 + 167 + 0.167 * (167 + 2 * 833))


def test_first_tokens_are_counted_and_those_that_came_too_late():
    waiting = queue(1000, 1000, 1000)
    waiting.update(snapshot(0.9, 2))
    assert (waiting.first_tokens, waiting.late_first_tokens) == (1, 0)
    waiting.update(snapshot(1.1, 0))
    assert (waiting.first_tokens, waiting.late_first_tokens) == (3, 2)


def test_who_leaves_without_a_token_had_none():
    waiting = PrefillQueue(1.0)
    waiting.observe(step(arrived=[1000] * 6))
    waiting.update(snapshot(0.02, 6)._replace(prompts_done=0))
    waiting.update(snapshot(1.1, 5)._replace(prompts_done=1))
    assert (waiting.first_tokens, waiting.late_first_tokens) == (1, 1)
    waiting.update(snapshot(1.2, 1)._replace(prompts_done=2))  # three clients gave up meanwhile
    assert (waiting.first_tokens, waiting.late_first_tokens) == (2, 2)
    assert waiting.backlog_tokens == 1000


def test_a_prompt_that_is_done_while_others_come_is_counted_once_they_are_told_of():
    waiting = PrefillQueue(1.0)
    waiting.observe(step(arrived=[1000]))
    waiting.update(snapshot(0.02, 1)._replace(prompts_done=0))
    waiting.update(snapshot(0.04, 1)._replace(prompts_done=1))  # another has come meanwhile
    assert waiting.first_tokens == 0
    waiting.observe(step(arrived=[1000]))
    waiting.update(snapshot(0.06, 1)._replace(prompts_done=1))
    assert waiting.first_tokens == 1


def test_work_that_waits_is_tokens_and_what_they_attend_to():
    assert queue(1000, 500).backlog_work(0.0) == 1500
    assert queue(1000, 500).backlog_work(1e-3) == pytest.approx(1000 + 1000 + 500 + 250)
    assert queue(*[1000] * 100).backlog_work(1e-3) == pytest.approx(200_000)  # only 32 looked at
    assert queue().backlog_work(1e-3) == 0


def needed(waiting, now, at_most=1e9, attention=0.0):
    return waiting.pace_needed(now, share=1.0, at_most=at_most, attention=attention).pace


def test_the_pace_needed_is_that_of_whoever_needs_the_fastest():
    waiting = queue(1000, 1000)
    assert needed(waiting, 0.5) == pytest.approx(4000)  # 2,000 tokens in half a second
    assert needed(waiting, 0.8) == pytest.approx(10_000)


def test_late_tokens_of_a_long_prompt_are_more_work():
    waiting = queue(1000, 1000)
    # A square counts as a thousandth of a token: 1,000 tokens are 2,000, and half of them, once the
    # other half is computed, 500 and 750 more.
    assert needed(waiting, 0.5, attention=1e-3) == pytest.approx(8000)
    waiting.observe(StepRecord(0.1, 1, 0, 500))
    assert needed(waiting, 0.5, attention=1e-3) == pytest.approx((1250 + 2000) / 0.5)


def test_who_cannot_be_in_time_hastens_nobody():
    waiting = queue(1000, 1000)
    assert needed(waiting, 0.5, at_most=3000) == pytest.approx(2000)  # the first alone
    assert needed(waiting, 0.5, at_most=1900) == 0
    assert needed(waiting, 1.1) == 0


def test_work_up_to_the_last_who_can_be_in_time_without_the_reserve_is_told_of():
    waiting = queue(1000, 1000, 1000)

    def asked(now, at_most):
        return waiting.pace_needed(now, share=0.9, at_most=at_most)

    assert asked(0.4, 6100) == (pytest.approx(3000 / 0.5), 0.0)  # with a tenth in reserve
    assert asked(0.4, 5500) == (pytest.approx(2000 / 0.5), 3000.0)
    assert asked(0.4, 4900) == (pytest.approx(2000 / 0.5), 0.0)  # not even without it
    assert asked(0.95, 21_000) == (0.0, 1000.0)


def test_waiting_counts_from_the_beginning_of_the_step_that_told_of_a_request():
    waiting = queue(1000, clock=5.0)
    assert needed(waiting, 5.0) == pytest.approx(1000)
    assert needed(waiting, 5.5) == pytest.approx(2000)


def test_as_many_prompts_as_are_computed_whole_or_a_part_of_the_first():
    waiting = queue(1000, 300, 500)
    assert waiting.whole_prompts(1500) == 1300
    assert waiting.whole_prompts(1800) == waiting.whole_prompts(5000) == 1800
    assert waiting.whole_prompts(900) == 900


def test_how_long_the_oldest_has_waited_is_a_share_of_the_target():
    waiting = PrefillQueue(2.0)
    assert waiting.oldest_wait(5.0) == 0.0  # nobody waits
    waiting.observe(step(arrived=(100,)))
    waiting.update(snapshot(5.0, 1))
    assert waiting.oldest_wait(6.0) == pytest.approx(0.51)  # it came as the step of 20 ms began


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3000), st.integers(0, 2000), st.integers(0, 6)),
        max_size=40,
    )
)
def test_the_backlog_is_never_negative_and_is_gone_when_nobody_waits(events):
    hits = PrefixHits()
    waiting = PrefillQueue(1.0, hits)
    for clock, (arrivals, computed, cached, count) in enumerate(events):
        made = step(computed, arrived=(500,) * arrivals, cached_tokens=cached)
        hits.observe(made)
        waiting.observe(made)
        waiting.update(snapshot(float(clock), count))
        assert 0 <= waiting.backlog_tokens <= 500 * count
        assert 0 <= hits.share <= 1
    waiting.update(snapshot(99.0, 0))
    assert waiting.backlog_tokens == 0
