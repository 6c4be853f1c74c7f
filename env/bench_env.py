"""How fast `batchpilot/BatchLimits-v0` and the engine under it run here.

    python -m batchpilot.env.bench_env [--processes 1,2] [--seconds 10] [--running 64]

Plays episodes of random actions with the environment's default settings and prints engine steps
and environment steps per second of wall time, all processes together. Starting up is not counted.
Then the virtual engine alone, in one process with so many sequences running, beside the most that
vLLM's own scheduler allows: the speed if its `schedule()` and `update_from_output()` were all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import numpy as np

from batchpilot.env.batch_limits_env import BatchLimitsEnv
from batchpilot.env.engine_speed import measure_engine

#: Engine steps of a round of the second table.
ENGINE_STEPS = 2000


class Speed(NamedTuple):
    """What was done in how much wall time.

    Attributes:
        engine_steps: Steps of vLLM's scheduler.
        env_steps: Steps of the environment.
        engine_seconds: Virtual time that passed.
        seconds: Wall time.
    """

    engine_steps: int
    env_steps: int
    engine_seconds: float
    seconds: float


def measure(seconds: float, seed: int = 0, **settings: Any) -> Speed:
    """Plays random episodes for so many seconds in this process; the first reset is not counted.

    Args:
        seconds: Wall time to play for; the step that reaches it still counts.
        seed: Of workloads and actions.
        settings: Of the environment.
    """
    env = BatchLimitsEnv(**settings)
    env.reset(seed=seed)
    try:
        return _play(env, seconds, seed)
    finally:
        env.close()


def measure_processes(processes: int, seconds: float) -> Speed:
    """Plays in several processes at once; steps are added up, wall time is the longest."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with context.Pool(processes, initializer=_keep_barrier, initargs=(barrier,)) as pool:
        runs = pool.starmap(_measure_together, [(seconds, seed) for seed in range(processes)], 1)
    return Speed(
        sum(run.engine_steps for run in runs),
        sum(run.env_steps for run in runs),
        sum(run.engine_seconds for run in runs),
        max(run.seconds for run in runs),
    )


def _play(env: BatchLimitsEnv, seconds: float, seed: int) -> Speed:
    actions = np.random.default_rng(seed)
    engine_steps = env_steps = 0
    engine_seconds = clock_s = 0.0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        action = actions.uniform(-1, 1, 2).astype(np.float32)
        *_, over, info = env.step(action)
        engine_steps += info["engine_steps"]
        env_steps += 1
        engine_seconds += info["clock_s"] - clock_s
        clock_s = info["clock_s"]
        if over:
            env.reset()
            clock_s = 0.0
    return Speed(engine_steps, env_steps, engine_seconds, elapsed)


_barriers: list[Barrier] = []


def _keep_barrier(barrier: Barrier) -> None:
    """A barrier cannot go the way of arguments; it comes with the process."""
    _barriers.append(barrier)


def _measure_together(seconds: float, seed: int) -> Speed:
    """Starts playing when every process has its engine."""
    env = BatchLimitsEnv()
    env.reset(seed=seed)
    _barriers[0].wait()
    try:
        return _play(env, seconds, seed)
    finally:
        env.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m batchpilot.env.bench_env",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", default="1,2", help="how many at once, one after another")
    parser.add_argument("--seconds", type=float, default=10.0, help="wall time of each")
    parser.add_argument("--running", default="64", help="sequences in the engine, in turn")
    args = parser.parse_args(argv)
    counts = args.processes.split(",")
    sizes = args.running.split(",")
    whole = all(count.isdecimal() and int(count) for count in counts + sizes)
    if not whole or not args.seconds > 0:
        parser.error(f"--processes {args.processes} --running {args.running} --seconds "
                     f"{args.seconds:g}: whole numbers from 1, separated by commas, and a number "
                     "greater than 0")  # fmt: skip
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print("processes  engine steps/s  env steps/s  engine seconds per second", flush=True)
    for count in map(int, counts):
        speed = measure_processes(count, args.seconds)
        print(
            f"{count:>9}  {speed.engine_steps / speed.seconds:>14,.0f}  "
            f"{speed.env_steps / speed.seconds:>11,.1f}  "
            f"{speed.engine_seconds / speed.seconds:>25,.1f}",
            flush=True,
        )
    print("\nrunning  prefix caching  engine steps/s  vLLM's scheduler alone  ratio", flush=True)
    for size in map(int, sizes):
        for caching in (True, False):
            found = measure_engine(size, ENGINE_STEPS, prefix_caching=caching)
            print(
                f"{found.running:>7.1f}  {'on' if caching else 'off':>14}  {found.engine:>14,.0f}  "
                f"{found.vllm_alone:>22,.0f}  {found.engine / found.vllm_alone:>5.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
