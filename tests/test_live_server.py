"""The real API server with two flags more, driven by vLLM's own benchmark client."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from batchpilot.env.models import smollm2_path
from batchpilot.service.process_meter import free_port

pytestmark = pytest.mark.live

NUM_PROMPTS = 24
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def page(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return answer.read().decode()


def server_command(port, settings):
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(smollm2_path()), "--served-model-name", "smollm2"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-num-seqs", "32", "--num-gpu-blocks-override", "64", "--block-size", "32"),
        *("--max-model-len", "1024"),
        *("--scheduler-cls", "batchpilot.scheduler_hook.Scheduler"),
        *("--additional-config", json.dumps({"batchpilot": settings})),
    ]


def environment(**more):
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    return {**os.environ, **ours, **more}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that steers with `memory`; yields its ports and its log."""
    folder = tmp_path_factory.mktemp("server")
    metrics = folder / "prometheus"
    metrics.mkdir()
    port, metrics_port = free_port(), free_port()
    settings = {"policy": "memory", "metrics_port": metrics_port, "log_interval_seconds": 1}
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            server_command(port, settings),
            env=environment(PROMETHEUS_MULTIPROC_DIR=str(metrics)),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_healthy(process, port, log)
        yield port, metrics_port, log
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(process, port, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-4000:]}"
        try:
            page(port, "/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server is not healthy after 300 s:\n{log.read_text()[-4000:]}")


def metric(text, name):
    """Sum of a metric's samples."""
    values = re.findall(rf"^batchpilot_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else None


def preemptions_of_vllm(text):
    """Those that vLLM itself counts."""
    return sum(map(float, re.findall(r"^vllm:num_preemptions_total\S* (\S+)$", text, re.MULTILINE)))


def published(server, steps_before):
    """Both pages and the log, once they tell what has happened: that is told every second."""
    port, metrics_port, log = server
    deadline = time.monotonic() + 60
    while True:
        own, vllms = page(metrics_port, "/metrics"), page(port, "/metrics")
        lines = log.read_text()
        steps = [metric(text, "steps_total") or 0 for text in (own, vllms)]
        is_new = min(steps) > steps_before and "next request held by" in lines
        if is_new and metric(vllms, "preemptions_total") == preemptions_of_vllm(vllms):
            return own, vllms, lines
        assert time.monotonic() < deadline, f"{steps=}, {steps_before=}:\n{lines[-4000:]}"
        time.sleep(0.5)


def test_every_request_succeeds_and_the_metrics_move_where_they_are_served(server, tmp_path):
    port, _, _ = server
    before = page(port, "/metrics")
    result = tmp_path / "client.json"
    client = subprocess.run(
        [
            *(sys.executable, "-c", CLIENT, "--backend", "openai"),
            *("--base-url", f"http://127.0.0.1:{port}", "--model", "smollm2"),
            *("--tokenizer", str(smollm2_path()), "--dataset-name", "random"),
            *("--random-input-len", "96", "--random-output-len", "64"),
            *("--num-prompts", str(NUM_PROMPTS), "--request-rate", "inf", "--ignore-eos"),
            *("--save-result", "--result-filename", str(result)),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert client.returncode == 0, client.stderr[-4000:]
    figures = json.loads(result.read_text())
    assert figures["completed"] == NUM_PROMPTS
    assert figures["total_output_tokens"] == NUM_PROMPTS * 64
    own, vllms, lines = published(server, metric(before, "steps_total") or 0)
    for text in (own, vllms):
        assert metric(text, "steering") == 1
        assert metric(text, "failures_total") in (None, 0)
        assert 1 <= metric(text, "applied_max_num_seqs") <= 32
        assert 'source="memory"' in text
    assert "vllm:num_requests_running" in vllms
    assert metric(vllms, "preemptions_total") == preemptions_of_vllm(vllms)
    assert "batchpilot: mode local, policy memory" in lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"polcy": "memory"}, "unknown key 'polcy'; allowed: mode, policy"),
        ({"policy": "memory+sla", "itl_slo_ms": 0}, "itl_slo_ms=0.0 must be greater than 0"),
    ],
)
def test_a_bad_setting_stops_the_server_at_start(settings, message):
    answer = subprocess.run(
        server_command(free_port(), settings),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode != 0
    assert message in answer.stdout + answer.stderr
