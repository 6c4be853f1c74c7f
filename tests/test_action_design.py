"""Residual and grid actions: relative to a base policy, and exactly the base where they are 0."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.acting import ActingPolicy
from batchpilot.agents.actions import ActionDesign, ActionScale, ResidualGrid, ResidualScale
from batchpilot.agents.limits import BatchLimits, Decision, EngineFacts, EngineSnapshot, Source
from batchpilot.agents.parameters import ConfigError

FACTS = EngineFacts(BatchLimits(256, 4096), total_blocks=100, block_size=16)
RESIDUAL = ResidualScale(seqs_span=2.0, tokens_span=8.0, lowest=BatchLimits(4, 64))
IDLE = EngineSnapshot(FACTS, 0.0, running=0, waiting=1)
GRID = ResidualGrid((0.5, 1.0, 2.0), (0.25, 1.0), lowest=BatchLimits(4, 64))


def based(seqs: int, tokens: int, *, is_whole: bool = False) -> Decision:
    return Decision(BatchLimits(seqs, tokens), Source.PREDICTIVE, "", is_whole=is_whole)


class Always:
    """A base policy that decides the same in every step."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision

    def observe(self, step: object) -> None:
        pass

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        return self.decision


def running_with(running: int, prefill_seqs: int = 0) -> EngineSnapshot:
    return EngineSnapshot(FACTS, 0.0, running, waiting=1, prefill_seqs=prefill_seqs)


@pytest.mark.parametrize(
    ("action", "limits"),
    [
        ((0.0, 0.0), BatchLimits(100, 2048)),
        ((1.0, 0.0), BatchLimits(200, 2048)),
        ((-1.0, -1.0), BatchLimits(50, 256)),
        ((0.5, -1 / 3), BatchLimits(141, 1024)),
        ((9.0, 9.0), BatchLimits(200, 4096)),
    ],
)
def test_residual_actions_shift_the_base_on_a_log_scale(action, limits):
    assert RESIDUAL.to_limits(action, based(100, 2048), IDLE) == limits


def test_shifted_limits_stay_between_the_lowest_and_the_startup_ones():
    assert RESIDUAL.to_limits((-1, -1), based(5, 100), IDLE) == BatchLimits(4, 64)
    assert RESIDUAL.to_limits((1, 1), based(200, 4000), IDLE) == BatchLimits(256, 4096)


@given(st.integers(-5, 10**6), st.integers(-5, 10**6), st.integers(0, 300))
def test_an_action_of_0_is_the_base_itself_whatever_it_says(seqs: int, tokens: int, running: int):
    base, snapshot = based(seqs, tokens), running_with(running)
    assert RESIDUAL.to_limits((0.0, -0.0), base, snapshot) == base.limits
    assert GRID.to_limits(GRID.neutral, base, snapshot) == base.limits
    for design in (ActionDesign(design="residual"), ActionDesign(design="grid")):
        assert design.to_limits(design.neutral, base, snapshot) == base.limits


@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 100))
def test_no_action_shifts_what_the_base_decides_as_a_whole(seqs: float, tokens: float, limit: int):
    base = based(limit, 2048, is_whole=True)
    assert RESIDUAL.to_limits((seqs, tokens), base, running_with(100)) == base.limits
    assert GRID.to_limits(0, base, running_with(100)) == base.limits


def test_a_step_does_not_let_in_a_share_of_those_the_step_before_let_in():
    running, base = 40, based(40, 2048)
    for _ in range(10):  # a base with room for 40 decides on what runs, once more do
        base = Decision(BatchLimits(max(40, running), 2048), Source.PREDICTIVE, "", wanted_seqs=40)
        running = RESIDUAL.to_limits((0.5, 0.0), base, running_with(running)).max_num_seqs
    assert running == round(40 * math.sqrt(2))


