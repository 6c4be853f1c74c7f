"""A shadow is watched and never felt: not in the limits, not when it fails, not by the engine."""

import json
import logging

import pytest
from driving import Flapping, build_core, drive, random_requests
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from batchpilot.__main__ import main
from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.shadow import Agreement, ShadowedPolicy
from batchpilot.agents.shield import SafetyBounds
from batchpilot.agents.static import StaticParameters, StaticPolicy
from batchpilot.env.bench.contestants import parse_contestants
from batchpilot.scheduler_hook.report import Metrics, Reporter
from batchpilot.scheduler_hook.settings import HookSettings

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=1000, block_size=16)
STEP = StepRecord(0.01, 10, 10, 0)


def snapshot(running=10):
    return EngineSnapshot(FACTS, 0.0, running, waiting=5)


def static(seqs=None, tokens=None):
    return StaticPolicy(StaticParameters(seqs, tokens))


class Failing:
    """Fails where it is told to."""

    def __init__(self, where):
        self.where = where

    def observe(self, step):
        if self.where == "observe":
            raise ValueError("no")

    def decide(self, snapshot):
        if self.where == "decide":
            raise ValueError("no")
        return static(64).decide(snapshot)


@pytest.mark.parametrize(
    ("limits", "agreement"),
    [
        ((None, None), Agreement.SAME),
        ((64, None), Agreement.MAX_NUM_SEQS),
        ((None, 512), Agreement.MAX_NUM_BATCHED_TOKENS),
        ((64, 512), Agreement.BOTH),
        ((1000, 9000), Agreement.SAME),  # the shield brings both to the start-up limits
    ],
)
def test_the_first_policy_decides_and_the_second_is_compared(limits, agreement):
    policy = ShadowedPolicy(static(), static(*limits))
    assert policy.decide(snapshot()).limits == BatchLimits(256, 2048)
    assert policy.agreement == {agreement: 1}
    expected = BatchLimits(min(limits[0] or 256, 256), min(limits[1] or 2048, 2048))
    assert policy.limits == expected


def test_what_is_compared_would_have_applied():
    policy = ShadowedPolicy(static(), static(4, 8), SafetyBounds(min_prefill_chunk=64))
    policy.decide(snapshot(running=10))
    assert policy.limits == BatchLimits(10, 74)  # ten run, and a chunk of 64 beside their tokens


@pytest.mark.parametrize("where", ["observe", "decide"])
def test_an_exception_ends_the_shadow_and_nothing_else(where):
    policy = ShadowedPolicy(static(100), Failing(where))
    for _ in range(3):
        policy.observe(STEP)
        assert policy.decide(snapshot()).limits == BatchLimits(100, 2048)
    assert policy.failure == "ValueError: no"
    assert policy.limits is None
    assert policy.agreement == {}


def test_an_exception_of_the_first_is_not_hidden():
    with pytest.raises(ValueError, match="no"):
        ShadowedPolicy(Failing("decide"), static()).decide(snapshot())


@given(
    name=st.sampled_from(["memory", "memory-peak", "memory-clt", "trtllm", "p-pas", "aimd"]),
    shadow=st.sampled_from(["memory-peak", "gradient2", "static:max_num_seqs=3"]),
    states=st.lists(st.tuples(st.integers(0, 256), st.integers(0, 9)), max_size=30),
)
def test_decisions_are_those_of_the_first_alone(name, shadow, states):
    alone = PolicySpec.parse(name).build()
    policy = ShadowedPolicy(PolicySpec.parse(name).build(), PolicySpec.parse(shadow).build())
    for running, waiting in states:
        seen = EngineSnapshot(FACTS, 0.0, running, waiting, used_blocks=4 * running)
        assert policy.decide(seen) == alone.decide(seen)
        alone.observe(STEP)
        policy.observe(STEP)
    assert policy.failure is None


