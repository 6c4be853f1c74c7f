"""The faults of tests/faults.py on a real model under load: `make chaos`.

SmolLM2-135M on a live vLLM serves without a pause while each fault strikes, lasts and heals. For
each it prints what the client noticed, the share of steps the service decided, tokens per second
from strike to return next to the local policy's before and after, and the time from healed to the
first new lease. It fails where a request was lost.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import FAULTS, Fault, Scale, World, remote_share, striking

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits
from batchpilot.env.engine import EngineRequest
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig

CONCURRENCY = 24
PROMPT_TOKENS, OUTPUT_TOKENS = 48, 40
LOCAL_SECONDS = 8.0


@dataclass(frozen=True)
class Stretch:
    """Serving for a while.

    Attributes:
        tokens: Output tokens made.
        seconds: How long it took.
        lost: Requests that did not get all their tokens.
        served: Requests that did.
    """

    tokens: int
    seconds: float
    lost: int
    served: int

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds


class Traffic:
    """Clients that ask again as soon as they are answered."""

    def __init__(self, engine: LiveEngine) -> None:
        self._engine = engine
        self._ids = itertools.count()

    def serve(self, until: Callable[[], bool]) -> Stretch:
        """Serves until told to stop, then the rest, which counts only as served or lost."""
        engine, tokens = self._engine, Counter[str]()
        began, stopped, made, asked = time.monotonic(), 0.0, 0, 0
        while not stopped or engine.has_unfinished_requests():
            if not stopped and until():
                stopped, made = time.monotonic(), tokens.total()
            open_now = asked - sum(count == OUTPUT_TOKENS for count in tokens.values())
            while not stopped and open_now < CONCURRENCY:
                asked, open_now = asked + 1, open_now + 1
                number = next(self._ids)
                prompt = [100 + (number * 31 + i * 7) % 9000 for i in range(PROMPT_TOKENS)]
                engine.add_request(EngineRequest(f"r{number}", prompt, OUTPUT_TOKENS))
            tokens.update(engine.step().new_tokens)
        served = sum(count == OUTPUT_TOKENS for count in tokens.values())
        return Stretch(made, stopped - began, asked - served, served)


def after(seconds: float) -> Callable[[], bool]:
    ends_at = time.monotonic() + seconds
    return lambda: time.monotonic() >= ends_at


def strike(engine: LiveEngine, traffic: Traffic, fault: Fault, scale: Scale) -> tuple[str, int]:
    """One fault between two stretches of the local policy; returns its line and what was lost."""
    local = [serve_locally(engine, traffic, scale)]
    with tempfile.TemporaryDirectory() as folder:
        world = World(scale, Path(folder))
        try:
            link = world.follow(engine.facts, **fault.prepare(world))
            engine.set_policy(link.policy)
            link.policy.attach(engine._hook)
            before = Counter(engine._hook.stats.decisions)
            with striking(world, fault) as log:
                during = traffic.serve(lambda: log.over)
            decisions = Counter(engine._hook.stats.decisions) - before
            noticed = {**link.client.stats.failures, **link.client.stats.leases}
        finally:
            world.close()
    local.append(serve_locally(engine, traffic, scale))
    if log.error is not None:
        raise log.error
    rate = statistics.fmean(stretch.tokens_per_second for stretch in local)
    counted = ", ".join(f"{name} {count}" for name, count in sorted(noticed.items()))
    lost = during.lost + sum(stretch.lost for stretch in local)
    return (
        f"| {fault.name} | {counted} | {100 * remote_share(decisions):.0f} % "
        f"| {during.served} / {during.lost} | {during.tokens_per_second / rate:.3f} "
        f"| {log.back_at - log.healed_at:.2f} s |",
        lost,
    )


def serve_locally(engine: LiveEngine, traffic: Traffic, scale: Scale) -> Stretch:
    engine.set_policy(PolicySpec.parse(scale.local).build({"itl_slo_ms": 100.0}))
    return traffic.serve(after(LOCAL_SECONDS))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m or tiny")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each fault lasts")
    parser.add_argument("--stopped-seconds", type=float, default=30.0, help="SIGSTOP's length")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    args = parser.parse_args(argv)
    config = LiveEngineConfig(
        args.model,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        kv_blocks=128,
        block_size=32,
        max_model_len=512,
    )
    lost_in_all = 0
    print("| fault | noticed | service decided | served / lost | throughput | back after |")
    print("|---|---|---|---|---|---|")
    with LiveEngine(config) as engine:
        traffic = Traffic(engine)
        serve_locally(engine, traffic, Scale(local="memory"))  # the first steps are slow
        for fault in (fault for fault in FAULTS if args.only in fault.name):
            stopped = "SIGSTOP" in fault.name
            scale = Scale(
                local="memory",
                hold_seconds=args.stopped_seconds if stopped else args.seconds,
                restart_seconds=2.0,
                delay_seconds=5.0,
                lease_seconds=2.0,
                good=BatchLimits(32, 1024),
            )
            line, lost = strike(engine, traffic, fault, scale)
            lost_in_all += lost
            print(line, flush=True)
    print(f"{lost_in_all} requests lost")
    return int(lost_in_all > 0)


if __name__ == "__main__":
    sys.exit(main())
