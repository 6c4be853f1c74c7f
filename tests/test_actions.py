from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.actions import ActionScale, log_position
from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.agents.parameters import ConfigError

SCALE = ActionScale(BatchLimits(1, 64), BatchLimits(256, 4096))


@pytest.mark.parametrize(
    ("action", "limits"),
    [
        ((-1, -1), BatchLimits(1, 64)),
        ((0, 0), BatchLimits(16, 512)),
        ((0.5, 1 / 3), BatchLimits(64, 1024)),
        ((1, 1), BatchLimits(256, 4096)),
        ((-7, 7), BatchLimits(1, 4096)),
    ],
)
def test_actions_on_a_log_scale(action: tuple[float, float], limits: BatchLimits):
    assert SCALE.to_limits(action) == limits


@pytest.mark.parametrize("action", [(0.0,), (0.0, 0.0, 0.0), (math.nan, 0.0), (0.0, math.inf)])
def test_actions_that_are_none(action: tuple[float, ...]):
    with pytest.raises(ValueError, match="must be 2 finite numbers"):
        SCALE.to_limits(action)


@given(st.integers(1, 256), st.integers(64, 4096))
def test_every_limit_has_an_action(seqs: int, tokens: int):
    limits = BatchLimits(seqs, tokens)
    assert SCALE.to_limits(SCALE.to_action(limits)) == limits


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_actions_never_leave_the_bounds(first: float, second: float):
    limits = SCALE.to_limits((first, second))
    assert 1 <= limits.max_num_seqs <= 256
    assert 64 <= limits.max_num_batched_tokens <= 4096


def test_limits_out_of_bounds_have_the_nearest_action():
    assert SCALE.to_action(BatchLimits(1000, 1)) == (1.0, -1.0)


def test_bounds_of_an_engine():
    facts = EngineFacts(BatchLimits(32, 512), 10, 16)
    scale = ActionScale.of(facts, min_num_seqs=2, min_num_batched_tokens=64)
    assert scale == ActionScale(BatchLimits(2, 64), BatchLimits(32, 512))


@pytest.mark.parametrize(
    ("lowest", "error"),
    [
        (BatchLimits(0, 64), "max_num_seqs: the lowest, 0, must be at least 1"),
        (BatchLimits(256, 64), "max_num_seqs: the lowest, 256, .* less than the highest, 256"),
        (BatchLimits(1, 5000), "max_num_batched_tokens: the lowest, 5000"),
    ],
)
def test_bounds_that_leave_no_choice(lowest: BatchLimits, error: str):
    with pytest.raises(ConfigError, match=error):
        ActionScale(lowest, BatchLimits(256, 4096))


def test_log_position():
    assert [log_position(v, 1, 100) for v in (0, 1, 10, 100, math.inf)] == [-1, -1, 0, 1, 1]
