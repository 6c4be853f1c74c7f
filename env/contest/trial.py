"""One run of the contest: a contestant, a scenario, a rate and a seed; and what it gave.

A run under targets may be given up as soon as the share of requests inside them can no longer reach
what is asked for: where a search only wants to know whether a rate is kept, a lost run need not be
watched to its end.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.bench.environment import vllm_version
from batchpilot.env.bench.measure import Milliseconds, RunMeasurement, RunRecorder, Sample
from batchpilot.env.bench.runner import BenchRun, TimedRequest, replay
from batchpilot.env.bench.sources import imported, sources_digest
from batchpilot.env.bench.store import digest, keep
from batchpilot.env.contest.phases import PhaseOutcome, StepLatencies, phase_outcomes
from batchpilot.env.contest.scenario import NOISE, Scenario
from batchpilot.env.engine import EngineStep
from batchpilot.env.profiles import load_profile
from batchpilot.env.virtual_engine import VOCAB_SIZE, VirtualEngine, VirtualEngineConfig
from batchpilot.env.workloads import Workload, build_workload, engine_requests

_LOG = logging.getLogger(__name__)
#: Steps from one look at lost requests to the next.
_LOOK_EVERY = 16


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        scenario: Where.
        contestant: Who.
        rate_scale: Multiplies the scenario's arrival rate.
        seed: Of lengths, arrivals, prompts and noise.
        gives_up_below: Ends the run once this share inside the targets is out of reach; None runs
            to the end.
        phase_starts_s: Seconds at which the scenario's phases begin, the first 0.
        slow_factor: Multiplies step times from the last phase on.
    """

    scenario: Scenario
    contestant: Contestant
    rate_scale: float = 1.0
    seed: int = 0
    gives_up_below: float | None = None
    phase_starts_s: tuple[float, ...] = (0.0,)
    slow_factor: float = 1.0

    def name(self) -> str:
        """The digest of everything that decides what it gives, run to its end."""
        values = asdict(self)
        del values["gives_up_below"], values["contestant"]
        del values["scenario"]["label"]
        return digest(
            {
                "trial": values,
                "policy": self.contestant.identity,
                "profile": asdict(load_profile(self.scenario.profile)),
                "startup": asdict(self.scenario.startup_limits),
                "noise": NOISE,
                "sources": sources_digest(self.contestant.policy_name),
                "own_sources": _own_digest(),
                "vllm": vllm_version(),
            }
        )

    def workload(self) -> Workload:
        """What is served."""
        return build_workload(
            self.scenario.workload,
            num_requests=self.scenario.num_requests,
            arrivals=self.scenario.arrivals,
            rate_scale=self.rate_scale,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Outcome:
    """What a trial gave; latencies in milliseconds, None where there was no value.

    Attributes:
        submitted: Requests of the trial, those that never came because it was given up among them.
        inside: Requests inside the targets; of a trial that was given up, a lower bound.
        completed: Requests that gave every token.
        given_up: Whether it was given up.
        gave_up_below: The share it was given up at, if it was.
        duration_s: Engine seconds to the last completion.
        output_tokens: Tokens emitted.
        preemptions: Sequences preempted.
        recomputed_tokens: KV tokens those preemptions threw away.
        mean_running: Sequences in RUNNING, averaged over time.
        itl_p50_ms: Median gap between tokens.
        itl_p99_ms: 99th percentile of the gaps.
        tpot_p99_ms: 99th percentile of requests' mean gaps.
        ttft_p50_ms: Median time to the first token.
        ttft_p99_ms: Its 99th percentile.
        phases: One for each phase.
    """

    submitted: int
    inside: int
    completed: int
    given_up: bool
    duration_s: float
    output_tokens: int
    preemptions: int
    recomputed_tokens: int
    mean_running: float
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    tpot_p99_ms: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    gave_up_below: float | None = None
    phases: tuple[PhaseOutcome, ...] = field(default=())

    @property
    def attainment(self) -> float:
        """Share of the requests inside the targets."""
        return self.inside / self.submitted

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.duration_s if self.duration_s else 0.0


class OutcomeStore:
    """A folder of outcomes, one small JSON file each, by the trial's name."""

    def __init__(self, folder: Path) -> None:
        """Names the folder; it is made when the first is kept."""
        self._folder = folder

    def load(self, trial: Trial) -> Outcome | None:
        """What the trial gave; None where that is not known, or only up to where it was given up.

        A given-up outcome answers a trial that would be given up at that share or above.
        """
        path = self._path(trial)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["phases"] = tuple(PhaseOutcome(**phase) for phase in values["phases"])
            outcome = Outcome(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("%s cannot be read (%s): that trial is run again", path, error)
            return None
        return outcome if _answers(outcome, trial) else None

    def save(self, trial: Trial, outcome: Outcome) -> None:
        """Keeps an outcome, if it can."""
        keep(self._path(trial), json.dumps(asdict(outcome), allow_nan=False))

    def _path(self, trial: Trial) -> Path:
        name = trial.name()
        return self._folder / name[:2] / f"{name}.json"


def _answers(outcome: Outcome, trial: Trial) -> bool:
    """Whether an outcome is what a trial would give, as far as the trial would go on."""
    if not outcome.given_up:
        return True
    asked, gave_up = trial.gives_up_below, outcome.gave_up_below
    return asked is not None and gave_up is not None and asked >= gave_up


def run_stored(trial: Trial, store: OutcomeStore) -> Outcome:
    """What a trial gives: read where it is known, else run and kept.

    Raises:
        ConfigError: It cannot be run.
        EngineStalledError: The engine stopped making progress.
    """
    outcome = store.load(trial)
    if outcome is None:
        outcome = run_trial(trial)
        store.save(trial, outcome)
    return outcome


def run_trial(trial: Trial) -> Outcome:
    """Runs a trial on an engine kept for the next.

    Raises:
        ConfigError: It cannot be run.
        EngineStalledError: The engine stopped making progress.
    """
    workload = trial.workload()
    requests = engine_requests(workload, vocab_size=VOCAB_SIZE, seed=trial.seed)
    times = [request.arrival_seconds for request in workload.requests]
    timed = [TimedRequest(*pair) for pair in zip(times, requests, strict=True)]
    engine = _engine(_engine_config(trial))
    workload.check_fits(engine.max_model_len)
    engine.reset(trial.seed)
    trial.contestant.steer(engine, asdict(trial.scenario.slo))
    watcher = _TrialWatcher(trial)
    gc.collect()
    try:
        measured = replay(engine, timed, trial.scenario.slo, _Silent(), watcher)
    finally:
        engine.set_policy(None)
    return _outcome(trial, measured, watcher)


class _TrialWatcher:
    """Notes what phases need, and gives up where a trial is lost."""

    def __init__(self, trial: Trial) -> None:
        asked = trial.gives_up_below
        count = trial.scenario.num_requests
        # Rounded, for 0.01 * 300 is a little less than 3.
        self._spare = None if asked is None else int(round((1 - asked) * count, 6))
        self._steps = 0
        self.given_up = False
        self.latencies = StepLatencies() if len(trial.phase_starts_s) > 1 else None
        self.recorder: RunRecorder | None = None

    def stepped(self, recorder: RunRecorder, step: EngineStep) -> bool:
        """Takes a step in; True where more requests are lost than may be."""
        self.recorder = recorder
        if self.latencies is not None:
            self.latencies.add(step, recorder.start_seconds)
        self._steps += 1
        if self._spare is not None and self._steps % _LOOK_EVERY == 0:
            self.given_up = recorder.surely_outside() > self._spare
        return self.given_up


def _outcome(trial: Trial, measured: RunMeasurement, watcher: _TrialWatcher) -> Outcome:
    phases: tuple[PhaseOutcome, ...] = ()
    if watcher.latencies is not None and watcher.recorder is not None:
        target_ms = trial.scenario.slo.itl_slo_ms
        assert target_ms is not None, "phases are compared under targets"
        phases = phase_outcomes(
            watcher.recorder.inside_by_arrival(),
            watcher.latencies,
            trial.phase_starts_s,
            target_ms / 1e3,
        )
    return Outcome(
        submitted=trial.scenario.num_requests,
        inside=measured.requests_inside_slo,
        completed=measured.completed,
        given_up=watcher.given_up,
        duration_s=measured.duration_s,
        output_tokens=measured.output_tokens,
        preemptions=measured.preemptions,
        recomputed_tokens=measured.recomputed_tokens,
        mean_running=measured.mean_running,
        itl_p50_ms=_percentile(measured.itl_ms, 50),
        itl_p99_ms=_percentile(measured.itl_ms, 99),
        tpot_p99_ms=_percentile(measured.tpot_ms, 99),
        ttft_p50_ms=_percentile(measured.ttft_ms, 50),
        ttft_p99_ms=_percentile(measured.ttft_ms, 99),
        gave_up_below=trial.gives_up_below if watcher.given_up else None,
        phases=phases,
    )


def _percentile(values: Milliseconds, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def _engine_config(trial: Trial) -> VirtualEngineConfig:
    startup = trial.scenario.startup_limits
    is_slowed = trial.slow_factor != 1.0
    return VirtualEngineConfig(
        profile=trial.scenario.profile,
        max_num_seqs=startup.max_num_seqs,
        max_num_batched_tokens=startup.max_num_batched_tokens,
        kv_blocks=trial.scenario.kv_blocks,
        noise=NOISE,
        slow_factor=trial.slow_factor,
        slow_at_s=trial.phase_starts_s[-1] if is_slowed else 0.0,
    )


@lru_cache(maxsize=2)
def _engine(config: VirtualEngineConfig) -> VirtualEngine:
    return VirtualEngine(config)


@lru_cache(maxsize=1)
def _own_digest() -> str:
    """The code that makes what is served and reads what came of it."""
    modules = [*imported(("batchpilot.env.workloads", "batchpilot.env.contest.phases")), __name__]
    return digest({"modules": [(name, _digest_of(name)) for name in modules]})


def _digest_of(module: str) -> str:
    from importlib.util import find_spec

    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the source of {module} is not there")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


class _Silent:
    """Shows nothing: the parent shows whole searches."""

    def run_started(self, policy: str, round_index: int, requests: int) -> None:
        """Nothing."""

    def advanced(self, ended: int, tokens_per_s: float, sample: Sample) -> None:
        """Nothing."""

    def run_finished(self, run: BenchRun) -> None:
        """Nothing."""
