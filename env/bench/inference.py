"""What a trained policy takes to decide: `python -m batchpilot.env.bench.inference FOLDER...`.

Prints microseconds, median and 99th percentile, of

- network: one run of the network on onnxruntime, one thread,
- acting: a whole decision at the end of an interval: closing the window, making the observation,
  the network, mapping its action to limits,
- holding: a decision between two of them, which is what all other steps pay.

The base policy is taken to be `static`, whose own time is next to nothing, so that what is seen is
the learned policy's alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from batchpilot.agents.artefact import Artefact, load_artefact
from batchpilot.agents.catalog import learned_policy
from batchpilot.agents.learned_model import OnnxModel, probe_observations
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, StepRecord

RUNS = 5_000
_FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=4096, block_size=16)
_STEP = StepRecord(seconds=0.02, running=128, decode_seqs=120, prefill_tokens=512, kv_tokens=40_000)


def network_us(artefact: Artefact, runs: int) -> list[float]:
    """Microseconds of each run of the network."""
    model = OnnxModel(artefact)
    observations = probe_observations(artefact.manifest.observation_size)
    return _timed(lambda at: model.run(observations[at % len(observations)]), runs)


def decision_us(artefact: Artefact, runs: int, *, acting: bool) -> list[float]:
    """Microseconds of each decision: at the end of an interval, or inside one."""
    policy = learned_policy(artefact, artefact.manifest.targets)
    apart = artefact.manifest.decision_interval_s * (1.001 if acting else 0.5 / (runs + 200))
    snapshots = [
        EngineSnapshot(_FACTS, 1.0 + apart * at, running=128, waiting=10, used_blocks=3000)
        for at in range(runs + 200)
    ]

    def decide(at: int) -> None:
        policy.decide(snapshots[at])

    def observe() -> None:
        policy.observe(_STEP)

    return _timed(decide, runs, before=observe)


def _timed(
    function: Callable[[int], object], runs: int, before: Callable[[], None] | None = None
) -> list[float]:
    """Microseconds of each call, the first 200 left out."""
    times = []
    for at in range(runs + 200):
        if before is not None:
            before()
        started = time.perf_counter_ns()
        function(at)
        times.append((time.perf_counter_ns() - started) / 1e3)
    return times[200:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N")
    args = parser.parse_args(arguments)
    table = Table("policy", "parameters", "network", "acting", "holding", title="us, median (p99)")
    for folder in args.folders:
        artefact = load_artefact(folder)
        alone = replace(artefact, manifest=replace(artefact.manifest, base_policy="static"))
        table.add_row(
            artefact.label,
            f"{artefact.parameters:,}",
            _cell(network_us(alone, args.runs)),
            _cell(decision_us(alone, args.runs, acting=True)),
            _cell(decision_us(alone, args.runs, acting=False)),
        )
    Console().print(table)
    return 0


def _cell(times: Sequence[float]) -> str:
    median, p99 = np.percentile(times, (50, 99))
    return f"{median:.1f} ({p99:.1f})"


if __name__ == "__main__":
    raise SystemExit(main())
