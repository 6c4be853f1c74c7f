"""Policies by name: the text form and its errors."""

import pytest

from batchpilot.agents.catalog import POLICIES, PolicySpec
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, Source
from batchpilot.agents.parameters import ConfigError

TARGETS = {"itl_slo_ms": 50.0}


def test_a_spec_reads_back_what_it_prints():
    spec = PolicySpec.parse("static:max_num_seqs=64:max_num_batched_tokens=2048")
    assert spec == PolicySpec("static", {"max_num_seqs": "64", "max_num_batched_tokens": "2048"})
    assert PolicySpec.parse(str(spec)) == spec


def test_parameters_reach_the_policy():
    policy = PolicySpec.parse("static:max_num_seqs=64").build()
    facts = EngineFacts(BatchLimits(128, 4096), total_blocks=100, block_size=16)
    decision = policy.decide(EngineSnapshot(facts, clock_seconds=0.0, running=0, waiting=0))
    assert decision.limits == BatchLimits(64, 4096)
    assert decision.source is Source.STATIC


def test_shared_targets_go_only_to_policies_that_take_them_and_a_spec_wins_over_them():
    assert PolicySpec("static").build(TARGETS)
    own = PolicySpec("sla", {"itl_slo_ms": 20}).build(TARGETS)
    assert own._params.itl_slo_ms == 20.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("statik", "unknown policy 'statik'; known: static, memory"),
        ("watermark:0.05", "unknown policy 'watermark'; known: static, memory"),
        ("statik:a=1:a=2", "unknown policy 'statik'; known: static, memory"),
        ("", "unknown policy ''; known: static"),
        ("static:64", "'64' is not key=value"),
        ("static:max_num_seqs=", "'max_num_seqs=' is not key=value"),
        ("static:max_num_seqs=1:max_num_seqs=2", "max_num_seqs is given twice"),
        ("static:max_num_seqs=1,max_num_batched_tokens=2", "write ':' between parameters, not ','"),
        ("static:seqs=64", "policy 'static': unknown key 'seqs'; allowed: max_num_seqs"),
        ("memory:memory_factor=2", "policy 'memory': memory_factor=2.0 must be at most 1"),
        ("sla", "policy 'sla': itl_slo_ms is required"),
        ("sla:itl_slo_ms=0", "itl_slo_ms=0.0 must be greater than 0"),
        ("sla:itl_slo_ms=nan", "itl_slo_ms='nan' is not a finite number"),
        ("sla:itl_slo_ms=50:alpha=4:delta=4", "delta=4 must be less than alpha=4"),
        ("memory+sla:itl_slo_ms=50:memory=most", "memory='most' is not one of: memory"),
    ],
)
def test_a_spec_that_cannot_be_built_says_why(text, message):
    with pytest.raises(ConfigError) as refusal:
        PolicySpec.parse(text).build()
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_documents_its_formula_regimes_and_limitations(name):
    kind = POLICIES[name]
    text = kind.build.__doc__
    for heading in ("Formula", "Limitations:"):
        assert heading in text, f"{name} has no {heading}"
    for field in kind.parameters.__dataclass_fields__.values():
        assert field.metadata["help"]
