"""Netflix's limits: samples made by hand and the limits they give, then what always holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.concurrency import (
    AimdParameters,
    AimdPolicy,
    AimdRule,
    Gradient2Parameters,
    Gradient2Policy,
    Gradient2Rule,
    LatencySample,
)
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, StepRecord

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=1000, block_size=16)
SNAPSHOT = EngineSnapshot(FACTS, 0.0, running=10, waiting=5)


def window(policy, seconds, running, steps=20, **step):
    for _ in range(steps):
        policy.observe(StepRecord(seconds, running, running, prefill_tokens=0, **step))
    return policy.decide(SNAPSHOT).limits.max_num_seqs


@pytest.mark.parametrize(
    ("limit", "seconds", "running", "preempted", "after"),
    [
        (100, 0.04, 100, False, 101),  # inside the target, in use
        (100, 0.04, 50, False, 101),  # half in use is in use
        (100, 0.04, 49, False, 100),  # not in use: it says nothing
        (100, 0.06, 49, False, 90),  # too slow, whatever is in use
        (100, 0.04, 100, True, 90),  # a preemption is a drop
        (21, 0.06, 21, False, 20),  # never below the least
        (256, 0.04, 256, False, 256),  # never above the start-up limit
    ],
)
def test_aimd_adds_one_or_takes_a_tenth(limit, seconds, running, preempted, after):
    rule = AimdRule(AimdParameters(itl_slo_ms=50.0))
    assert rule.update(limit, LatencySample(seconds, running, preempted), 256) == after


def test_aimd_without_a_target_backs_off_from_preemptions_alone():
    rule = AimdRule(AimdParameters())
    assert rule.update(100, LatencySample(10.0, 100, False), 256) == 101
    assert rule.update(100, LatencySample(10.0, 100, True), 256) == 90


def test_gradient2_grows_by_a_share_of_the_queue_while_latency_is_as_usual():
    rule = Gradient2Rule(Gradient2Parameters())
    limit = 100.0
    for _ in range(3):
        limit = rule.update(limit, LatencySample(0.02, 100, False), 256)
    assert limit == pytest.approx(100 + 3 * 0.2 * 4)


def test_gradient2_backs_off_where_steps_are_more_than_tolerance_times_slower():
    rule = Gradient2Rule(Gradient2Parameters())
    for _ in range(10):
        rule.update(100, LatencySample(0.02, 100, False), 256)
    after = rule.update(100, LatencySample(0.06, 100, False), 256)
    usual = 0.02 + 2 / 601 * 0.04
    assert after == pytest.approx(0.8 * 100 + 0.2 * (100 * 1.5 * usual / 0.06 + 4))
    assert rule.update(100, LatencySample(60.0, 100, False), 256) == pytest.approx(
        0.8 * 100 + 0.2 * (0.5 * 100 + 4)  # never less than half
    )


def test_gradient2_learns_a_lower_usual_quickly_and_stands_still_when_not_in_use():
    rule = Gradient2Rule(Gradient2Parameters())
    for _ in range(10):
        rule.update(100, LatencySample(0.1, 100, False), 256)
    assert rule.update(100, LatencySample(0.02, 49, False), 256) == 100
    assert rule.long_seconds == pytest.approx(0.95 * (0.1 - 2 / 601 * 0.08))


@pytest.mark.parametrize(
    "policy", [AimdPolicy(AimdParameters()), Gradient2Policy(Gradient2Parameters())]
)
def test_a_policy_starts_at_twenty_and_moves_once_a_window(policy):
    assert policy.decide(SNAPSHOT).limits == BatchLimits(20, 2048)
    assert window(policy, 0.02, 20, steps=19) == 20
    assert window(policy, 0.02, 20, steps=1, regular=False) == 20  # says nothing: not counted
    assert window(policy, 0.02, 20, steps=1) in (20, 21)  # gradient2: 20.8
    assert window(policy, 0.02, 20) == 21 if isinstance(policy, Gradient2Policy) else 22


def test_a_preemption_in_a_step_that_is_not_counted_is_still_a_drop():
    policy = AimdPolicy(AimdParameters(initial_num_seqs=100))
    policy.decide(SNAPSHOT)
    policy.observe(StepRecord(0.02, 50, 0, prefill_tokens=512, preemptions=1))
    assert window(policy, 0.02, 90) == 90


@pytest.mark.parametrize("kind", ["aimd", "gradient2"])
@given(
    windows=st.lists(
        st.tuples(st.floats(1e-4, 10), st.integers(1, 256), st.integers(0, 2)), max_size=60
    )
)
def test_limits_stay_between_the_least_and_the_start_up_limit(kind, windows):
    if kind == "aimd":
        policy = AimdPolicy(AimdParameters(itl_slo_ms=50, window_steps=1))
    else:
        policy = Gradient2Policy(Gradient2Parameters(window_steps=1))
    policy.decide(SNAPSHOT)
    for seconds, running, preemptions in windows:
        limit = window(policy, seconds, running, steps=1, preemptions=preemptions)
        assert 20 <= limit <= 256
