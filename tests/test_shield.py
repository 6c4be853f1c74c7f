"""The shield: whatever is proposed, what comes out is safe and as near as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot
from batchpilot.agents.shield import Clamp, SafetyBounds, shield, shield_ahead

STARTUP = BatchLimits(256, 2048)
FACTS = EngineFacts(STARTUP, total_blocks=1000, block_size=16)


def snapshot(running=0, facts=FACTS):
    return EngineSnapshot(facts, 0.0, running=running, waiting=1)


@pytest.mark.parametrize(
    ("proposed", "running", "bounds", "expected", "clamp"),
    [
        ((64, 1024), 10, {}, (64, 1024), Clamp.NONE),
        ((64, 1024), 100, {}, (100, 1024), Clamp.RUNNING),
        ((999, 1024), 10, {}, (256, 1024), Clamp.UPPER_BOUND),
        ((200, 1024), 10, {"max_num_seqs": 128}, (128, 1024), Clamp.UPPER_BOUND),
        ((200, 1024), 150, {"max_num_seqs": 128}, (150, 1024), Clamp.RUNNING),
        ((0, 1024), 0, {}, (1, 1024), Clamp.LOWER_BOUND),
        ((-7, 1024), 0, {}, (1, 1024), Clamp.LOWER_BOUND),
        ((2, 1024), 0, {"min_num_seqs": 8}, (8, 1024), Clamp.LOWER_BOUND),
        ((64, 4096), 10, {}, (64, 2048), Clamp.TOKEN_BUDGET_HIGH),
        ((64, 30), 10, {}, (64, 74), Clamp.TOKEN_BUDGET_LOW),
        ((64, 30), 10, {"min_prefill_chunk": 256}, (64, 266), Clamp.TOKEN_BUDGET_LOW),
        ((float("nan"), 1024), 10, {}, (256, 2048), Clamp.NOT_A_NUMBER),
        ((64, None), 10, {}, (256, 2048), Clamp.NOT_A_NUMBER),
    ],
)
def test_a_proposal_becomes_the_nearest_safe_limits(proposed, running, bounds, expected, clamp):
    result = shield(BatchLimits(*proposed), snapshot(running), SafetyBounds(**bounds))
    assert (result.limits, result.clamp) == (BatchLimits(*expected), clamp)


def test_a_memory_bound_lowers_the_ceiling_but_never_below_what_runs():
    assert shield(STARTUP, snapshot(10), SafetyBounds(), 40).limits.max_num_seqs == 40
    assert shield(STARTUP, snapshot(50), SafetyBounds(), 40).limits.max_num_seqs == 50


def test_without_chunked_prefill_the_longest_prompt_always_fits_a_step():
    facts = EngineFacts(STARTUP, 1000, 16, unchunked_prefill_tokens=2000)
    limits = shield(BatchLimits(64, 512), snapshot(10, facts=facts), SafetyBounds()).limits
    assert limits.max_num_batched_tokens == 2000 + 10  # beside the decodes, which vLLM takes first


@pytest.mark.parametrize(("block", "least"), [(0, 64), (16, 64), (528, 528)])
def test_a_prefill_that_must_end_on_a_block_has_room_for_a_whole_one(block, least):
    facts = EngineFacts(STARTUP, 1000, 528, prefill_block_tokens=block)
    result = shield(BatchLimits(64, 1), snapshot(10, facts=facts), SafetyBounds())
    assert result.limits.max_num_batched_tokens == least + 10
    assert result.clamp is Clamp.TOKEN_BUDGET_LOW


def test_speculating_sequences_take_more_of_a_step():
    facts = EngineFacts(STARTUP, 1000, 16, tokens_per_decode=4)
    limits = shield(BatchLimits(64, 1), snapshot(10, facts=facts), SafetyBounds()).limits
    assert limits.max_num_batched_tokens == 64 + 10 * 4
    fewer_drafts = snapshot(10, facts=facts)._replace(tokens_per_decode=1.25)
    limits = shield(BatchLimits(64, 1), fewer_drafts, SafetyBounds()).limits
    assert limits.max_num_batched_tokens == 64 + 13


@given(
    seqs=st.integers(-(10**9), 10**9) | st.floats() | st.none(),
    tokens=st.integers(-(10**9), 10**9) | st.floats() | st.none(),
    running=st.integers(0, 256),
    least=st.integers(1, 300),
    most=st.integers(1, 300) | st.none(),
    memory=st.integers(-5, 300) | st.none(),
)
def test_nothing_unsafe_comes_out(seqs, tokens, running, least, most, memory):
    bounds = SafetyBounds(least, most)
    limits = shield(BatchLimits(seqs, tokens), snapshot(running), bounds, memory).limits
    assert max(1, running) <= limits.max_num_seqs <= STARTUP.max_num_seqs
    assert 0 < limits.max_num_batched_tokens <= STARTUP.max_num_batched_tokens
    assert limits.max_num_batched_tokens >= min(64 + running, STARTUP.max_num_batched_tokens)
    assert shield(limits, snapshot(running), bounds, memory).limits == limits


@given(
    seqs=st.integers(-(10**9), 10**9) | st.floats(),
    tokens=st.integers(-(10**9), 10**9) | st.none(),
    running=st.integers(0, 256),
    least=st.integers(1, 300),
    most=st.integers(1, 300) | st.none(),
)
def test_shielded_ahead_nothing_is_lost_for_the_engine_s_own_shield(
    seqs, tokens, running, least, most
):
    """Whatever runs by then, it makes of the limits what it had made of the proposal."""
    bounds, proposed = SafetyBounds(least, most), BatchLimits(seqs, tokens)
    ahead = shield_ahead(proposed, FACTS, bounds).limits
    now = snapshot(running)
    assert shield(ahead, now, bounds).limits == shield(proposed, now, bounds).limits


def test_shielded_ahead_a_limit_is_not_held_up_by_what_runs():
    limits = BatchLimits(8, 512)
    assert shield_ahead(limits, FACTS, SafetyBounds()) == (limits, Clamp.NONE)
