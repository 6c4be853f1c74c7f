"""What a run is measured by, from the tokens as they come.

Definitions, used everywhere in the bench:

- TTFT: a request's first output token minus its intended arrival, so that queueing counts.
- ITL: the gap between successive emissions of a request; an emission of k tokens counts as k gaps
  of a k-th each. A request's first emission has no gap.
- TPOT: (last token - first token) / (tokens - 1), per request of more than one token.
- Duration: from the start of the run to the last completion.
- SLO attainment: share of the submitted requests that completed with TTFT and TPOT inside the
  targets that are set. A request of one token has no TPOT and passes that target.
- Goodput: requests inside the targets per second of duration; all completed ones without targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.shadow import ShadowedPolicy
from batchpilot.env.engine import Engine, EngineStep

Milliseconds = NDArray[np.float64]


@dataclass(frozen=True)
class Slo(LatencyTargets):
    """The latency targets a request must meet: its TPOT the ITL target, its TTFT the other."""

    @property
    def is_set(self) -> bool:
        """Whether there is any target."""
        return self.itl_slo_ms is not None or self.ttft_slo_ms is not None

    def met_by(self, *, ttft_ms: float, tpot_ms: float | None) -> bool:
        """Whether a completed request is inside both targets."""
        ttft_met = self.ttft_slo_ms is None or ttft_ms <= self.ttft_slo_ms
        itl_met = self.itl_slo_ms is None or tpot_ms is None or tpot_ms <= self.itl_slo_ms
        return ttft_met and itl_met


@dataclass(frozen=True, slots=True)
class Distribution:
    """A summary of many values; every field is None where there was no value."""

    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, values: Sequence[float] | Milliseconds) -> Distribution:
        """Mean and percentiles, linearly interpolated."""
        if len(values) == 0:
            return cls()
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        return cls(float(np.mean(values)), float(p50), float(p95), float(p99))


class Sample(NamedTuple):
    """The engine after a step.

    Attributes:
        seconds: Since the start of the run.
        running: Sequences in RUNNING during the step.
        waiting: Requests waiting.
        limits: Limits the newest step was scheduled under.
        kv_cache_usage: Share of the KV blocks in use, 0 to 1.
        preemptions: Preemptions so far in the run.
        shadow: Limits that a policy which is only watched would have applied.
    """

    seconds: float
    running: int
    waiting: int
    limits: BatchLimits
    kv_cache_usage: float
    preemptions: int
    shadow: BatchLimits | None = None


@dataclass(slots=True)
class _RequestTrace:
    """One request as its tokens come; times on the engine's clock, in seconds."""

    arrival: float
    output_tokens: int
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    ended: bool = False

    @property
    def completed(self) -> bool:
        """Whether it ended with every token it was to give."""
        return self.ended and self.tokens == self.output_tokens

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return (self.first - self.arrival) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first."""
        return (self.last - self.first) * 1e3 / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class RunMeasurement:
    """What one run gave; see the module's definitions.

    Attributes:
        submitted: Requests that were to be served.
        completed: Requests that gave every token they were to give.
        failed: The others: refused, aborted or cut short.
        duration_s: Seconds; 0 where nothing completed.
        output_tokens: Tokens emitted.
        preemptions: Sequences preempted.
        recomputed_tokens: KV tokens those preemptions threw away.
        itl_ms: Every gap of every request, in milliseconds, unordered.
        tpot_ms: One value per completed request of more than one token.
        ttft_ms: One value per request that gave a token.
        requests_inside_slo: Completed requests inside the targets that are set.
        slo_is_set: Whether there was any target.
        timeline: A sample per step.
    """

    submitted: int
    completed: int
    failed: int
    duration_s: float
    output_tokens: int
    preemptions: int
    recomputed_tokens: int
    itl_ms: Milliseconds
    tpot_ms: Milliseconds
    ttft_ms: Milliseconds
    requests_inside_slo: int
    slo_is_set: bool
    timeline: tuple[Sample, ...] = field(repr=False)

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens emitted per second of duration."""
        return self.output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def slo_attainment(self) -> float | None:
        """Share of submitted requests inside the targets, 0 to 1; None without targets."""
        if not self.slo_is_set or not self.submitted:
            return None
        return self.requests_inside_slo / self.submitted

    @property
    def goodput_per_s(self) -> float:
        """Requests inside the targets per second of duration."""
        return self.requests_inside_slo / self.duration_s if self.duration_s else 0.0

    @property
    def mean_running(self) -> float:
        """Sequences in RUNNING, averaged over time."""
        if not self.timeline or self.timeline[-1].seconds <= 0:
            return 0.0
        ends = np.array([sample.seconds for sample in self.timeline])
        running = np.array([sample.running for sample in self.timeline])
        return float(np.diff(ends, prepend=0.0) @ running / ends[-1])

    @property
    def peak_running(self) -> int:
        """Most sequences in RUNNING in any step."""
        return max((sample.running for sample in self.timeline), default=0)


