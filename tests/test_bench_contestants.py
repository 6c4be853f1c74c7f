from __future__ import annotations

import pytest
from bench_engine import QueueEngine

from batchpilot.agents.catalog import POLICIES
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.static import StaticPolicy
from batchpilot.env.bench.contestants import Contestant, describe_policies, parse_contestants


def test_policies_keep_their_order_and_text():
    found = parse_contestants("static, watermark:0.05,static:max_num_seqs=64", {})
    assert [c.label for c in found] == ["static", "watermark:0.05", "static:max_num_seqs=64"]
    assert [c.watermark for c in found] == [0.0, 0.05, 0.0]


def test_watermark_leaves_vllm_alone():
    contestant = Contestant.parse("watermark:0.05")
    assert contestant.build({}) is None
    engine = QueueEngine()
    contestant.steer(engine, {})
    assert engine.policies == [(None, 0.05)]


def test_every_build_is_a_fresh_policy():
    contestant = Contestant.parse("static")
    first, second = contestant.build({}), contestant.build({})
    assert isinstance(first, StaticPolicy)
    assert first is not second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "unknown policy 'nothing'; known: static"),
        ("static:rows=3", "unknown key 'rows'; allowed: max_num_seqs"),
        ("static:max_num_seqs=0", "max_num_seqs=0 must be at least 1"),
        ("static:max_num_seqs=nan", "max_num_seqs='nan' is not a whole number"),
        ("static:64", "'64' is not key=value"),
        ("static,", "a policy's name is empty"),
        ("", "a policy's name is empty"),
        ("static,static", "policy 'static' is given twice"),
        ("watermark", "policy 'watermark' needs its share, such as watermark:0.05"),
        ("watermark:0", "watermark=0.0 must be greater than 0"),
        ("watermark:1", "watermark=1.0 must be less than 1"),
        ("watermark:nan", "watermark='nan' is not a finite number"),
        ("watermark:much", "watermark='much' is not a finite number"),
    ],
)
def test_bad_policies_are_named(text, message):
    with pytest.raises(ConfigError, match="^" + ".*" + message.replace("'", "['\"]")):
        parse_contestants(text, {})


def test_an_unknown_policy_is_told_of_watermark_too():
    with pytest.raises(ConfigError, match=r"watermark:SHARE$"):
        parse_contestants("nothing", {})


def test_a_policy_that_needs_a_target_takes_the_shared_one():
    with pytest.raises(ConfigError, match="itl_slo_ms is required"):
        parse_contestants("sla", {"itl_slo_ms": None})
    assert parse_contestants("sla", {"itl_slo_ms": 50.0})[0].label == "sla"


def test_every_policy_has_one_line():
    listing = dict(describe_policies())
    assert list(listing) == [*POLICIES, "watermark:SHARE"]
    assert all(text and "\n" not in text for text in listing.values())
