"""Runs of a bench as independent cells: one policy on one round, spread over the cores.

Only a virtual engine's runs are independent; live ones share the machine they measure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.bench.environment import usable_cores, vllm_version
from batchpilot.env.bench.measure import RunMeasurement, Sample
from batchpilot.env.bench.plan import (
    BenchPlan,
    build_round,
    build_round_workload,
    open_virtual_engine,
)
from batchpilot.env.bench.runner import BenchRun, Progress, run_one
from batchpilot.env.bench.settings import BenchSettings
from batchpilot.env.bench.sources import sources_digest
from batchpilot.env.bench.store import RunStore, digest
from batchpilot.env.cache import cache_folder
from batchpilot.env.engine import Engine
from batchpilot.env.process import worker_pool
from batchpilot.env.profiles import load_profile
from batchpilot.env.virtual_engine import VirtualEngine


@dataclass(frozen=True)
class Cell:
    """One contestant on one round of a bench.

    Attributes:
        settings: Of the bench.
        contestant: Who steers.
        round: From 1.
    """

    settings: BenchSettings
    contestant: Contestant
    round: int

    @property
    def seed(self) -> int:
        """What the round was drawn with."""
        return self.settings.seed + self.round - 1

    def at_rate_scale(self, rate_scale: float) -> Cell:
        """The same at another arrival rate."""
        return replace(self, settings=replace(self.settings, rate_scale=rate_scale))

    def name(self) -> str:
        """The digest of everything that decides what it gives."""
        chosen, shadow = self.settings, self.contestant.shadow
        beside = None
        if shadow is not None:
            beside = [str(shadow), shadow.fingerprint(), sources_digest(shadow.name)]
        # What is served, not how it was asked for: files and traces may change.
        served = repr(build_round_workload(chosen, self.round - 1).requests)
        return digest(
            {
                "profile": asdict(load_profile(chosen.profile or "")),
                "limits": [chosen.max_num_seqs, chosen.max_num_batched_tokens, chosen.kv_blocks],
                "noise": chosen.noise,
                "requests": hashlib.sha256(served.encode()).hexdigest(),
                "slo": asdict(chosen.slo),
                "policy": self.contestant.identity,
                "sources": sources_digest(self.contestant.policy_name),
                "shadow": beside,
                "noise_seed": self.seed,
                "vllm": vllm_version(),
            }
        )


class Cells(Protocol):
    """What runs cells."""

    def start(self, cell: Cell) -> Future[RunMeasurement]:
        """Runs a cell, sooner or later."""


def bench_cells(plan: BenchPlan) -> list[Cell]:
    """Every cell of a bench: round by round, in the order of its policies."""
    return [
        Cell(plan.settings, contestant, index + 1)
        for index in range(plan.settings.rounds)
        for contestant in plan.contestants
    ]


def run_cell(cell: Cell, max_model_len: int) -> RunMeasurement:
    """Runs a cell in this process, on an engine kept for the next.

    Raises:
        ConfigError: It cannot be run.
        EngineStalledError: The engine stopped making progress.
    """
    settings = cell.settings
    engine = _engine(_engine_settings(settings), max_model_len)
    current = build_round(settings, cell.round - 1)
    return run_one(engine, cell.contestant, asdict(settings.slo), current, settings.slo, _Silent())


@contextmanager
def open_cells(plan: BenchPlan) -> Iterator[Cells]:
    """Processes that run cells on virtual engines, and keep on disk what they finish."""
    settings = plan.settings
    folder = Path(settings.work_dir) if settings.work_dir else cache_folder() / "bench"
    store = RunStore(folder)
    wanted = settings.workers or usable_cores()
    workers = min(wanted, len(plan.contestants) * settings.rounds)
    if workers == 1:
        yield _StoredCells(store, bool(settings.fresh), plan.max_model_len, _start_here)
        return
    with worker_pool(workers) as pool:
        yield _StoredCells(store, bool(settings.fresh), plan.max_model_len, pool.submit)


@dataclass(frozen=True)
class LiveCells:
    """Runs cells on one live engine, each as soon as it is asked for."""

    engine: Engine
    progress: Progress

    def start(self, cell: Cell) -> Future[RunMeasurement]:
        """The cell's result, once it is there."""
        return _start_here(self._run, cell)

    def _run(self, cell: Cell) -> RunMeasurement:
        slo = cell.settings.slo
        current = build_round(cell.settings, cell.round - 1)
        self.progress.run_started(cell.contestant.label, cell.round, len(current.requests))
        return run_one(self.engine, cell.contestant, asdict(slo), current, slo, self.progress)


@dataclass(frozen=True)
class _StoredCells:
    """Takes finished cells from disk, and has the others run and kept."""

    store: RunStore
    fresh: bool
    max_model_len: int
    submit: Callable[..., Future[RunMeasurement]]

    def start(self, cell: Cell) -> Future[RunMeasurement]:
        """The cell's result, now or later."""
        name = cell.name()
        known = None if self.fresh else self.store.load(name)
        if known is None:
            return self.submit(_run_and_keep, cell, self.max_model_len, self.store, name)
        found: Future[RunMeasurement] = Future()
        found.set_result(known)
        return found


def _run_and_keep(cell: Cell, max_model_len: int, store: RunStore, name: str) -> RunMeasurement:
    measured = run_cell(cell, max_model_len)
    store.save(name, measured)
    return measured


def _start_here(function: Callable[..., RunMeasurement], *args: Any) -> Future[RunMeasurement]:
    """Runs at once, in this process; what goes wrong is raised at once too."""
    done: Future[RunMeasurement] = Future()
    done.set_result(function(*args))
    return done


def _engine_settings(settings: BenchSettings) -> BenchSettings:
    """The settings with what the engine does not see set alike, as a key of kept engines."""
    return BenchSettings(
        engine=settings.engine,
        profile=settings.profile,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_blocks=settings.kv_blocks,
        noise=settings.noise,
    )


@lru_cache(maxsize=1)
def _engine(settings: BenchSettings, max_model_len: int) -> VirtualEngine:
    return open_virtual_engine(settings, max_model_len)


class _Silent:
    """Shows nothing: the parent shows whole runs."""

    def run_started(self, policy: str, round_index: int, requests: int) -> None:
        """Nothing."""

    def advanced(self, ended: int, tokens_per_s: float, sample: Sample) -> None:
        """Nothing."""

    def run_finished(self, run: BenchRun) -> None:
        """Nothing."""


def run_cells(cells: Cells, wanted: Sequence[Cell], progress: Progress) -> list[BenchRun]:
    """Runs them all; returns them in their order, whichever ended first.

    Raises:
        ConfigError: A cell cannot be run.
        EngineStalledError: An engine stopped making progress.
    """
    finished: dict[int, BenchRun] = {}
    for place, measured in _ended(cells, wanted):
        cell = wanted[place]
        finished[place] = BenchRun(cell.contestant.label, cell.round, cell.seed, measured)
        progress.run_finished(finished[place])
    return [finished[place] for place in range(len(wanted))]


def _ended(cells: Cells, wanted: Sequence[Cell]) -> Iterator[tuple[int, RunMeasurement]]:
    """Each cell's place and result: those that start has ended at once, then the others."""
    running: dict[Future[RunMeasurement], int] = {}
    for place, cell in enumerate(wanted):
        future = cells.start(cell)
        if future.done():
            yield place, future.result()
        else:
            running[future] = place
    for future in as_completed(running):
        yield running[future], future.result()
