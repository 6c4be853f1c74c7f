"""What batchpilot's code adds to each vLLM step: `python -m batchpilot.env.bench.overhead`.

vLLM's real scheduler runs without a model, saturated (requests always wait), with as many sequences
running as asked. The policies see the step times of a GPU profile, with noise, and a target that
those keep: a learned model is trusted, and decides. For each policy it prints the time our code
took of a step (deciding before `schedule()`, reading after it, recording once its result is back),
and what share of vLLM's own `schedule()` that is. Times are of this machine; the ratio travels.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from batchpilot.agents.catalog import SELF_CONTAINED, PolicySpec
from batchpilot.agents.shadow import ShadowedPolicy
from batchpilot.env.engine import EngineRequest
from batchpilot.env.models import tiny_model_path
from batchpilot.env.profiles import load_profile
from batchpilot.env.scheduler_core import SchedulerCore, SchedulerCoreConfig

PROMPT_TOKENS = 128
MEAN_OUTPUT_TOKENS = 256
#: As many as `predictive` looks at in one step.
WAITING = 32
PROFILE = "llama-3.1-8b-h100"
STEP_NOISE = 0.05
#: Of a step without prompts: a latency rule works at its limit, and keeps the batch as it is.
ITL_SLO_STEPS = 2.0
TTFT_SLO_MS = 2000.0


@dataclass(frozen=True)
class Overhead:
    """Microseconds of one policy at one batch size.

    Attributes:
        policy: Its name.
        running: Sequences in RUNNING.
        median_us: Median time of our code in a step.
        mean_us: Its mean: rare, longer decisions included.
        p99_us: Its 99th percentile.
        schedule_us: Median time of vLLM's own `schedule()`, ours taken out.
    """

    policy: str
    running: int
    median_us: float
    mean_us: float
    p99_us: float
    schedule_us: float


class SaturatedScheduler:
    """vLLM's scheduler with `running` sequences in RUNNING and always more waiting."""

    def __init__(self, running: int) -> None:
        """Builds it; about a second."""
        self._profile = load_profile(PROFILE)
        longest = PROMPT_TOKENS + 8 * MEAN_OUTPUT_TOKENS
        config = SchedulerCoreConfig(
            max_num_seqs=running,
            kv_blocks=2 + running * longest // 16,
            max_num_batched_tokens=max(2048, 2 * running),
            max_model_len=longest,
        )
        self.core = SchedulerCore(config, tiny_model_path())
        self.running = running
        self._rng = np.random.default_rng(0)
        self._ids = count()
        self._in_flight: deque[tuple[Any, float]] = deque()
        self._clock = 0.0
        self.core.hook.set_clock(lambda: self._clock)

    @property
    def targets(self) -> dict[str, float]:
        """Latency targets, in ms, that a batch of so many keeps."""
        context = self.running * (PROMPT_TOKENS + MEAN_OUTPUT_TOKENS)
        step_seconds = self._profile.step_time.seconds(self.running, 0, context)
        return {"itl_slo_ms": 1e3 * ITL_SLO_STEPS * step_seconds, "ttft_slo_ms": TTFT_SLO_MS}

    def steps(self, number: int) -> tuple[list[float], list[float]]:
        """Runs steps; returns seconds in our code and in vLLM's `schedule()` of each."""
        stats = self.core.hook.stats
        ours, theirs = [], []
        for _ in range(number):
            self._keep_waiting()
            before = stats.hook_seconds
            started = time.perf_counter()
            output = self.core.schedule()
            scheduled = time.perf_counter() - started
            theirs.append(scheduled - (stats.hook_seconds - before))
            self._in_flight.append((output, self._step_seconds()))
            if len(self._in_flight) > 1:
                self._complete()
            ours.append(stats.hook_seconds - before)
        return ours, theirs

    def _step_seconds(self) -> float:
        """What the step just scheduled would take on the GPU."""
        noise = float(self._rng.lognormal(sigma=STEP_NOISE))
        return noise * self._profile.step_time.seconds(*self.core.load)

    def _complete(self) -> None:
        output, seconds = self._in_flight.popleft()
        self._clock += seconds
        self.core.complete(output)

    def _keep_waiting(self) -> None:
        _, waiting = self.core.scheduler.get_request_counts()
        for _ in range(max(0, WAITING - waiting)):
            output = min(1 + int(self._rng.exponential(MEAN_OUTPUT_TOKENS)), 7 * MEAN_OUTPUT_TOKENS)
            prompt = [7] * PROMPT_TOKENS
            self.core.add_request(EngineRequest(str(next(self._ids)), prompt, output))


def measure(
    scheduler: SaturatedScheduler, policy: str, steps: int, shadow: str | None = None
) -> Overhead:
    """Runs one policy for `steps` steps, after as many to settle.

    Args:
        scheduler: Saturated.
        policy: Steers, as a policy is asked for.
        steps: Measured.
        shadow: Decides beside it, where one does.
    """
    targets = scheduler.targets
    built = PolicySpec.parse(policy).build(targets)
    if shadow is not None:
        built = ShadowedPolicy(built, PolicySpec.parse(shadow).build(targets))
        policy = f"{policy}, shadow {shadow}"
    scheduler.core.hook.set_policy(built)
    scheduler.steps(steps)
    gc.collect()
    ours, theirs = scheduler.steps(steps)
    return Overhead(
        policy=policy,
        running=scheduler.running,
        median_us=1e6 * statistics.median(ours),
        mean_us=1e6 * statistics.fmean(ours),
        p99_us=1e6 * float(np.quantile(ours, 0.99)),
        schedule_us=1e6 * statistics.median(theirs),
    )


def print_table(rows: Sequence[Overhead]) -> None:
    """Prints the measurements."""
    table = Table(title="Time of batchpilot's code in each vLLM step")
    for heading in (
        "policy",
        "running",
        "median us",
        "mean us",
        "p99 us",
        "schedule() us",
        "ratio",
    ):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in rows:
        table.add_row(
            row.policy,
            str(row.running),
            f"{row.median_us:.1f}",
            f"{row.mean_us:.1f}",
            f"{row.p99_us:.1f}",
            f"{row.schedule_us:.0f}",
            f"{row.median_us / row.schedule_us:.3f}",
        )
    console = Console()
    console.print(table)
    console.print("ratio: median time of our code over median time of vLLM's own schedule()")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256], metavar="N")
    parser.add_argument("--policies", nargs="+", default=list(SELF_CONTAINED), metavar="POLICY")
    parser.add_argument("--shadow", metavar="POLICY", help="decides beside each, only watched")
    parser.add_argument("--steps", type=int, default=1500, help="steps measured (default 1500)")
    args = parser.parse_args(argv)
    rows = []
    for running in args.running:
        scheduler = SaturatedScheduler(running)
        rows += [measure(scheduler, policy, args.steps, args.shadow) for policy in args.policies]
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