def test_a_door_shut_without_a_word_of_how_far_stays_shut():
    shut = Decision(BatchLimits(100, 2048), Source.MEMORY, "", wanted_seqs=0)
    assert RESIDUAL.to_limits((1.0, 0.0), shut, running_with(100)).max_num_seqs == 100
    assert RESIDUAL.to_limits((1.0, 0.0), based(100, 2048), running_with(100)).max_num_seqs == 200


@pytest.mark.parametrize("design", ["residual", "grid", "absolute"])
def test_a_decision_on_what_runs_says_what_was_wanted(design):
    """Who leases limits for longer than a step goes by that; see `Decision.wanted_seqs`."""
    held_up = Decision(BatchLimits(100, 2048), Source.PREDICTIVE, "", wanted_seqs=40)
    policy = ActingPolicy(ActionDesign(design=design), Always(held_up))
    assert policy.decide(running_with(100)).wanted_seqs == 40
    half = {"residual": (-1.0, 0.0), "grid": 3, "absolute": (-1.0, 0.0)}[design]
    policy.act(half)
    decision = policy.decide(running_with(100))
    if design == "absolute":  # where the limit itself is what is wanted
        assert (decision.limits.max_num_seqs, decision.wanted_seqs) == (1, None)
    else:
        assert (decision.limits.max_num_seqs, decision.wanted_seqs) == (100, 20)
    assert policy.decide(running_with(1)).wanted_seqs is None


@pytest.mark.parametrize(
    ("limit", "wanted", "seqs"), [(100, 40, 40), (100, None, 100), (100, 0, 100), (100, 120, 100)]
)
def test_a_decision_tells_the_limits_it_wants(limit, wanted, seqs):
    decision = Decision(BatchLimits(limit, 2048), Source.MEMORY, "", wanted_seqs=wanted)
    assert decision.wanted == BatchLimits(seqs, 2048)


def test_an_action_lets_nobody_in_at_the_lowest():
    found = RESIDUAL.to_limits((-1.0, 0.0), based(100, 2048), running_with(80))
    assert found.max_num_seqs == 80


def test_tokens_of_the_decodes_are_no_action_s_to_give_or_take():
    base, snapshot = based(100, 300), running_with(200, prefill_seqs=100)
    assert RESIDUAL.to_limits((0.0, 1.0), base, snapshot).max_num_batched_tokens == 100 + 8 * 200
    assert RESIDUAL.to_limits((0.0, -1 / 3), base, snapshot).max_num_batched_tokens == 200
    assert RESIDUAL.to_limits((0.0, -1.0), base, snapshot).max_num_batched_tokens == 100 + 64


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_opposite_actions_undo_each_other_to_within_rounding(first: float, second: float):
    there = RESIDUAL.to_limits((first, second / 4), based(100, 2000), IDLE)
    base = based(there.max_num_seqs, there.max_num_batched_tokens)
    back = RESIDUAL.to_limits((-first, -second / 4), base, IDLE)
    assert abs(back.max_num_seqs - 100) <= 1.5
    assert abs(back.max_num_batched_tokens - 2000) <= 1.5


@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 150))
def test_limits_lead_back_to_the_action_that_asked_for_them(
    seqs: float, tokens: float, decodes: int
):
    base = based(400, decodes + 4000)
    scale = ResidualScale(seqs_span=1.3, tokens_span=8.0)
    roomy = EngineSnapshot(EngineFacts(BatchLimits(1000, 10**5), 100, 16), 0.0, decodes, 1)
    found = scale.to_action(scale.to_limits((seqs, tokens), base, roomy), base.limits, decodes)
    assert found == pytest.approx((seqs, tokens), abs=0.01)


@pytest.mark.parametrize(
    ("number", "limits"),
    [
        (0, BatchLimits(50, 512)),
        (1, BatchLimits(50, 2048)),
        (2, BatchLimits(100, 512)),
        (3, BatchLimits(100, 2048)),
        (5, BatchLimits(200, 2048)),
    ],
)
def test_grid_actions_are_pairs_of_factors(number, limits):
    assert GRID.to_limits(number, based(100, 2048), IDLE) == limits


