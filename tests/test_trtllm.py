"""TensorRT-LLM's rule in exact numbers, and its bounds whatever it is fed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import (
    BatchLimits,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    StepRecord,
)
from batchpilot.agents.trtllm import TrtllmParameters, TrtllmPolicy, mean_length_limits

FACTS = EngineFacts(BatchLimits(1024, 16_384), total_blocks=1000, block_size=16)
SNAPSHOT = EngineSnapshot(FACTS, 0.0, running=10, waiting=5)


def finished(*lengths, completed=True):
    requests = tuple(FinishedRequest(*pair, completed) for pair in lengths)
    return StepRecord(0.01, 10, 10, 0, finished=requests)


@pytest.mark.parametrize(
    ("prompt", "output", "total_blocks", "limits"),
    [
        # 32 blocks each: 31 fit; 31 * 3 + 31 = 124 tokens, but a long prompt asks for 8192.
        (384, 128, 1000, (31, 8192)),
        # 312 fit; 312 * 1 + 312 = 624 tokens: the balanced least of 4096.
        (256, 256, 10_000, (312, 4096)),
        # 20 blocks each: 500 fit; 500 / 4 + 500 = 625 tokens: outputs dominate.
        (64, 256, 10_000, (500, 2048)),
        # 1000 * 15 + 1000 = 16,000, padded to 2^14.
        (1500, 100, 100_000, (1000, 16_384)),
        # More would fit than the engine was started for.
        (8, 8, 100_000, (1024, 4096)),
        # Not one fits: one runs all the same.
        (16_000, 16_000, 1000, (1, 4096)),
    ],
)
def test_both_limits_from_mean_lengths(prompt, output, total_blocks, limits):
    engine = EngineFacts(BatchLimits(1024, 16_384), total_blocks, block_size=16)
    assert mean_length_limits(prompt, output, engine) == BatchLimits(*limits)


def test_the_start_up_limits_stand_until_a_request_has_finished():
    policy = TrtllmPolicy(TrtllmParameters())
    assert policy.decide(SNAPSHOT).limits == FACTS.startup_limits
    policy.observe(finished((384, 128), completed=False))
    assert policy.decide(SNAPSHOT).limits == FACTS.startup_limits
    policy.observe(finished((384, 128)))
    assert policy.decide(SNAPSHOT).limits == BatchLimits(31, 8192)


def test_the_average_forgets_what_left_its_window():
    policy = TrtllmPolicy(TrtllmParameters(window_requests=2))
    policy.observe(finished((9000, 1), (384, 128), (384, 128)))
    assert policy.decide(SNAPSHOT).limits == BatchLimits(31, 8192)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)), min_size=1),
    blocks=st.integers(1, 100_000),
)
def test_limits_stay_between_one_sequence_and_the_start_up_pair(lengths, blocks):
    engine = EngineFacts(BatchLimits(256, 2048), blocks, block_size=16)
    policy = TrtllmPolicy(TrtllmParameters(window_requests=3))
    policy.observe(finished(*lengths))
    limits = policy.decide(EngineSnapshot(engine, 0.0, 1, 1)).limits
    assert 1 <= limits.max_num_seqs <= 256
    assert limits.max_num_batched_tokens == 2048
