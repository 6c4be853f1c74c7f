"""Serves a trained policy from the tuning service to a live vLLM, and shows that it steers.

    python -m batchpilot.agents.training.serve_demo POLICY [--requests 12] [--itl-slo-ms 100]

Starts `batchpilot serve` with the policy and vLLM's API server with SmolLM2-135M in mode `remote`,
both on loopback, sends chats at once, and reads from the hook's metrics who decided.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from batchpilot.agents.artefact import load_artefact
from batchpilot.env.smollm2 import smollm2_path

_START_SECONDS = 300.0
#: Metrics are published once a second.
_PUBLISHED_SECONDS = 2.5
_OUTPUT_TOKENS = 64


class Served(NamedTuple):
    """What came of it.

    Attributes:
        requests: Chats that were answered in full.
        seconds: Until the last was.
        decisions: Scheduler steps by who decided: `remote` is the service.
        applied_max_num_seqs: The newest limit in force.
    """

    requests: int
    seconds: float
    decisions: dict[str, int]
    applied_max_num_seqs: int


def serve_and_ask(policy: Path, requests: int, itl_slo_ms: float) -> Served:
    """Runs the service, the server and the chats.

    Args:
        policy: The policy's folder.
        requests: How many chats, all at once.
        itl_slo_ms: The server's inter-token target.

    Raises:
        RuntimeError: A process ended early, or did not start in time.
        ConfigError: The policy cannot be used.
    """
    load_artefact(policy)
    service_port, port, metrics_port = (free_port() for _ in range(3))
    hook = {
        "mode": "remote",
        "policy": "predictive",
        "itl_slo_ms": itl_slo_ms,
        "service_targets": f"127.0.0.1:{service_port}",
        "metrics_port": metrics_port,
    }
    service = [sys.executable, "-m", "batchpilot", "serve", "--bind", f"127.0.0.1:{service_port}",
               "--policy", f"learned:{policy.resolve()}"]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as logs,
        _running(service, Path(logs) / "service"),
        _running(_server_command(port, hook), Path(logs) / "server") as server,
    ):
        _wait_until_healthy(server, port, Path(logs) / "server")
        started = time.perf_counter()
        with ThreadPoolExecutor(requests) as pool:
            answered = sum(pool.map(lambda number: _chat(port, number), range(requests)))
        seconds = time.perf_counter() - started
        time.sleep(_PUBLISHED_SECONDS)
        return _read_metrics(metrics_port, answered, seconds)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server_command(port: int, hook: dict[str, object]) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(smollm2_path()), "--served-model-name", "smollm2"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-num-seqs", "32", "--num-gpu-blocks-override", "64", "--block-size", "32"),
        *("--max-model-len", "1024"),
        *("--scheduler-cls", "batchpilot.scheduler_hook.Scheduler"),
        *("--additional-config", json.dumps({"batchpilot": hook})),
    ]


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own group, ended at the end."""
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **ours},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended: {log.read_text(errors='replace')[-2000:]}")
        try:
            _page(port, "/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"vLLM did not start within {_START_SECONDS:g} s")


def _page(port: int, path: str, body: bytes | None = None) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_START_SECONDS) as answer:
        text: str = answer.read().decode()
        return text


def _chat(port: int, number: int) -> bool:
    """Whether a chat is answered with as many tokens as were asked for."""
    body = {
        "model": "smollm2",
        "prompt": f"Story number {number}: once upon a time",
        "max_tokens": _OUTPUT_TOKENS,
        "ignore_eos": True,
    }
    answer = json.loads(_page(port, "/v1/completions", json.dumps(body).encode()))
    return int(answer["usage"]["completion_tokens"]) == _OUTPUT_TOKENS


def _read_metrics(port: int, answered: int, seconds: float) -> Served:
    text = _page(port, "/metrics")
    found = re.findall(r'^batchpilot_decisions_total\{.*source="(\w+)".*\} (\S+)$', text, re.M)
    decisions: dict[str, int] = {}
    for source, count in found:
        decisions[source] = decisions.get(source, 0) + int(float(count))
    limits = re.findall(r"^batchpilot_applied_max_num_seqs\{.*\} (\S+)$", text, re.M)
    return Served(answered, seconds, decisions, int(float(limits[-1])) if limits else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what came of it; fails where the service steered no step."""
    parser = argparse.ArgumentParser(
        prog="python -m batchpilot.agents.training.serve_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", type=Path, help="the policy's folder")
    parser.add_argument("--requests", type=int, default=12, help="chats, all at once")
    parser.add_argument("--itl-slo-ms", type=float, default=100.0, help="inter-token target")
    args = parser.parse_args(argv)
    served = serve_and_ask(args.policy, args.requests, args.itl_slo_ms)
    steps = sum(served.decisions.values())
    by = ", ".join(f"{source} {count}" for source, count in sorted(served.decisions.items()))
    print(
        f"live SmolLM2: {served.requests} of {args.requests} chats answered in "
        f"{served.seconds:.1f} s; {steps} scheduler steps decided by: {by}; "
        f"max_num_seqs {served.applied_max_num_seqs} in force at the end"
    )
    steered = served.decisions.get("remote", 0) > 0
    return 0 if steered and served.requests == args.requests else 1


if __name__ == "__main__":
    sys.exit(main())