def test_a_grid_knows_its_size_and_its_neutral_action():
    assert (GRID.size, GRID.neutral) == (6, 3)
    assert ActionDesign(design="grid").output_size == 28


@pytest.mark.parametrize("number", [-1, 6])
def test_a_number_without_a_pair(number):
    with pytest.raises(ValueError, match="whole number from 0 to 5"):
        GRID.factors(number)


@pytest.mark.parametrize(
    ("design", "output", "action"),
    [
        ("residual", (0.25, -3.0), (0.25, -1.0)),
        ("absolute", (2.0, 0.0), (1.0, 0.0)),
        ("grid", [0.0] * 9 + [0.5] + [0.1] * 18, 9),
        ("grid", [1.0] * 28, 0),
    ],
)
def test_what_an_output_stands_for(design, output, action):
    assert ActionDesign(design=design).chosen(output) == action


@pytest.mark.parametrize(
    ("design", "output"),
    [
        ("residual", (math.nan, 0.0)),
        ("residual", (0.0,)),
        ("absolute", (0.0, math.inf)),
        ("grid", [math.nan] + [0.0] * 27),
        ("grid", [0.0] * 2),
    ],
)
def test_an_output_that_stands_for_nothing(design, output):
    with pytest.raises(ValueError, match="finite numbers"):
        ActionDesign(design=design).chosen(output)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_the_absolute_design_is_the_environments_scale(first: float, second: float):
    scale = ActionScale.of(FACTS, min_num_seqs=1, min_num_batched_tokens=64)
    design = ActionDesign(design="absolute")
    found = design.to_limits((first, second), based(1, 1), IDLE)
    assert found == scale.to_limits((first, second))


def test_an_engine_whose_start_up_limits_leave_no_choice():
    tiny = EngineFacts(BatchLimits(1, 32), total_blocks=10, block_size=16)
    for design in ("absolute", "residual"):
        action = ActionDesign(design=design)
        idle = EngineSnapshot(tiny, 0.0, running=0, waiting=0)
        assert action.to_limits((1.0, 1.0), based(1, 32), idle) == BatchLimits(1, 32)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"design": "relative"}, "'relative' is not one of: absolute, residual, grid"),
        ({"seqs_span": 1.0}, "seqs_span=1.0 must be a finite number above 1"),
        ({"tokens_span": math.nan}, "tokens_span=nan"),
        ({"min_num_seqs": 0}, "min_num_seqs=0 must be at least 1"),
        ({"seqs_factors": (0.5, 2.0)}, "must differ, with 1 among them"),
        ({"seqs_factors": (1.0, 1.0)}, "must differ"),
        ({"tokens_factors": (1.0, -1.0)}, "must be finite numbers above 0"),
    ],
)
def test_designs_that_make_no_sense(values, error):
    with pytest.raises(ConfigError, match=error):
        ActionDesign(**values)


class Rising:
    """A base policy that asks for one sequence more each time."""

    def __init__(self) -> None:
        self.limit, self.observed = 99, 0

    def observe(self, step):
        self.observed += 1

    def decide(self, snapshot):
        self.limit += 1
        return Decision(BatchLimits(self.limit, 2048), Source.MEMORY, "rising")


SNAPSHOT = running_with(1)


def test_an_action_holds_while_the_base_goes_on_deciding():
    policy = ActingPolicy(ActionDesign(seqs_span=2.0), Rising())
    policy.act((1.0, 0.0))
    assert [policy.decide(SNAPSHOT).limits.max_num_seqs for _ in range(3)] == [200, 202, 204]
    policy.act((0.0, 0.0))
    assert policy.decide(SNAPSHOT).limits == BatchLimits(103, 2048)
    assert policy.decide(SNAPSHOT).source is Source.LEARNED


def test_without_an_action_the_base_decides():
    policy = ActingPolicy(ActionDesign(), Rising())
    assert policy.decide(SNAPSHOT) == Decision(
        BatchLimits(100, 2048), Source.FALLBACK, "no action yet: the base policy decides"
    )
