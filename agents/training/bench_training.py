"""How fast training collects experience here, and how long an exported policy thinks.

    python -m batchpilot.agents.training.bench_training [--processes 1,2] [--seconds 20]
        [--policy FOLDER]

Steps the environments of the bundled family `demo` with a PPO model's own actions, as a rollout
does, and prints environment steps per second of wall time; gradient steps are not in it. With a
policy's folder it also times the policy's network, called as the hook calls it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchpilot.agents.artefact import load_artefact
from batchpilot.agents.learned_model import OnnxModel, probe_observations
from batchpilot.agents.training.algorithms import build_model
from batchpilot.agents.training.recipes import build_vector
from batchpilot.agents.training.run_config import make_run_config
from batchpilot.env.process import prepare_process

#: Calls that are timed, after as many that are not.
_CALLS = 2_000


def steps_per_second(processes: int, seconds: float) -> float:
    """Environment steps per second in so many processes, after each has played an episode's start.

    Args:
        processes: Environments, each in its own process where there are several.
        seconds: Wall time.
    """
    config = make_run_config({}, "demo", {})
    vector = build_vector(config.recipe, processes)
    try:
        model = build_model("ppo", config.hyperparameters, vector, seed=0)
        seen: Any = vector.reset()
        for _ in range(5):
            seen, *_ = vector.step(model.predict(seen)[0])
        started, steps = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds:
            seen, *_ = vector.step(model.predict(seen)[0])
            steps += processes
        return steps / elapsed
    finally:
        vector.close()


def inference_microseconds(folder: Path) -> tuple[float, float]:
    """Median and 99th percentile of one decision of a policy's network.

    Raises:
        ConfigError: The policy cannot be used.
    """
    artefact = load_artefact(folder)
    model = OnnxModel(artefact)
    probes = probe_observations(artefact.manifest.observation_size)
    times = []
    for number in range(2 * _CALLS):
        started = time.perf_counter()
        model.run(probes[number % len(probes)])
        if number >= _CALLS:
            times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times), float(np.percentile(times, 99))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m batchpilot.agents.training.bench_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", default="1,2", help="how many at once, one after another")
    parser.add_argument("--seconds", type=float, default=20.0, help="wall time of each")
    parser.add_argument("--policy", type=Path, help="a policy's folder")
    args = parser.parse_args(argv)
    prepare_process()
    torch.set_num_threads(1)
    if args.policy is not None:
        median, p99 = inference_microseconds(args.policy)
        print(f"inference of {args.policy}: median {median:.0f} us, p99 {p99:.0f} us", flush=True)
    print("processes  env steps/s", flush=True)
    for count in map(int, args.processes.split(",")):
        print(f"{count:>9}  {steps_per_second(count, args.seconds):>11.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
