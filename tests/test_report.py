"""Metrics and log lines: what an operator sees is what the hook did."""

import logging
import socket
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from driving import build_core, drive, random_requests
from prometheus_client import generate_latest

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.latency_limits import OUT_OF_REACH
from batchpilot.agents.parameters import ConfigError
from batchpilot.scheduler_hook import report
from batchpilot.scheduler_hook.report import COUNTERS, GAUGES, Metrics, Reporter
from batchpilot.scheduler_hook.settings import HookSettings
from batchpilot.service.process_meter import free_port


def test_the_docs_name_every_metric():
    root = Path(__file__).parents[1]
    docs = (root / "README.md").read_text() + (root / "docs" / "service.md").read_text()
    gauges = {**GAUGES, **report.REMOTE_GAUGES, **report.SHADOW_GAUGES}
    counters = {**COUNTERS, **report.REMOTE_COUNTERS, **report.SHADOW_COUNTERS}
    names = [f"batchpilot_{name}" for name in gauges]
    names += [f"batchpilot_{name}_total" for name in counters]
    assert [name for name in names if name not in docs] == []


@pytest.fixture
def core():
    core = build_core(async_scheduling=False)
    core.hook.set_policy(PolicySpec.parse("memory").build())
    return core


def samples(text):
    """Prometheus text as {name{labels}: value}."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def series(values, name):
    return {key: v for key, v in values.items() if key.startswith(f"batchpilot_{name}{{")}


def test_every_metric_carries_the_hooks_own_totals(core):
    drive(core, random_requests(0))
    metrics = Metrics("a-model", 3)
    metrics.publish(core.hook)
    metrics.publish(core.hook)  # counters count once, however often they are published
    values = samples(generate_latest(metrics.registry).decode())
    labels = '{engine="3",model_name="a-model"}'
    stats = core.hook.stats
    assert values[f"batchpilot_steering{labels}"] == 1
    assert values[f"batchpilot_applied_max_num_batched_tokens{labels}"] == 256
    assert values[f"batchpilot_preemptions_total{labels}"] == stats.preemptions > 0
    assert values[f"batchpilot_recomputed_tokens_total{labels}"] == stats.recomputed_tokens
    assert values[f"batchpilot_hook_seconds_total{labels}"] == pytest.approx(stats.hook_seconds)
    assert sum(series(values, "steps_total").values()) == sum(stats.steps.values())
    by_kv = 'batchpilot_steps_total{binding="kv_cache",engine="3",model_name="a-model"}'
    assert values[by_kv] == stats.steps["kv_cache"] > 0
    assert sum(series(values, "decisions_total").values()) == sum(stats.decisions.values())
    assert all(series(values, name) for name in GAUGES)
    assert all(series(values, f"{name}_total") for name in COUNTERS if name != "clamps")


def test_a_port_of_our_own_serves_them_until_the_engine_closes(core):
    port = free_port()
    reporter = Reporter(core.hook, core.hook._adapter, HookSettings(metrics_port=port))
    page = f"http://127.0.0.1:{port}/metrics"
    assert "batchpilot_applied_max_num_seqs" in urllib.request.urlopen(page).read().decode()
    reporter.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(page)


def test_a_port_in_use_stops_the_server_at_start_with_a_clear_message(core):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refusal:
            Reporter(core.hook, core.hook._adapter, HookSettings(metrics_port=port))
    assert f"metrics_port: cannot listen on 127.0.0.1:{port}" in str(refusal.value)
    assert "choose a free port" in str(refusal.value)


def test_one_line_says_what_is_going_on_and_an_idle_engine_says_nothing(core, caplog):
    drive(core, random_requests(0))
    reporter = Reporter(core.hook, core.hook._adapter, HookSettings())
    logging.getLogger("vllm.batchpilot").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="vllm.batchpilot"):
            reporter._log()
            first = caplog.text
            reporter._log()
    finally:
        logging.getLogger("vllm.batchpilot").removeHandler(caplog.handler)
        reporter.close()
    assert "memory wants" in first
    assert f"{core.hook.stats.preemptions} preemptions so far" in first
    assert caplog.text == first


def test_a_target_that_stays_out_of_reach_is_told_once(core, monkeypatch):
    drive(core, random_requests(0))
    told = []
    monkeypatch.setattr(report.logger, "warning", lambda text, *values: told.append(text % values))
    reporter = Reporter(core.hook, core.hook._adapter, HookSettings())
    told_after = []
    for reason in (OUT_OF_REACH, "within reach", *[OUT_OF_REACH] * 4):
        monkeypatch.setattr(core.hook, "decision", replace(core.hook.decision, reason=reason))
        reporter._logged_steps = -1
        reporter._log()
        told_after.append(len(told))
    reporter.close()
    assert told_after == [0, 0, 0, 1, 1, 1]
    assert "itl_slo_ms is out of reach here" in told[0]
