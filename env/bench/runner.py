"""Runs every contestant on the same requests, one after another on one engine, round by round."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shadow import ShadowedPolicy
from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.bench.measure import RunMeasurement, RunRecorder, Sample, Slo
from batchpilot.env.engine import Engine, EngineRequest, EngineStep

_LOG = logging.getLogger(__name__)

STALL_SECONDS = 60.0
# Ends a loop that even a clock does not: a simulated one may stand still.
STALL_STEPS = 100_000
PROGRESS_SECONDS = 0.25
WARM_UP_REQUESTS = 64
WARM_UP_TOKENS = 16


class EngineStalledError(RuntimeError):
    """The engine has unfinished requests and does nothing for them."""


class TimedRequest(NamedTuple):
    """A request and when it comes, in seconds after the start of its run."""

    arrival_seconds: float
    request: EngineRequest


@dataclass(frozen=True)
class Round:
    """The requests of one round; every contestant gets the same.

    Attributes:
        index: From 1.
        seed: What its lengths, arrivals, prompts and, on a virtual GPU, noise are drawn with.
        requests: In order of arrival.
    """

    index: int
    seed: int
    requests: tuple[TimedRequest, ...]


@dataclass(frozen=True)
class BenchRun:
    """One contestant's run in one round."""

    policy: str
    round: int
    seed: int
    measurement: RunMeasurement


class Progress(Protocol):
    """Sees a bench go on; called a few times a second."""

    def run_started(self, policy: str, round_index: int, requests: int) -> None:
        """A run begins; round 0 is the warm-up."""

    def advanced(self, ended: int, tokens_per_s: float, sample: Sample) -> None:
        """Requests that ended so far in this run, and how the engine stands."""

    def run_finished(self, run: BenchRun) -> None:
        """A run that counts has ended."""


class Watcher(Protocol):
    """Follows a run step by step, and may end it."""

    def stepped(self, recorder: RunRecorder, step: EngineStep) -> bool:
        """A step was taken in; True ends the run here, its open requests aborted."""


def run_bench(
    engine: Engine,
    contestants: Sequence[Contestant],
    rounds: Sequence[Round],
    slo: Slo,
    progress: Progress,
) -> list[BenchRun]:
    """Runs everything, in interleaved rounds after one discarded warm-up.

    Whatever drifts while it runs (heat, neighbours) then touches every contestant alike, and
    rotating the order of each round leaves nobody always first.

    Raises:
        ConfigError: A policy cannot be built.
        EngineStalledError: The engine stopped making progress.
    """
    defaults = {"itl_slo_ms": slo.itl_slo_ms, "ttft_slo_ms": slo.ttft_slo_ms}
    warm_up(engine, rounds[0], slo, progress)
    runs = []
    for number, current in enumerate(rounds):
        for contestant in rotated(contestants, number):
            progress.run_started(contestant.label, current.index, len(current.requests))
            measurement = run_one(engine, contestant, defaults, current, slo, progress)
            run = BenchRun(contestant.label, current.index, current.seed, measurement)
            progress.run_finished(run)
            runs.append(run)
    return runs


def rotated(contestants: Sequence[Contestant], by: int) -> list[Contestant]:
    """The contestants in the order of round `by`, counted from 0."""
    shift = by % len(contestants)
    return [*contestants[shift:], *contestants[:shift]]


def warm_up(engine: Engine, first: Round, slo: Slo, progress: Progress) -> None:
    """Touches what is slow only once: allocators, kernels, caches of the interpreter."""
    requests = tuple(
        TimedRequest(0.0, _shortened(timed.request)) for timed in first.requests[:WARM_UP_REQUESTS]
    )
    progress.run_started("warm-up", 0, len(requests))
    engine.set_policy(None)
    replay(engine, requests, slo, progress)


def _shortened(request: EngineRequest) -> EngineRequest:
    return replace(request, output_tokens=min(request.output_tokens, WARM_UP_TOKENS))


