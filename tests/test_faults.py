"""Faults under load: no request fails or is lost, and throughput is the local policy's.

The engine is vLLM's scheduler on a virtual GPU, paced by the real clock, and follows its service
through a real gRPC stream. Service and local policy want the same, so that a run in which nothing
nonsensical was ever applied takes exactly the engine time that the local policy alone takes.
"""

import time

import pytest
from faults import FAULTS, Scale, World, striking
from tuner_double import until

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import Source
from batchpilot.env.engine import EngineRequest
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig

SCALE = Scale()
#: Engine seconds in a second: the run lasts as long as the faults, the engine has more to do.
PACE = 4.0
REQUESTS = 100


@pytest.fixture(scope="module")
def engine():
    config = VirtualEngineConfig(
        "llama-3.1-8b-rtx4090", max_num_seqs=64, max_num_batched_tokens=2048
    )
    with VirtualEngine(config) as engine:
        yield engine


def requests(tag=""):
    return [EngineRequest(f"{tag}{i}", [7] * (40 + i % 60), 60 + i % 80) for i in range(REQUESTS)]


def serve(engine, work, *, pace=None, limits=None):
    """Serves the requests to the end; returns tokens by request and the engine's time."""
    tokens = {}
    began, began_at = engine.clock_seconds, time.monotonic()
    for request in work:
        engine.add_request(request)
    while engine.has_unfinished_requests():
        step = engine.step()
        for name, count in step.new_tokens.items():
            tokens[name] = tokens.get(name, 0) + count
        if limits is not None:
            limits.add(engine.applied_limits)
        if pace is not None:
            ahead = (step.clock_seconds - began) / pace - (time.monotonic() - began_at)
            time.sleep(max(0.0, ahead))
    return tokens, engine.clock_seconds - began


def wanted(work):
    return {request.request_id: request.output_tokens for request in work}


@pytest.fixture(scope="module")
def local_seconds(engine):
    engine.reset()
    engine.set_policy(PolicySpec.parse(SCALE.local).build())
    tokens, seconds = serve(engine, requests())
    assert tokens == wanted(requests())
    return seconds


@pytest.fixture
def world(tmp_path):
    world = World(SCALE, tmp_path)
    yield world
    world.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_no_fault_costs_a_request_or_time(engine, local_seconds, world, fault):
    engine.reset()
    link = world.follow(engine.facts, **fault.prepare(world))
    engine.set_policy(link.policy)
    link.policy.attach(engine._hook)
    limits = set()
    with striking(world, fault) as log:
        tokens, seconds = serve(engine, requests(), pace=PACE, limits=limits)
        rounds = 0
        while not log.over and rounds < 20:  # until the engine follows the service again
            rounds += 1
            more = requests(f"{rounds}.")
            assert serve(engine, more, pace=PACE, limits=limits)[0] == wanted(more)
    assert log.error is None, log.error
    assert tokens == wanted(requests())
    seqs = {limit.max_num_seqs for limit in limits}
    if fault.name == "two services in conflict":
        assert seqs <= {23, 24}
        assert seconds == pytest.approx(local_seconds, rel=0.02)
    else:
        assert seqs == {24}
        assert seconds == pytest.approx(local_seconds, rel=1e-9)
    assert fault.has_struck(link), (link.client.stats.failures, link.client.stats.leases)
    assert engine._hook.stats.decisions[Source.REMOTE] > 0


def test_an_engine_that_ends_in_the_middle_of_a_stream_leaves_nothing_behind(engine, world):
    engine.reset()
    world.stand_in(world.good_double())
    link = world.follow(engine.facts)
    engine.set_policy(link.policy)
    rounds = 0
    while not link.client.stats.leases["accepted"] and rounds < 20:
        rounds += 1
        serve(engine, requests(f"{rounds}."), pace=PACE)
    assert link.client.stats.leases["accepted"] > 0
    link.client.close()
    assert link.client._thread is not None
    assert until(lambda: not link.client._thread.is_alive())
    last = requests("last")
    assert serve(engine, last)[0] == wanted(last)
