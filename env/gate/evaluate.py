"""Runs policies on the gate's cells: every policy on the same requests, spread over the cores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from batchpilot.agents.limits import Decision, EngineSnapshot, StepRecord
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shield import Clamp, SafetyBounds, shield
from batchpilot.env.bench.cells import Cell
from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.bench.environment import usable_cores
from batchpilot.env.bench.measure import Sample
from batchpilot.env.bench.plan import build_round, open_virtual_engine, prepare
from batchpilot.env.bench.results import check_folder
from batchpilot.env.bench.runner import BenchRun, replay
from batchpilot.env.bench.store import keep
from batchpilot.env.cache import cache_folder
from batchpilot.env.gate.settings import GateSettings, HeldOutCell
from batchpilot.env.process import worker_pool


@dataclass(frozen=True)
class GateRun:
    """What one policy gave on one cell under one seed.

    Attributes:
        cell: The cell's name.
        policy: The policy's text.
        seed: Of the requests and of the noise in the step times.
        goodput_per_s: Requests inside their targets, per second.
        violations: Share of the requests outside their targets, 0 to 1.
        tokens_per_s: Output tokens per second.
        preemptions: Sequences preempted.
        shield_share: Share of the decisions that the shield changed, 0 to 1.
    """

    cell: str
    policy: str
    seed: int
    goodput_per_s: float
    violations: float
    tokens_per_s: float
    preemptions: int
    shield_share: float


class ShieldWatch:
    """Counts how often the shield changes what a policy wants; decides nothing itself.

    Args:
        policy: Whose decisions.
    """

    def __init__(self, policy: LimitPolicy) -> None:
        """Starts at zero."""
        self._policy = policy
        self._bounds = SafetyBounds()
        self.decisions = 0
        self.changed = 0

    @property
    def share(self) -> float:
        """Share of the decisions, 0 to 1."""
        return self.changed / self.decisions if self.decisions else 0.0

    def observe(self, step: StepRecord) -> None:
        """Passes it on."""
        self._policy.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Passes it on, and counts."""
        decision = self._policy.decide(snapshot)
        self.decisions += 1
        clamp = shield(decision.limits, snapshot, self._bounds).clamp
        self.changed += clamp is not Clamp.NONE
        return decision


@dataclass(frozen=True)
class GateTask:
    """One run to be done."""

    cell: HeldOutCell
    contestant: Contestant
    seed: int


def gate_tasks(settings: GateSettings, policies: Sequence[str]) -> list[GateTask]:
    """Every run: cell by cell, seed by seed, so that a cell's engine is built once a process."""
    contestants = [Contestant.parse(text) for text in policies]
    return [
        GateTask(cell, contestant, settings.first_seed + index)
        for cell in settings.cells
        for index in range(settings.rounds)
        for contestant in contestants
    ]


def run_gate(
    tasks: Sequence[GateTask],
    finished: Callable[[GateRun], None],
    *,
    workers: int | None = None,
    work_dir: Path | None = None,
) -> list[GateRun]:
    """Runs every task; what was run before, by the same code on the same files, is not run again.

    Args:
        tasks: What to run.
        finished: Hears of each as it ends.
        workers: Processes; None takes every core.
        work_dir: Where finished runs are kept; None takes the cache.

    Raises:
        ConfigError: A policy or a cell that cannot be run, or a folder that cannot be written.
    """
    if work_dir is not None:
        check_folder("work_dir", work_dir)
    folder = work_dir or cache_folder() / "gate"
    processes = min(workers or usable_cores(), len(tasks))
    if processes == 1:
        return [_told(_run_or_load(task, folder), finished) for task in tasks]
    with worker_pool(processes) as pool:
        places = {pool.submit(_run_or_load, task, folder): at for at, task in enumerate(tasks)}
        runs: dict[int, GateRun] = {}
        for future in as_completed(places):
            runs[places[future]] = run = future.result()
            finished(run)
    return [runs[at] for at in range(len(tasks))]


def _told(run: GateRun, finished: Callable[[GateRun], None]) -> GateRun:
    finished(run)
    return run


def run_task(task: GateTask) -> GateRun:
    """One policy on one cell under one seed, in this process.

    Raises:
        ConfigError: It cannot be run.
    """
    settings = replace(task.cell.settings, seed=task.seed, rounds=1)
    slo = settings.slo
    engine = open_virtual_engine(settings, prepare(settings).max_model_len)
    try:
        engine.reset(task.seed)
        watch = _steer(engine, task.contestant, asdict(slo))
        measured = replay(engine, build_round(settings, 0).requests, slo, _Silent())
    finally:
        engine.close()
    return GateRun(
        cell=task.cell.name,
        policy=task.contestant.label,
        seed=task.seed,
        goodput_per_s=measured.goodput_per_s,
        violations=1.0 - (measured.slo_attainment or 0.0),
        tokens_per_s=measured.output_tokens_per_s,
        preemptions=measured.preemptions,
        shield_share=watch.share if watch else 0.0,
    )


def _steer(engine: Any, contestant: Contestant, defaults: dict[str, Any]) -> ShieldWatch | None:
    policy = contestant.build(defaults)
    watch = None if policy is None else ShieldWatch(policy)
    engine.set_policy(watch, watermark=contestant.watermark)
    return watch


def _run_or_load(task: GateTask, folder: Path) -> GateRun:
    cell = Cell(replace(task.cell.settings, seed=task.seed, rounds=1), task.contestant, 1)
    path = folder / f"{cell.name()}.json"
    try:
        found = GateRun(**json.loads(path.read_text(encoding="utf-8")))
        # The same run may stand in another gate's cell of another name.
        return replace(found, cell=task.cell.name, policy=task.contestant.label)
    except (OSError, ValueError, TypeError):
        run = run_task(task)
    keep(path, json.dumps(asdict(run)))
    return run


class _Silent:
    """Shows nothing: the parent shows whole runs."""

    def run_started(self, policy: str, round_index: int, requests: int) -> None:
        """Nothing."""

    def advanced(self, ended: int, tokens_per_s: float, sample: Sample) -> None:
        """Nothing."""

    def run_finished(self, run: BenchRun) -> None:
        """Nothing."""
