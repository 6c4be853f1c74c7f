"""Live against virtual: the same steps and the same decisions on the same requests."""

from dataclasses import replace

import pytest

from batchpilot.agents.limits import BatchLimits, Decision, EngineFacts, EngineSnapshot, Source
from batchpilot.agents.memory import MemoryParameters, MemoryPolicy
from batchpilot.agents.parameters import ConfigError
from batchpilot.env import fidelity_live
from batchpilot.env.fidelity_live import (
    Setup,
    Tolerance,
    compare,
    comparison_table,
    main,
    relative_error,
    virtual_config,
)
from batchpilot.env.profiles import load_profile
from batchpilot.env.witness import WitnessedPolicy, decides_again

FACTS = EngineFacts(BatchLimits(64, 2048), total_blocks=100, block_size=32)
# Time is no part of what is compared below, so that any profile will do.
PROFILE = replace(load_profile("llama-3.1-8b-h100"), block_size=32)
TINY = Setup(model="tiny", max_num_seqs=32, max_num_batched_tokens=512, kv_blocks=48)


@pytest.mark.live
def test_live_and_virtual_engine_take_the_same_steps_and_a_fresh_policy_the_same_decisions():
    policies = ["static", "memory", "memory-peak"]
    comparisons = compare(TINY, PROFILE, policies, rounds=1, num_requests=16)
    for item in comparisons:
        assert item.preemptions("live") == item.preemptions("virtual")
        assert item.steps("live") == item.steps("virtual") == item.equal_steps > 100
        assert item.equal_decisions == item.decisions == item.steps("live")
    assert comparisons[0].preemptions("live") > 0
    assert comparisons[0].policy == "static"
    assert len(comparison_table(comparisons, "title").rows) == 18


def snapshot(running, used):
    return EngineSnapshot(FACTS, 0.0, running=running, waiting=5, used_blocks=used)


class Reader:
    """Decides by what it reads."""

    def observe(self, step):
        del step

    def decide(self, seen):
        total = len(seen.read_running()) + len(seen.read_waiting(2))
        return Decision(BatchLimits(1 + total, 64), Source.STATIC, "read")


def test_a_fresh_policy_decides_again_what_a_witnessed_one_did():
    witness = WitnessedPolicy(MemoryPolicy(MemoryParameters()))
    for running, used in [(4, 10), (8, 40), (8, 60)]:
        witness.decide(snapshot(running, used))
    assert decides_again(witness.events, MemoryPolicy(MemoryParameters())) == 3
    other = MemoryPolicy(MemoryParameters(memory_factor=0.3))
    assert decides_again(witness.events, other) < 3


def test_what_was_read_of_the_sequences_is_shown_again():
    witness = WitnessedPolicy(Reader())
    seen = snapshot(2, 4)._replace(read_running=lambda: [1, 2], read_waiting=lambda n: [0] * n)
    assert witness.decide(seen).limits.max_num_seqs == 5
    assert decides_again(witness.events, Reader()) == 1


def test_a_policy_that_reads_more_than_the_witnessed_one_does_not_count_as_equal():
    witness = WitnessedPolicy(MemoryPolicy(MemoryParameters()))
    witness.decide(snapshot(4, 10))
    assert decides_again(witness.events, Reader()) == 0


def test_a_profile_of_another_block_size_is_refused():
    with pytest.raises(ConfigError, match="block_size=16 must be 32"):
        virtual_config(TINY, replace(PROFILE, block_size=16), 4096)


def test_a_profile_that_does_not_fit_is_refused_before_an_engine_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path))
    monkeypatch.setattr(fidelity_live, "LiveEngine", lambda config: pytest.fail("started"))
    with pytest.raises(ConfigError, match="block_size=16 must be 32"):
        compare(TINY, replace(PROFILE, block_size=16), ["static"], rounds=1, num_requests=4)


@pytest.mark.parametrize(
    ("policy", "message"), [("magic", "unknown policy 'magic'"), ("sla", "itl_slo_ms is required")]
)
def test_a_policy_that_cannot_be_built_is_refused_before_an_engine_starts(
    policy, message, monkeypatch, capsys
):
    monkeypatch.setattr(fidelity_live, "calibrate", lambda *_: pytest.fail("started"))
    assert main(["--policies", "static", policy]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("virtual", "live", "error"), [(0, 0, 0.0), (11, 10, 0.1), (9, 10, -0.1), (1, 0, float("inf"))]
)
def test_errors_are_shares_of_the_live_value(virtual, live, error):
    assert relative_error(virtual, live) == pytest.approx(error)


def test_the_tolerances_are_those_of_the_table():
    assert Tolerance() == Tolerance(throughput=0.10, preemptions=0.20, steps=0.02)
