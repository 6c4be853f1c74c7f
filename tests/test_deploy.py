"""The examples in deploy/: every metric exists, every setting is known, every file parses."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from batchpilot.__main__ import main
from batchpilot.scheduler_hook import report
from batchpilot.service.meters import Meters
from batchpilot.service.metrics import ServiceCollector
from batchpilot.service.sessions import SessionTable
from batchpilot.service.settings import parse_settings

FOLDER = Path(__file__).parents[1] / "deploy"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def service_metrics():
    """Every name on the service's page, with its suffixes."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(Meters(), SessionTable(10, 1.0, 1), 10))
    text = generate_latest(registry).decode()
    kinds = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    histograms = [name for name, kind in kinds if kind == "histogram"]
    return {name for name, _ in kinds} | {f"{name}_bucket" for name in histograms}


def hook_metrics():
    gauges = {*report.GAUGES, *report.REMOTE_GAUGES}
    counters = {*report.COUNTERS, *report.REMOTE_COUNTERS}
    return {f"batchpilot_{n}" for n in gauges} | {f"batchpilot_{n}_total" for n in counters}


def queries():
    own = [target["expr"] for panel in PANELS for target in panel["targets"]]
    variables = [v["definition"] for v in DASHBOARD["templating"]["list"] if "definition" in v]
    return [*own, *variables]


@pytest.mark.parametrize("query", queries())
def test_every_metric_that_the_dashboard_asks_for_exists(query):
    asked = set(re.findall(r"batchpilot_[a-z_]+", query))
    assert asked
    assert asked <= service_metrics() | hook_metrics()


def test_the_dashboard_has_the_usual_variables_and_every_panel_uses_the_data_source():
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "group", "engine"]
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_panels_tile_without_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_the_services_example_settings_are_known_ones():
    settings = parse_settings(
        yaml.safe_load((FOLDER / "service.yaml").read_text()), where="example"
    )
    assert settings.groups["chat"].policy == "memory+sla"
    assert settings.tls.client_ca


def test_the_compose_file_starts_services_with_arguments_that_exist(capsys):
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    for name in ("tuner-1", "tuner-2"):
        container = compose["services"][name]
        assert container["ports"][0].startswith("127.0.0.1:")
        with pytest.raises(SystemExit) as ended:  # --help is read after all the others
            main(["serve", *container["command"], "--help"])
        assert ended.value.code == 0
    mounted = [v for s in compose["services"].values() for v in s.get("volumes", ())]
    assert len(mounted) == 4
    assert all((FOLDER / volume.split(":")[0]).is_file() for volume in mounted)


def test_prometheus_scrapes_the_ports_that_the_compose_file_opens():
    jobs = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    targets = [t for job in jobs for config in job["static_configs"] for t in config["targets"]]
    assert targets == ["tuner-1:9464", "tuner-2:9464", "host.docker.internal:9400"]


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    unit = (FOLDER / "batchpilot-tuner.service").read_text()
    # The program must exist for systemd to accept the unit.
    (tmp_path / "tuner.service").write_text(
        unit.replace("/opt/batchpilot/bin/batchpilot", "/bin/true")
    )
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "tuner.service")],
        capture_output=True,
        text=True,
    )
    complaints = [line for line in checked.stderr.splitlines() if "tuner.service" in line]
    assert (checked.returncode, complaints) == (0, [])
