"""The hook's settings: where they come from, who wins, and what every refusal says."""

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.predictive import PredictivePolicy
from batchpilot.agents.shield import SafetyBounds
from batchpilot.scheduler_hook.settings import HookSettings, read_settings


def read(section=None, **environment):
    return read_settings({"batchpilot": section or {}, "other": {"plugin": 1}}, environment)


def test_without_settings_the_hook_steers_locally():
    assert read_settings({}, {}) == HookSettings()
    assert read_settings(None, {}) == HookSettings()
    assert HookSettings().mode == "local"


def test_a_target_alone_is_enough_to_be_held():
    policy = HookSettings(itl_slo_ms=50.0).build_policy()
    assert isinstance(policy, PredictivePolicy)
    assert policy.step_time is not None
    assert HookSettings().build_policy().step_time is None


def test_the_environment_wins_over_the_command_line():
    settings = read(
        {"mode": "observe", "policy": "memory:memory_factor=0.9", "max_num_seqs": 64},
        BATCHPILOT_MODE="local",
        BATCHPILOT_MIN_NUM_SEQS="4",
        PATH="/usr/bin",
    )
    assert (settings.mode, settings.policy) == ("local", "memory:memory_factor=0.9")
    assert settings.bounds == SafetyBounds(4, 64, 64)


def test_the_targets_reach_the_policy():
    policy = read({"policy": "memory+sla", "itl_slo_ms": 40}).build_policy()
    assert policy._sla._params.itl_slo_ms == 40.0


def test_variables_of_other_parts_are_left_alone():
    assert read(BATCHPILOT_CACHE="somewhere") == HookSettings()


SERVICE_LINKS = {
    "BATCHPILOT_TUNER_SERVICE_HOST": "10.0.0.7",
    "BATCHPILOT_TUNER_SERVICE_PORT": "50061",
    "BATCHPILOT_TUNER_SERVICE_PORT_GRPC": "50061",
    "BATCHPILOT_TUNER_PORT": "tcp://10.0.0.7:50061",
    "BATCHPILOT_TUNER_PORT_50061_TCP": "tcp://10.0.0.7:50061",
    "BATCHPILOT_TUNER_PORT_50061_TCP_ADDR": "10.0.0.7",
}


@pytest.mark.parametrize("service", ["BATCHPILOT_TUNER", "BATCHPILOT"])
def test_what_kubernetes_sets_for_a_service_of_that_name_is_no_setting(service):
    links = {k.replace("BATCHPILOT_TUNER", service): text for k, text in SERVICE_LINKS.items()}
    settings = read(**links, BATCHPILOT_METRICS_PORT="9000", BATCHPILOT_SERVICE_GROUP="chat")
    assert settings == HookSettings(metrics_port=9000, service_group="chat")
    with pytest.raises(ConfigError, match="unknown variable BATCHPILOT_METRIC_PORT"):
        read(**links, BATCHPILOT_METRIC_PORT="9000")


def test_the_least_chunk_reaches_the_policy():
    policy = read({"itl_slo_ms": 40, "min_prefill_chunk": 512}).build_policy()
    assert policy._latency.trust.kept_so_far == 512


def test_off_needs_no_valid_policy():
    assert read({"mode": "off", "policy": "sla"}).mode == "off"


@pytest.mark.parametrize(
    ("section", "environment", "message"),
    [
        ({"mod": "local"}, {}, "unknown key 'mod'; allowed: mode, policy, itl_slo_ms"),
        ({"mode": "far"}, {}, "mode='far' is not one of: off, observe, local, remote"),
        ({"mode": "remote"}, {}, "service_targets is required in mode remote"),
        ({"policy": "magic"}, {}, "unknown policy 'magic'; known: static, memory"),
        ({"policy": "memory:factor=1"}, {}, "policy 'memory': unknown key 'factor'"),
        ({"policy": "sla"}, {}, "policy 'sla': itl_slo_ms is required"),
        ({"itl_slo_ms": 0}, {}, "itl_slo_ms=0.0 must be greater than 0"),
        ({"itl_slo_ms": float("nan")}, {}, "itl_slo_ms=nan is not a finite number"),
        ({"ttft_slo_ms": "fast"}, {}, "ttft_slo_ms='fast' is not a finite number"),
        ({"max_num_seqs": 0}, {}, "max_num_seqs=0 must be at least 1"),
        ({"min_num_seqs": 9, "max_num_seqs": 8}, {}, "max_num_seqs=8 must be at least min_num"),
        ({"metrics_port": 70000}, {}, "metrics_port=70000 must be at most 65535"),
        ({}, {"BATCHPILOT_MOD": "local"}, "unknown variable BATCHPILOT_MOD; allowed: BATCHPILOT_"),
        ({}, {"BATCHPILOT_ITL_SLO_MS": "-5"}, "itl_slo_ms=-5.0 must be greater than 0"),
        ("local", {}, "additional_config[\"batchpilot\"]='local' is not a JSON object"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(section, environment, message):
    with pytest.raises(ConfigError) as refusal:
        read_settings({"batchpilot": section}, environment)
    assert message in str(refusal.value)