class RunRecorder:
    """Follows one run on one engine and sums it up."""

    def __init__(self, engine: Engine, slo: Slo, shadow: ShadowedPolicy | None = None) -> None:
        """Starts the run's clock.

        Args:
            engine: What is followed.
            slo: The targets.
            shadow: The policy that steers, where another decides beside it.
        """
        self._shadow = shadow
        self._engine = engine
        self._slo = slo
        self.start_seconds = engine.clock_seconds
        self._traces: dict[str, _RequestTrace] = {}
        self._gaps_seconds: list[float] = []
        self._samples: list[Sample] = []
        self._preemptions = 0
        self._recomputed_tokens = 0
        self._last_completion = self.start_seconds
        self._idle_until: float | None = None
        self.ended = 0
        self.output_tokens = 0

    def due_seconds(self, arrival_seconds: float) -> float:
        """When something intended for that long after the start comes, on the engine's clock."""
        return self.start_seconds + arrival_seconds

    def submitted(self, request_id: str, arrival_seconds: float, output_tokens: int) -> None:
        """A request was handed over, `arrival_seconds` after the start of the run by intent."""
        arrival = self.due_seconds(arrival_seconds)
        self._traces[request_id] = _RequestTrace(arrival, output_tokens)

    def refused(self, request_id: str) -> None:
        """The engine would not take a submitted request."""
        self._end(request_id, self._engine.clock_seconds)

    def unfinished(self) -> list[str]:
        """Ids of the requests that have not ended."""
        return [request_id for request_id, trace in self._traces.items() if not trace.ended]

    def surely_outside(self) -> int:
        """Requests that will not be inside the targets, whatever happens from now on."""
        now = self._engine.clock_seconds
        return sum(not self._may_be_inside(trace, now) for trace in self._traces.values())

    def inside_by_arrival(self) -> list[tuple[float, bool]]:
        """Of each request: when it arrived, in seconds of the run, and whether it is inside."""
        return [
            (
                trace.arrival - self.start_seconds,
                trace.completed and self._slo.met_by(ttft_ms=trace.ttft_ms, tpot_ms=trace.tpot_ms),
            )
            for trace in self._traces.values()
        ]

    def _may_be_inside(self, trace: _RequestTrace, now: float) -> bool:
        """Whether a request could still meet the targets if all its tokens came at once now."""
        if trace.ended and not trace.completed:
            return False
        first = trace.first if trace.tokens else now
        last = trace.last if trace.ended else now
        gaps = trace.output_tokens - 1
        tpot_ms = (last - first) * 1e3 / gaps if gaps else None
        return self._slo.met_by(ttft_ms=(first - trace.arrival) * 1e3, tpot_ms=tpot_ms)

    def stepped(self, step: EngineStep) -> Sample:
        """Takes in what a step brought; returns the sample it added to the timeline."""
        self._emitted(step.new_tokens, step.clock_seconds)
        for request_id in step.finished:
            self._end(request_id, step.clock_seconds)
        if step.record is not None:
            self._preemptions += step.record.preemptions
            self._recomputed_tokens += step.record.recomputed_tokens
        return self._sample(step)

    def idled(self) -> None:
        """The engine stood idle up to now; the next step says under which limits."""
        self._idle_until = self._engine.clock_seconds - self.start_seconds

    def result(self) -> RunMeasurement:
        """The run in numbers."""
        traces = list(self._traces.values())
        completed = [trace for trace in traces if trace.completed]
        inside = [t for t in completed if self._slo.met_by(ttft_ms=t.ttft_ms, tpot_ms=t.tpot_ms)]
        tpots = [trace.tpot_ms for trace in completed if trace.tpot_ms is not None]
        return RunMeasurement(
            submitted=len(traces),
            completed=len(completed),
            failed=len(traces) - len(completed),
            duration_s=self._last_completion - self.start_seconds,
            output_tokens=self.output_tokens,
            preemptions=self._preemptions,
            recomputed_tokens=self._recomputed_tokens,
            itl_ms=np.array(self._gaps_seconds) * 1e3,
            tpot_ms=np.array(tpots),
            ttft_ms=np.array([trace.ttft_ms for trace in traces if trace.tokens]),
            requests_inside_slo=len(inside),
            slo_is_set=self._slo.is_set,
            timeline=tuple(self._samples),
        )

    def _emitted(self, new_tokens: Mapping[str, int], now: float) -> None:
        traces, gaps = self._traces, self._gaps_seconds
        for request_id, count in new_tokens.items():
            trace = traces[request_id]
            if trace.tokens == 0:
                trace.first = now
            elif count == 1:
                gaps.append(now - trace.last)
            else:
                gaps.extend([(now - trace.last) / count] * count)
            trace.last = now
            trace.tokens += count
            self.output_tokens += count

    def _end(self, request_id: str, now: float) -> None:
        trace = self._traces[request_id]
        trace.ended = True
        self.ended += 1
        if trace.completed:
            self._last_completion = now

    def _sample(self, step: EngineStep) -> Sample:
        """Reads the step's own record where it has one: the snapshot is of the moment after."""
        snapshot = self._engine.snapshot()
        running, usage = snapshot.running, snapshot.kv_cache_usage
        if step.record is not None:
            running = step.record.running
            usage = step.record.kv_tokens / self._engine.facts.kv_capacity_tokens
        now = step.clock_seconds - self.start_seconds
        limits = self._engine.applied_limits
        shadow = None if self._shadow is None else self._shadow.limits
        if self._idle_until is not None:
            idle = Sample(
                self._idle_until,
                0,
                0,
                limits,
                0.0,
                self._samples[-1].preemptions if self._samples else 0,
                shadow,
            )
            self._samples.append(idle)
            self._idle_until = None
        sample = Sample(now, running, snapshot.waiting, limits, usage, self._preemptions, shadow)
        self._samples.append(sample)
        return sample
