"""Algorithm 2: every branch in exact numbers, and what holds whatever it is fed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import BatchLimits, Binding, EngineFacts, EngineSnapshot, StepRecord
from batchpilot.agents.sla import (
    Interval,
    SearchRange,
    SlaGuardedPolicy,
    SlaParameters,
    SlaPolicy,
)

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=10_000, block_size=16)
SEARCH = SearchRange(min_num_seqs=1, max_num_seqs=256, alpha=16, delta=4)


def snapshot(running=0, waiting=1):
    return EngineSnapshot(FACTS, 0.0, running=running, waiting=waiting)


def window(policy, *, itl_ms, batch, binding=Binding.MAX_NUM_SEQS, steps=20, **step):
    for _ in range(steps):
        policy.observe(
            StepRecord(itl_ms / 1000, batch, batch, prefill_tokens=0, binding=binding, **step)
        )
    return policy.decide(snapshot()).limits.max_num_seqs


def started(policy_class=SlaPolicy, **params):
    policy = policy_class(SlaParameters(itl_slo_ms=50.0, **params))
    policy.decide(snapshot())
    return policy


@pytest.mark.parametrize(
    ("branch", "before", "batch", "after"),
    [
        # b_high <- max(b, b_low + alpha); b_low <- max(b_low - delta, B_min)
        ("slower", (40, 200), 120, (36, 120)),
        ("slower", (40, 200), 50, (36, 56)),
        ("slower", (3, 200), 120, (1, 120)),
        # b_low <- min(b, b_high - alpha); b_high <- min(b_high + delta, B_max)
        ("faster", (40, 200), 120, (120, 204)),
        ("faster", (40, 200), 199, (184, 204)),
        ("faster", (40, 254), 120, (120, 256)),
        # b_high <- min(b + alpha/2, B_max); b_low <- max(b - alpha/2, B_min)
        ("on_target", (40, 200), 120, (112, 128)),
        ("on_target", (40, 200), 4, (1, 17)),
        ("on_target", (40, 200), 255, (240, 256)),
    ],
)
def test_each_branch_as_published(branch, before, batch, after):
    assert getattr(SEARCH, branch)(Interval(*before), batch) == Interval(*after)


def test_the_first_limit_is_the_middle_of_the_range():
    assert SlaPolicy(SlaParameters(itl_slo_ms=50)).decide(snapshot()).limits.max_num_seqs == 128


def test_one_window_above_the_target_halves_the_range():
    policy = started()
    assert window(policy, itl_ms=80, batch=128) == (1 + 128) // 2
    assert policy.decide(snapshot()).reason == "above the latency target"


def test_a_limit_never_falls_below_the_decoding_sequences():
    policy = started()
    window(policy, itl_ms=80, batch=20)
    assert policy.interval == Interval(1, 20)
    assert policy.decide(snapshot(running=150)).limits.max_num_seqs == 150


def test_irregular_steps_and_steps_without_decodes_say_nothing():
    policy = started()
    window(policy, itl_ms=900, batch=128, regular=False)
    window(policy, itl_ms=900, batch=0)
    assert policy.interval == Interval(1, 256)


@pytest.mark.parametrize("policy_class", [SlaPolicy, SlaGuardedPolicy])
def test_steady_latency_steers_the_batch_to_where_the_target_is_met(policy_class):
    policy = started(policy_class)
    limit = 128
    for _ in range(60):  # a step takes 10 ms and 0.5 ms a sequence: 50 ms at 80
        limit = window(policy, itl_ms=10 + 0.5 * limit, batch=limit)
    assert 70 <= limit <= 90


@pytest.mark.parametrize("binding", [Binding.NONE, Binding.KV_CACHE, Binding.TOKEN_BUDGET])
def test_guarded_stands_still_while_its_limit_does_not_bind(binding):
    policy = started(SlaGuardedPolicy)
    window(policy, itl_ms=20, batch=100)
    held = policy.interval
    for itl_ms in (10, 50, 20):
        window(policy, itl_ms=itl_ms, batch=6, binding=binding)
    assert policy.interval == held


def test_guarded_learns_nothing_from_a_lower_limit_of_somebody_else():
    """As when memory allows fewer sequences, or an operator does."""
    policy = started(SlaGuardedPolicy)
    held = policy.interval
    for itl_ms in (10, 50, 20):
        assert window(policy, itl_ms=itl_ms, batch=40) == 128
    assert policy.interval == held
    assert window(policy, itl_ms=20, batch=128) > 128


def test_as_published_light_load_shuts_the_door_and_guarded_does_not():
    published, guarded = started(), started(SlaGuardedPolicy)
    for _ in range(30):  # a quiet night: 4 sequences, on target
        window(published, itl_ms=50, batch=4, binding=Binding.NONE)
        window(guarded, itl_ms=50, batch=4, binding=Binding.NONE)
    assert published.decide(snapshot()).limits.max_num_seqs == 9
    assert guarded.decide(snapshot()).limits.max_num_seqs == 128


def test_with_slack_at_the_upper_end_guarded_gives_out_every_place_and_published_never_does():
    for policy_class, last in ((SlaPolicy, 248), (SlaGuardedPolicy, 256)):
        policy = started(policy_class)
        limit = 128
        for _ in range(8):
            limit = window(policy, itl_ms=20, batch=limit)
        assert limit == last, policy_class
        assert window(policy, itl_ms=80, batch=limit) < 248


def test_a_quiet_while_leaves_a_door_that_guarded_has_opened_wide():
    policy = started(SlaGuardedPolicy)
    limit = 128
    for _ in range(8):
        limit = window(policy, itl_ms=20, batch=limit)
    assert window(policy, itl_ms=20, batch=6, binding=Binding.NONE) == 256


def test_guarded_shrinks_on_a_missed_target_whatever_binds():
    policy = started(SlaGuardedPolicy)
    assert window(policy, itl_ms=80, batch=100, binding=Binding.KV_CACHE) == 50


windows = st.lists(
    st.tuples(
        st.floats(1e-4, 10.0),
        st.integers(1, 256),
        st.sampled_from(list(Binding)),
    ),
    max_size=60,
)


@given(
    windows=windows,
    alpha=st.integers(2, 64),
    data=st.data(),
    guarded=st.booleans(),
    most=st.integers(1, 256),
)
def test_the_interval_never_inverts_keeps_its_width_and_stays_in_range(
    windows, alpha, data, guarded, most
):
    delta = data.draw(st.integers(1, alpha - 1))
    facts = EngineFacts(BatchLimits(most, 2048), total_blocks=10_000, block_size=16)
    policy = (SlaGuardedPolicy if guarded else SlaPolicy)(
        SlaParameters(itl_slo_ms=50, alpha=alpha, delta=delta, window_steps=1)
    )
    policy.decide(EngineSnapshot(facts, 0.0, running=0, waiting=1))
    for seconds, batch, binding in windows:
        batch = min(batch, most)
        policy.observe(StepRecord(seconds, batch, batch, 0, binding=binding))
        low, high = policy.interval.low, policy.interval.high
        assert 1 <= low <= high <= most
        assert high - low >= min(alpha, most - 1)
        limit = policy.decide(EngineSnapshot(facts, 0.0, running=batch, waiting=1)).limits
        assert batch <= limit.max_num_seqs <= most


@given(windows=windows, batch=st.integers(17, 256))
def test_above_the_target_the_next_limit_shrinks_below_it_grows(windows, batch):
    policy = started(window_steps=1)
    for seconds, seqs, binding in windows:
        policy.observe(StepRecord(seconds, seqs, seqs, 0, binding=binding))
    before = policy.interval
    running_at_limit = before.middle
    if running_at_limit >= 1:
        policy.observe(
            StepRecord(1.0, running_at_limit, running_at_limit, 0, binding=Binding.MAX_NUM_SEQS)
        )
        assert policy.interval.middle <= before.middle
    before = policy.interval
    policy.observe(
        StepRecord(0.001, before.middle, max(1, before.middle), 0, binding=Binding.MAX_NUM_SEQS)
    )
    assert policy.interval.middle >= before.middle
