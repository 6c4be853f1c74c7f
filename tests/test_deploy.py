"""The examples in deploy/: every metric exists, every service starts, every file parses."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from certificates import Authority
from prometheus_client import CollectorRegistry, generate_latest

from batchpilot.scheduler_hook import report
from batchpilot.service import cli
from batchpilot.service.access import Role, read_access
from batchpilot.service.exposure import check_exposure
from batchpilot.service.meters import Meters
from batchpilot.service.metrics import ServiceCollector
from batchpilot.service.server import Service
from batchpilot.service.sessions import SessionTable
from batchpilot.service.settings import read_settings
from batchpilot.service.wire import EngineKey

FOLDER = Path(__file__).parents[1] / "deploy"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
TUNERS = [name for name, service in COMPOSE.items() if service["image"] == "batchpilot-service"]
UNIT = FOLDER / "batchpilot-tuner.service"


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


def started(command, places):
    """What `batchpilot serve` makes of its arguments, all that is refused at the start included.

    Args:
        command: The arguments.
        places: The file here that a path of theirs stands for.
    """
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args = parser.parse_args([str(places.get(argument, argument)) for argument in command])
    settings = cli.with_options(read_settings(args.config), args)
    check_exposure(settings)
    Service(settings, args.config)  # opens nothing yet
    return settings


def mounts(service):
    """The files of deploy/ that a container has, by their places in it."""
    volumes = [volume.split(":") for volume in service.get("volumes", ())]
    return {inside: FOLDER / outside for outside, inside, _ in volumes}


@pytest.mark.parametrize("name", TUNERS)
def test_the_compose_file_s_services_start(name):
    settings = started(COMPOSE[name]["command"], mounts(COMPOSE[name]))
    _, port = COMPOSE[name]["ports"][0].rsplit(":", 1)
    assert settings.server.bind == f"0.0.0.0:{port}"
    assert settings.metrics.bind == "0.0.0.0:9464"
    assert (settings.default.policy, settings.default.itl_slo_ms) == ("memory+sla", 50)


def test_the_compose_file_mounts_files_that_are_there_and_publishes_on_loopback_alone():
    assert TUNERS == ["tuner-1", "tuner-2"]
    assert all(path.is_file() for service in COMPOSE.values() for path in mounts(service).values())
    ports = [port for service in COMPOSE.values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def unit_values(key):
    return re.findall(rf"^{key}=(.+)$", UNIT.read_text(), re.MULTILINE)


def test_the_systemd_unit_s_service_starts_with_the_credentials_it_is_given(tmp_path):
    """Its user can read none of root's files, only the copies in the unit's own folder."""
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    authority.sign("tuner").write(tmp_path, "service")
    (tmp_path / "access.yaml").write_text((FOLDER / "access.yaml").read_text())
    (tmp_path / "access.yaml").chmod(0o440)
    credentials = f"/run/credentials/{UNIT.name}"
    text = (FOLDER / "service.yaml").read_text()
    text = text.replace(credentials, str(tmp_path)).replace("/var/lib/batchpilot", str(tmp_path))
    (tmp_path / "service.yaml").write_text(text)

    (start,) = unit_values("ExecStart")
    program, command, *arguments = shlex.split(start)
    assert (program, command) == ("/opt/batchpilot/bin/batchpilot", "serve")
    settings = started(arguments, {"/etc/batchpilot/service.yaml": tmp_path / "service.yaml"})

    loaded = dict(value.split(":", 1) for value in unit_values("LoadCredential"))
    named = (*vars(settings.tls).values(), settings.access.file)
    assert sorted(loaded) == sorted(Path(path).name for path in named)
    assert {Path(path).parent for path in named} == {tmp_path}
    assert loaded["service.key"] == "/etc/batchpilot/tls/service.key"
    assert settings.groups["chat"].policy == "memory+sla"


def test_the_example_of_clients_has_each_role_and_somebody_who_may_administer(tmp_path):
    path = tmp_path / "access.yaml"
    path.write_text((FOLDER / "access.yaml").read_text())
    path.chmod(0o440)  # as systemd's copy is
    clients = read_access(path)
    assert {client.role for client in clients.clients} == set(Role)
    assert clients.by_certificate(["operators.example.org"]).role is Role.ADMIN
    fleet = clients.by_certificate(["chat.example.org"])
    assert fleet.scope.allows(EngineKey("chat", "node-1:77:a1b2c3", 0))
    assert not fleet.scope.allows(EngineKey("batch", "node-1:77:a1b2c3", 0))


def ignored_by_docker():
    lines = (FOLDER.parent / ".dockerignore").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_the_image_is_built_without_history_environments_and_results():
    assert {".git", ".venv", ".cache", "results", "**/__pycache__"} <= ignored_by_docker()
    kept = {"pyproject.toml", "README.md", "LICENSE", "src", "agents", "env", "protos", "service"}
    assert not kept & ignored_by_docker()


def test_prometheus_scrapes_the_ports_that_the_compose_file_opens():
    jobs = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    targets = [t for job in jobs for config in job["static_configs"] for t in config["targets"]]
    assert targets == ["tuner-1:9464", "tuner-2:9464", "host.docker.internal:9400"]


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    # The program must exist for systemd to accept the unit.
    (tmp_path / "tuner.service").write_text(
        UNIT.read_text().replace("/opt/batchpilot/bin/batchpilot", "/bin/true")
    )
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "tuner.service")],
        capture_output=True,
        text=True,
    )
    complaints = [line for line in checked.stderr.splitlines() if "tuner.service" in line]
    assert (checked.returncode, complaints) == (0, [])
