"""The requests of an episode, handed out as their time comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.engine import EngineRequest
from batchpilot.env.replay import ReplayParameters, arrival_seconds, trace_end_seconds
from batchpilot.env.specs import split_phases
from batchpilot.env.workloads import (
    SATURATED,
    TRACE_ARRIVALS,
    Workload,
    WorkloadSpec,
    iter_engine_requests,
)

_FIRST_DRAW = 256
_SMALLEST_REFILL = 64


class Arrival(NamedTuple):
    """A request and when it arrives, in seconds from the start of the episode."""

    seconds: float
    request: EngineRequest


class RequestStream:
    """Hands out a workload's requests in order; what arrives after the horizon never comes.

    Without a number of requests there are as many as the horizon needs: a synthetic workload never
    runs dry, and with saturated arrivals new requests come whenever fewer than `refill_below` wait.
    A trace may end earlier.

    Args:
        spec: The workload; its seed decides everything.
        horizon_seconds: Length of the episode.
        vocab_size: Token ids of prompts stay below it.
        max_model_len: Longest prompt and output together that the engine takes.
        refill_below: With saturated arrivals, how many must wait.
        random_start: Replay a random stretch of a trace instead of its start.

    Raises:
        ConfigError: The workload cannot be built, holds a request that is too long, or has arrivals
            that would never reach the horizon.
    """

    def __init__(
        self,
        spec: WorkloadSpec,
        *,
        horizon_seconds: float,
        vocab_size: int,
        max_model_len: int,
        refill_below: int,
        random_start: bool = False,
    ) -> None:
        """Draws the requests; their prompts are made as they are handed out."""
        self._spec = spec
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._refill_below = refill_below
        self._refills = (
            spec.num_requests is None
            and spec.replay is None
            and (spec.arrivals or SATURATED).strip() == SATURATED
        )
        self._chunk = 0
        self._next: Arrival | None = None
        if self._refills:
            self._load(self._next_chunk())
        else:
            self._load(_covering(spec, horizon_seconds, random_start))

    @property
    def next_seconds(self) -> float | None:
        """When the next request arrives; None where none will."""
        return None if self._next is None else self._next.seconds

    def due(self, seconds: float, waiting: Callable[[], int]) -> Iterator[Arrival]:
        """Hands out what has arrived by now.

        Args:
            seconds: Since the start of the episode.
            waiting: Counts the requests that wait in the engine; asked with saturated arrivals.
        """
        if self._refills:
            yield from self._refill(seconds, self._refill_below - waiting())
            return
        while self._next is not None and self._next.seconds <= seconds:
            yield self._next
            self._next = next(self._arrivals, None)

    def _refill(self, seconds: float, count: int) -> Iterator[Arrival]:
        for _ in range(count):
            if self._next is None:
                self._load(self._next_chunk())
            assert self._next is not None
            yield self._next._replace(seconds=seconds)
            self._next = next(self._arrivals, None)

    def _load(self, workload: Workload) -> None:
        workload.check_fits(self._max_model_len)
        self._arrivals = self._timed(workload, self._chunk, self._chunk_seed)
        self._next = next(self._arrivals, None)
        self._chunk += 1

    def _next_chunk(self) -> Workload:
        count = max(2 * self._refill_below, _SMALLEST_REFILL)
        return replace(self._spec, num_requests=count, seed=self._chunk_seed).build()

    @property
    def _chunk_seed(self) -> int:
        """Seeds of its own for every chunk; the first keeps the workload's."""
        if self._chunk == 0:
            return self._spec.seed
        sequence = np.random.SeedSequence([self._spec.seed, self._chunk])
        return int(sequence.generate_state(1)[0])

    def _timed(self, workload: Workload, chunk: int, seed: int) -> Iterator[Arrival]:
        made = iter_engine_requests(workload, vocab_size=self._vocab_size, seed=seed)
        for planned, request in zip(workload.requests, made, strict=True):
            if chunk:
                request = replace(request, request_id=f"{request.request_id}-{chunk}")
            yield Arrival(planned.arrival_seconds, request)


def own_times(spec: WorkloadSpec) -> ReplayParameters | None:
    """The stretch of a trace that is replayed at its own arrival times; None where none is."""
    return spec.replay if spec.arrivals in (None, TRACE_ARRIVALS) else None


def _covering(spec: WorkloadSpec, horizon_seconds: float, random_start: bool) -> Workload:
    """A workload that reaches the horizon, cut there."""
    replay = own_times(spec)
    if replay is not None:
        stretch = _stretch(spec, replay, horizon_seconds, random_start)
        return spec.build(stretch)
    if spec.replay is not None or spec.num_requests is not None:
        return _cut(spec.build(), horizon_seconds)
    _check_goes_on(spec, horizon_seconds)
    count = _FIRST_DRAW
    while True:
        workload = replace(spec, num_requests=count).build()
        if workload.requests[-1].arrival_seconds >= horizon_seconds:
            return _cut(workload, horizon_seconds)
        count *= 2


def _check_goes_on(spec: WorkloadSpec, horizon_seconds: float) -> None:
    """Makes sure that more requests mean later ones."""
    for phase in split_phases(spec.arrivals or SATURATED, what="arrivals"):
        seconds = phase.start_s / spec.rate_scale
        if phase.text.strip() == SATURATED and seconds < horizon_seconds:
            raise ConfigError(
                f"arrivals {spec.arrivals!r}: from {seconds:g} s on every request is there at "
                f"once, and no number of them lasts to horizon_s={horizon_seconds:g}; give "
                f"num_requests, or {SATURATED!r} alone"
            )


def _stretch(
    spec: WorkloadSpec, replay: ReplayParameters, horizon_seconds: float, random_start: bool
) -> ReplayParameters:
    """As much of a trace as the horizon takes, from its start or from anywhere in it."""
    seconds = horizon_seconds * spec.rate_scale
    latest = trace_end_seconds(replay) - seconds
    start_s = replay.start_s
    if random_start and latest > start_s:
        start_s = _random_start(replay, latest, seconds, spec.seed)
    if start_s >= latest:
        return replace(replay, start_s=start_s)
    return replace(replay, start_s=start_s, end_s=start_s + seconds)


def _random_start(replay: ReplayParameters, latest: float, seconds: float, seed: int) -> float:
    """Any second up to the latest; where nothing comes for so long, that of some arrival."""
    rng = np.random.default_rng([seed, _STARTS])
    start_s = float(rng.uniform(replay.start_s, latest))
    arrivals_s = arrival_seconds(replay)
    inside = (start_s <= arrivals_s) & (arrivals_s < start_s + seconds)
    if inside.any() or not arrivals_s.size:
        return start_s
    return min(float(rng.choice(arrivals_s)), latest)


_STARTS = 100  # a stream of chance that no workload uses


def _cut(workload: Workload, horizon_seconds: float) -> Workload:
    """Without what comes after the horizon; the first request stays in any case."""
    first, *others = workload.requests
    inside = (request for request in others if request.arrival_seconds < horizon_seconds)
    return replace(workload, requests=(first, *inside))
