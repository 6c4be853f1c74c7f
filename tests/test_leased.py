"""What a policy in a service makes of an engine, report by report, in virtual time."""

import pytest
from leased import follow

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, Decision, Source
from batchpilot.env.engine import EngineRequest
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig

LONGEST_OUTPUT = 120


@pytest.fixture(scope="module")
def engine():
    config = VirtualEngineConfig(
        "llama-3.1-8b-rtx4090", max_num_seqs=64, kv_blocks=250
    )  # 64 of them do not fit
    with VirtualEngine(config) as engine:
        yield engine


def saturated(engine, count):
    """Puts an engine back to its start, with so many requests of many lengths before it."""
    engine.abort_all()
    engine.reset()
    for number in range(count):
        output = 20 + 37 * number % (LONGEST_OUTPUT - 19)
        engine.add_request(EngineRequest(f"r{number}", [7] * 40, output))


class Wants:
    """A policy that wants so many sequences, and any tokens."""

    def __init__(self, max_num_seqs):
        self.max_num_seqs = max_num_seqs

    def observe(self, step):
        pass

    def decide(self, snapshot):
        tokens = snapshot.engine.startup_limits.max_num_batched_tokens
        return Decision(BatchLimits(self.max_num_seqs, tokens), Source.STATIC, "wanted")


def test_a_limit_that_falls_is_reached_as_soon_as_sequences_have_ended(engine):
    """While requests wait: nobody comes in until fewer run than are wanted."""
    saturated(engine, 1000)
    policy = Wants(40)
    follow(engine, policy)
    while engine.applied_limits.max_num_seqs != 40:
        engine.step()
    for _ in range(LONGEST_OUTPUT):
        engine.step()
    policy.max_num_seqs, fell_at, running = 10, engine.clock_seconds, [40]
    while engine.clock_seconds < fell_at + 0.3:  # an interval, and the step in which it ends
        engine.step()
    while running[-1] > 10:
        engine.step()
        running.append(engine.snapshot().running)
        assert len(running) <= LONGEST_OUTPUT
    assert running == sorted(running, reverse=True)
    assert engine.snapshot().waiting > 0
    engine.set_policy(None)


def served(engine, policy, distance):
    """All requests under a policy, beside the engine or in a service: preemptions and seconds."""
    saturated(engine, 300)
    spec, preemptions = PolicySpec.parse(policy), 0
    if distance:
        follow(engine, spec.build(), wants_detail=spec.needs_steps({}))
    else:
        engine.set_policy(spec.build())
    while engine.has_unfinished_requests():
        record = engine.step().record
        preemptions += record.preemptions if record else 0
    engine.set_policy(None)
    return preemptions, engine.clock_seconds


@pytest.mark.parametrize(
    ("policy", "near", "far"), [("memory", 8, 14), ("memory-peak", 0, 0), ("predictive", 0, 0)]
)
def test_memory_is_watched_from_a_distance_nearly_as_well(engine, policy, near, far):
    """vLLM's default, which lets in all that find a block free, preempts 21."""
    assert served(engine, "static", distance=False)[0] == 21
    preemptions, near_seconds = served(engine, policy, distance=False)
    assert preemptions == near
    preemptions, far_seconds = served(engine, policy, distance=True)
    assert preemptions == far
    assert far_seconds < 1.02 * near_seconds