def run_one(
    engine: Engine,
    contestant: Contestant,
    defaults: Mapping[str, Any],
    current: Round,
    slo: Slo,
    progress: Progress,
) -> RunMeasurement:
    """One contestant on a round's requests, independent of what the engine served before.

    Raises:
        ConfigError: Its policy cannot be built.
        EngineStalledError: The engine stopped making progress.
    """
    engine.reset(current.seed)
    policy = contestant.steer(engine, defaults)
    # Rubbish of the last run is collected here, not in the middle of this one.
    gc.collect()
    try:
        return replay(engine, current.requests, slo, progress, shadow=shadow_of(policy))
    finally:
        engine.set_policy(None)


def shadow_of(policy: LimitPolicy | None) -> ShadowedPolicy | None:
    """The policy where another decides beside it."""
    return policy if isinstance(policy, ShadowedPolicy) else None


def replay(
    engine: Engine,
    requests: Sequence[TimedRequest],
    slo: Slo,
    progress: Progress,
    watcher: Watcher | None = None,
    shadow: ShadowedPolicy | None = None,
) -> RunMeasurement:
    """Serves the requests at their times until all have ended.

    Whatever ends it early (Ctrl-C, a fault, the watcher) first has its open requests aborted.

    Raises:
        EngineStalledError: No token, prefill or end for a minute of the engine's time.
    """
    recorder = RunRecorder(engine, slo, shadow)
    pending = deque(sorted(requests, key=lambda timed: timed.arrival_seconds))
    watch = _Watch(engine.clock_seconds)
    try:
        while pending or engine.has_unfinished_requests():
            _submit_due(engine, pending, recorder)
            if engine.has_unfinished_requests():
                step = _step(engine, recorder, watch, progress)
                if watcher is not None and watcher.stepped(recorder, step):
                    break
            elif pending:
                engine.wait_until(recorder.due_seconds(pending[0].arrival_seconds))
                recorder.idled()
                watch.progressed(engine.clock_seconds)
    finally:
        for request_id in recorder.unfinished():
            engine.abort_request(request_id)
    return recorder.result()


def _submit_due(engine: Engine, pending: deque[TimedRequest], recorder: RunRecorder) -> None:
    """Hands over every request whose time has come."""
    # The same sum that `wait_until` was given: a difference could round to just before it.
    while pending and recorder.due_seconds(pending[0].arrival_seconds) <= engine.clock_seconds:
        arrival_seconds, request = pending.popleft()
        recorder.submitted(request.request_id, arrival_seconds, request.output_tokens)
        try:
            engine.add_request(request)
        except ValueError as error:
            _LOG.warning("the engine refused request %s: %s", request.request_id, error)
            recorder.refused(request.request_id)


def _step(engine: Engine, recorder: RunRecorder, watch: _Watch, progress: Progress) -> EngineStep:
    """One engine step, measured, watched and now and then shown."""
    step = engine.step()
    sample = recorder.stepped(step)
    prefilled = step.record is not None and step.record.prefill_tokens > 0
    if step.new_tokens or step.finished or prefilled:
        watch.progressed(step.clock_seconds)
    else:
        watch.idle_step(engine, step.clock_seconds)
    if watch.shall_report(step.clock_seconds):
        rate = recorder.output_tokens / sample.seconds if sample.seconds > 0 else 0.0
        progress.advanced(recorder.ended, rate, sample)
    return step


class _Watch:
    """Tells a stalled engine from a slow one, and when to show progress again."""

    def __init__(self, now: float) -> None:
        self._last_progress = now
        self._last_report = now
        self._idle_steps = 0

    def progressed(self, now: float) -> None:
        """Something came out of the engine."""
        self._last_progress = now
        self._idle_steps = 0

    def idle_step(self, engine: Engine, now: float) -> None:
        """A step gave nothing; raises EngineStalledError where that has gone on for too long."""
        self._idle_steps += 1
        idle_seconds = now - self._last_progress
        if idle_seconds > STALL_SECONDS or self._idle_steps > STALL_STEPS:
            snapshot = engine.snapshot()
            raise EngineStalledError(
                f"the engine made no progress in {idle_seconds:.0f} s and {self._idle_steps} steps "
                f"with {snapshot.running} requests running and {snapshot.waiting} waiting"
            )

    def shall_report(self, now: float) -> bool:
        """Whether progress was last shown long enough ago."""
        if now - self._last_report < PROGRESS_SECONDS:
            return False
        self._last_report = now
        return True
