"""Memory rules: 1a in exact numbers, 1b against its quadratic and against Monte Carlo."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.combined import MemorySlaParameters, MemorySlaPolicy
from batchpilot.agents.limits import (
    BatchLimits,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    SequenceState,
    StepRecord,
)
from batchpilot.agents.memory import (
    MemoryCltParameters,
    MemoryCltPolicy,
    MemoryParameters,
    MemoryPolicy,
    chance_constrained_limit,
)
from batchpilot.agents.sla import SlaParameters, SlaPolicy

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=1000, block_size=16)


def snapshot(running, used_blocks, waiting=1, facts=FACTS, **state):
    return EngineSnapshot(facts, 0.0, running, waiting, used_blocks=used_blocks, **state)


@pytest.mark.parametrize(
    ("running", "used_blocks", "factor", "limit"),
    [
        (50, 500, 0.95, 95),  # 10 blocks each, 950 to fill
        (50, 500, 1.0, 100),
        (10, 31, 0.95, 256),  # young and small: more would fit than the engine takes
        (99, 990, 0.95, 99),  # 95 would fit, but 99 run: a running one is never taken out
        (1, 1000, 0.95, 1),
    ],
)
def test_1a_sizes_by_the_blocks_a_sequence_holds_now(running, used_blocks, factor, limit):
    policy = MemoryPolicy(MemoryParameters(memory_factor=factor))
    assert policy.decide(snapshot(running, used_blocks)).limits == BatchLimits(limit, 2048)


def test_1a_sizes_whenever_requests_run_and_keeps_its_limit_until_then():
    policy = MemoryPolicy(MemoryParameters())
    assert policy.decide(snapshot(0, 0)).limits == FACTS.startup_limits
    assert policy.decide(snapshot(50, 500)).limits.max_num_seqs == 95
    assert policy.decide(snapshot(0, 0)).limits.max_num_seqs == 95
    assert policy.decide(snapshot(50, 900, waiting=0)).limits.max_num_seqs == 52
    assert policy.decide(snapshot(50, 800)).limits.max_num_seqs == 59


def test_1a_says_what_it_wanted_where_what_runs_holds_its_limit_up():
    policy = MemoryPolicy(MemoryParameters())
    assert policy.decide(snapshot(99, 990)).wanted_seqs == 95
    assert policy.decide(snapshot(98, 980)).wanted_seqs == 95
    assert policy.decide(snapshot(94, 940)).wanted_seqs is None  # the limit means itself


def test_1a_shuts_no_door_where_all_places_are_taken_and_memory_has_room():
    policy = MemoryPolicy(MemoryParameters())
    full = policy.decide(snapshot(256, 500))
    assert (full.limits.max_num_seqs, full.wanted_seqs) == (256, None)
    assert policy.decide(snapshot(250, 490)) is full


@given(
    mean=st.floats(1, 1e4),
    deviation=st.floats(0, 1e4),
    capacity=st.floats(1e3, 1e7),
    epsilon=st.floats(1e-6, 0.49),
)
def test_1b_solves_its_quadratic(mean, deviation, capacity, epsilon):
    b = chance_constrained_limit(mean, deviation**2, capacity, epsilon)
    theta = NormalDist().inv_cdf(1 - epsilon)
    assert b >= 0
    assert b * mean + theta * deviation * math.sqrt(b) == pytest.approx(capacity, rel=1e-6)


def test_1b_agrees_with_the_papers_linear_form_when_its_slack_is_taken_at_that_b():
    mean, deviation, capacity, epsilon = 400.0, 250.0, 120_000.0, 0.05
    b = chance_constrained_limit(mean, deviation**2, capacity, epsilon)
    slack = NormalDist().inv_cdf(1 - epsilon) * deviation * math.sqrt(b)
    assert (capacity - slack) / mean == pytest.approx(b)


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.2])
def test_1b_overflows_as_often_as_it_says(epsilon):
    rng = np.random.default_rng(7)
    prompts, outputs = rng.gamma(4, 50, 200_000), rng.gamma(2, 100, 200_000)
    lengths = prompts + outputs
    capacity = 50_000.0
    b = int(chance_constrained_limit(lengths.mean(), lengths.var(), capacity, epsilon))
    totals = rng.choice(lengths, size=(20_000, b)).sum(axis=1)
    overflows = float(np.mean(totals > capacity))
    # b is rounded down, so it overflows a little less often than epsilon, never much more.
    assert epsilon / 2.5 <= overflows <= epsilon * 1.25


def test_1b_stands_at_the_start_up_limit_until_something_has_finished():
    policy = MemoryCltPolicy(MemoryCltParameters())
    assert policy.decide(snapshot(50, 500)).limits == FACTS.startup_limits
    assert policy.decide(snapshot(50, 500)).reason.startswith("no lengths known")


def test_1b_sizes_by_the_lengths_of_finished_and_running_requests():
    policy = MemoryCltPolicy(MemoryCltParameters(memory_overflow_probability=0.05))
    finished = tuple(FinishedRequest(100, 50, True) for _ in range(200))
    policy.observe(StepRecord(0.01, 50, 50, 0, finished=finished, arrived=(100,) * 200))
    running = [SequenceState(101, 1, 0)] * 50
    limit = policy.decide(snapshot(50, 500, read_running=lambda: running)).limits.max_num_seqs
    assert limit == 16_000 // 150  # no spread: every request takes 150 tokens


def test_1b_falls_with_what_runs_until_no_more_than_fit_do():
    policy = MemoryCltPolicy(MemoryCltParameters(memory_overflow_probability=0.05))
    finished = tuple(FinishedRequest(100, 50, True) for _ in range(200))
    policy.observe(StepRecord(0.01, 50, 50, 0, finished=finished, arrived=(100,) * 200))
    found = []
    for count in (120, 110, 90):
        running = [SequenceState(101, 1, 0)] * count
        decision = policy.decide(snapshot(count, 500, read_running=running.copy))
        found.append((decision.limits.max_num_seqs, decision.wanted_seqs))
    assert found == [(120, 106), (110, 106), (106, None)]


@given(
    states=st.lists(
        st.tuples(st.integers(0, 256), st.integers(0, 1000), st.integers(0, 50)), max_size=50
    )
)
def test_1a_never_leaves_n_to_b_max(states):
    policy = MemoryPolicy(MemoryParameters())
    for running, used, waiting in states:
        decision = policy.decide(snapshot(running, used, waiting))
        if waiting and running and used:
            assert running <= decision.limits.max_num_seqs <= 256


def test_of_two_rules_that_what_runs_holds_up_the_one_that_wants_fewer_is_meant():
    """`memory+sla`: 190 fit, and the latency search begins at 132 or so, while 200 run."""
    sla = SlaPolicy(SlaParameters(itl_slo_ms=50.0)).decide(snapshot(200, 1000))
    policy = MemorySlaPolicy(MemorySlaParameters(itl_slo_ms=50.0, sla="sla"))
    both = policy.decide(snapshot(200, 1000))
    assert both.limits.max_num_seqs == sla.limits.max_num_seqs == 200
    assert both.wanted_seqs == sla.wanted_seqs < 190
    lower = policy.decide(snapshot(100, 1000))  # 95 fit
    assert (lower.limits.max_num_seqs, lower.wanted_seqs) == (100, 95)
