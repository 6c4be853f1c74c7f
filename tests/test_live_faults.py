"""The faults of tests/faults.py on a live vLLM under load: the tiny model, one engine for all.

Service and local policy want different limits, so that what is applied shows who decided. Nothing
here looks at how long anything took: `make chaos` measures that, on a larger model.
"""

import time

import pytest
from faults import FAULTS, Scale, World, striking
from traffic import Traffic

from batchpilot.agents.limits import BatchLimits, Source

#: What every vLLM is served with, what it decides itself, and what its service wants.
STARTUP, LOCAL, SERVED = 16, 12, 10
TOKENS = 256
SCALE = Scale(
    local=f"static:max_num_seqs={LOCAL}",
    served=f"static:max_num_seqs={SERVED}",
    good=BatchLimits(SERVED, TOKENS),
)
#: Nothing that is awaited takes longer, on however busy a machine.
PATIENCE_SECONDS = 90.0

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def engine(tiny_engine):
    return tiny_engine(max_num_seqs=STARTUP, max_num_batched_tokens=TOKENS)


@pytest.fixture
def world(tmp_path):
    world = World(SCALE, tmp_path)
    yield world
    world.close()


def allowed(fault):
    """The limits that may ever be in force; between two while sequences in excess end."""
    least = SERVED - 1 if fault.name == "two services in conflict" else SERVED
    return {BatchLimits(seqs, TOKENS) for seqs in range(least, LOCAL + 1)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_under_load_no_request_is_lost_and_the_right_one_decides(engine, world, fault):
    link = world.follow(engine.facts, **fault.prepare(world))
    engine.set_policy(link.policy)
    link.policy.attach(engine._hook)
    world.is_local = lambda: engine.decision.source is Source.FALLBACK
    traffic = Traffic(engine, concurrency=20, prompt_tokens=24, output_tokens=16)
    try:
        with striking(world, fault) as log:
            before = traffic.serve(patiently(lambda: log.struck_at or log.error, world))
            during = traffic.serve(patiently(lambda: log.over, world))
            assert log.error is None, log.error
            after = traffic.serve(patiently(lambda: engine.decision.source is Source.REMOTE, world))
    finally:
        lost = traffic.finish()  # also where it failed: the next one has the same engine
    assert lost == 0
    assert traffic.served == traffic.asked >= 20
    assert before.limits | during.limits | after.limits <= allowed(fault)
    if fault.goes_local:
        assert during.decisions[Source.FALLBACK] > 0
    assert fault.has_struck(link), world.why()


def patiently(condition, world):
    """The condition, which must come true in time."""
    gives_up_at = time.monotonic() + PATIENCE_SECONDS

    def check():
        assert time.monotonic() < gives_up_at, world.why()
        return condition()

    return check