def test_vllm_schedules_the_same_whatever_the_shadow_wants():
    alone, beside = build_core(), build_core()
    alone.hook.set_policy(PolicySpec.parse("memory").build())
    beside.hook.set_policy(ShadowedPolicy(PolicySpec.parse("memory").build(), Flapping(3)))
    expected = drive(alone, random_requests(0))
    assert drive(beside, random_requests(0)) == expected
    assert sum(beside.hook.policy.agreement.values()) == len(expected.steps)


def test_the_settings_build_it_with_the_shared_targets():
    settings = HookSettings(policy="static", shadow="memory+sla", itl_slo_ms=40)
    policy = settings.with_shadow(settings.build_policy())
    assert policy.decide(snapshot()).limits == FACTS.startup_limits
    assert policy.limits == BatchLimits(128, 2048)  # the middle of Algorithm 2's first interval
    assert isinstance(HookSettings().with_shadow(static()), StaticPolicy)
    with pytest.raises(ConfigError, match="policy 'sla': itl_slo_ms is required"):
        HookSettings(shadow="sla")


def test_metrics_and_log_lines_say_what_it_would_have_done(caplog):
    core = build_core(async_scheduling=False)
    policy = ShadowedPolicy(static(), static(8, 100))
    core.hook.set_policy(policy)
    drive(core, random_requests(0))
    metrics = Metrics("a-model", 3, shadow=policy)
    metrics.publish(core.hook)
    labels = '{engine="3",model_name="a-model"}'
    text = generate_latest(metrics.registry).decode()
    assert f"batchpilot_shadow_active{labels} 1.0" in text
    assert f"batchpilot_shadow_max_num_seqs{labels} {policy.limits.max_num_seqs}.0" in text
    assert f"batchpilot_shadow_max_num_batched_tokens{labels} " in text
    both = 'batchpilot_shadow_steps_total{agreement="both",engine="3",model_name="a-model"} '
    assert f"{both}{policy.agreement[Agreement.BOTH]}.0" in text

    caplog.set_level(logging.INFO, "vllm.batchpilot")
    adapter = core.hook._require_adapter()
    settings = HookSettings(shadow="static:max_num_seqs=8:max_num_batched_tokens=100")
    reporter = Reporter(core.hook, adapter, settings)
    reporter._log()
    assert "the shadow static:max_num_seqs=8:max_num_batched_tokens=100 would have" in caplog.text
    policy.failure = "ValueError: no"
    reporter._logged_steps = 0
    reporter._log()
    reporter._logged_steps = 0
    reporter._log()
    reporter.close()
    assert caplog.text.count("has failed and is left out from now on") == 1


def test_a_shadow_without_a_policy_of_ours_beside_it_is_refused():
    with pytest.raises(ConfigError, match="shadow='memory' needs a policy of ours"):
        parse_contestants("watermark:0.05", {}, "memory")


def test_the_bench_records_and_draws_it(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["--engine", "virtual", "--profile", "llama-3.1-8b-rtx4090", "--workers", "1"]
    words += ["--workload", "fixed:prompt_tokens=64:output_tokens=8", "--rounds", "1"]
    words += [
        "--num-requests",
        "20",
        "--arrivals",
        "poisson:3",
        "--policies",
        "static,watermark:0.05",
    ]
    shadow = ["--shadow", "static:max_num_seqs=7:max_num_batched_tokens=99"]
    assert main(["bench", *words, *shadow]) == 0
    assert main(["bench", *words, *shadow, "--json", "again.json"]) == 0  # from what was kept
    assert main(["bench", *words, "--json", "alone.json", "--html", "alone.html"]) == 0

    def runs(name):
        return json.loads((tmp_path / name).read_text())["runs"]

    ours, stock = runs("results.json")
    assert set(ours["timeline"]["shadow_max_num_seqs"]) == {7}
    assert set(ours["timeline"]["shadow_max_num_batched_tokens"]) == {99}
    assert "shadow_max_num_seqs" not in stock["timeline"]
    assert runs("again.json") == [ours, stock]
    alone = runs("alone.json")[0]
    for name in ("shadow_max_num_seqs", "shadow_max_num_batched_tokens"):
        del ours["timeline"][name]
    assert alone == ours
    assert "dashed: the shadow" in (tmp_path / "report.html").read_text()
