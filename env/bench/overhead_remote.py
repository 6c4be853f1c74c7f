"""The cost of mode remote: `python -m batchpilot.env.bench.overhead_remote`.

The same saturated scheduler as in `batchpilot.env.bench.overhead`, steered by one policy: locally,
then through a tuning service that lives, that is dead, and that is killed and started again all
the time. A service that starts again and again takes a core of this machine, so the local policy is
also measured beside one that it does not follow. Each is measured in turn, several rounds. Beside
the time of our code in a step it prints the processor time of all other threads of the process, the
client's and gRPC's among them, and whole steps per second: what they take from the engine's thread
would show there.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from batchpilot.env.bench.overhead import SaturatedScheduler

CASES = ("local", "alive", "dead", "flapping", "beside")
NAMES = {"local": "none (local)", "beside": "flapping, not followed (local)"}
FLAP_SECONDS = 0.5
START_SECONDS = 30.0
LEASE_SECONDS = 15.0


@dataclass
class Case:
    """What was measured of one case, all rounds together.

    Attributes:
        ours: Seconds of our code in each step.
        other_threads: Of a core, what all threads but the engine's took, 0 to 1, of each round.
        steps_per_second: Of each round.
        remote_share: Share of decisions that came from the service, of each round.
    """

    ours: list[float] = field(default_factory=list)
    other_threads: list[float] = field(default_factory=list)
    steps_per_second: list[float] = field(default_factory=list)
    remote_share: list[float] = field(default_factory=list)


@contextmanager
def service(case: str, policy: str) -> Iterator[str]:
    """The service of one case; yields its address."""
    target = f"127.0.0.1:{_free_port()}"
    if case in ("local", "dead"):
        yield target
        return
    command = [sys.executable, "-m", "batchpilot", "serve", "--bind", target, "--policy", policy]
    server = _Server(command, int(target.rpartition(":")[2]))
    server.start()
    done = threading.Event()
    flapping = threading.Thread(target=server.flap, args=(done,))
    try:
        if case != "alive":
            flapping.start()
        yield target
    finally:
        done.set()
        if flapping.is_alive():
            flapping.join()
        server.kill()


class _Server:
    def __init__(self, command: Sequence[str], port: int) -> None:
        self._command = command
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"{' '.join(self._command)} does not listen")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def flap(self, done: threading.Event) -> None:
        while not done.wait(FLAP_SECONDS):
            self.kill()
            self.start()


@contextmanager
def settings(case: str, policy: str, target: str) -> Iterator[None]:
    """The hook's settings of one case, where the hook looks for them."""
    values = {"BATCHPILOT_POLICY": policy}
    if case not in ("local", "beside"):
        values |= {"BATCHPILOT_MODE": "remote", "BATCHPILOT_SERVICE_TARGETS": target}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def measure(case: str, policy: str, running: int, steps: int, into: Case) -> None:
    """One round of one case."""
    with service(case, policy) as target, settings(case, policy, target):
        scheduler = SaturatedScheduler(running)
        decisions = scheduler.core.scheduler.batchpilot.stats.decisions
        scheduler.steps(steps)
        deadline = time.monotonic() + LEASE_SECONDS
        while case == "alive" and not decisions["remote"] and time.monotonic() < deadline:
            scheduler.steps(50)
        gc.collect()
        before, all_before = decisions["remote"], decisions.total()
        started, others_before = time.perf_counter(), time.process_time() - time.thread_time()
        ours, _ = scheduler.steps(steps)
        seconds = time.perf_counter() - started
        others = time.process_time() - time.thread_time() - others_before
        into.steps_per_second.append(steps / seconds)
        into.other_threads.append(others / seconds)
        share = (decisions["remote"] - before) / (decisions.total() - all_before)
        into.ours += ours
        into.remote_share.append(share)
        scheduler.core.scheduler.shutdown()


def print_table(policy: str, running: int, cases: dict[str, Case]) -> None:
    """Prints the measurements."""
    table = Table(title=f"batchpilot's code in each step, {policy}, {running} running")
    for heading in (
        "service",
        "median us",
        "mean us",
        "p99 us",
        "other threads",
        "steps/s",
        "decided remotely",
    ):
        table.add_column(heading, justify="left" if heading == "service" else "right")
    for name, case in cases.items():
        table.add_row(
            NAMES.get(name, name),
            f"{1e6 * statistics.median(case.ours):.1f}",
            f"{1e6 * statistics.fmean(case.ours):.1f}",
            f"{1e6 * float(np.quantile(case.ours, 0.99)):.1f}",
            f"{100 * statistics.fmean(case.other_threads):.1f} %",
            f"{statistics.median(case.steps_per_second):.0f}",
            f"{100 * statistics.fmean(case.remote_share):.0f} %",
        )
    Console(width=110).print(table)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, default=256, metavar="N")
    parser.add_argument("--policies", nargs="+", default=["memory", "memory-peak"])
    parser.add_argument("--steps", type=int, default=1500, help="of a round (default 1500)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    for policy in args.policies:
        cases = {name: Case() for name in CASES}
        for _ in range(args.rounds):
            for name, case in cases.items():
                measure(name, policy, args.running, args.steps, case)
        print_table(policy, args.running, cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
