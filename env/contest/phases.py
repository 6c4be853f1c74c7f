"""What happened in each phase of a run whose traffic or GPU changes half-way.

Definitions:

- A request belongs to the phase in which it arrives.
- Regained: from the start of a phase, the time until token gaps are inside the target again: the
  end of the last stretch of a second, moved on by a quarter of a second, whose gaps were longer
  than the target on average, within `SETTLING_SECONDS` of the start. 0 where there was none; None
  where the last such stretch is also the last that was looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from batchpilot.env.engine import EngineStep

#: How long after the start of a phase the target may be regained.
SETTLING_SECONDS = 20.0
WINDOW_SECONDS = 1.0
WINDOW_EVERY_SECONDS = 0.25


@dataclass(frozen=True)
class PhaseOutcome:
    """One phase of a run.

    Attributes:
        submitted: Requests that arrived in it.
        inside: Of them, inside the targets.
        regained_s: See the module.
        itl_p99_ms: 99th percentile of the token gaps in it, None where there was none.
    """

    submitted: int
    inside: int
    regained_s: float | None
    itl_p99_ms: float | None


@dataclass
class StepLatencies:
    """The steps of a run: when each ended, how long it took, how many sequences waited for it."""

    ends_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    decode_seqs: list[int] = field(default_factory=list)

    def add(self, step: EngineStep, start_seconds: float) -> None:
        """Takes a step in; those without a decode say nothing of token gaps."""
        record = step.record
        if record is not None and record.decode_seqs:
            self.ends_s.append(step.clock_seconds - start_seconds)
            self.seconds.append(record.seconds)
            self.decode_seqs.append(record.decode_seqs)


def phase_outcomes(
    requests: Sequence[tuple[float, bool]],
    latencies: StepLatencies,
    starts_s: Sequence[float],
    target_s: float,
) -> tuple[PhaseOutcome, ...]:
    """Sums each phase up.

    Args:
        requests: Arrival time and whether inside the targets, of each request.
        latencies: The run's steps.
        starts_s: When each phase begins, rising.
        target_s: The inter-token target, in seconds.
    """
    arrivals = np.array([arrival for arrival, _ in requests])
    inside = np.array([met for _, met in requests], dtype=bool)
    phase_of = np.searchsorted(np.array(starts_s), arrivals, side="right") - 1
    ends = np.array(latencies.ends_s)
    outcomes = []
    for index, start in enumerate(starts_s):
        end = starts_s[index + 1] if index + 1 < len(starts_s) else np.inf
        own = (ends > start) & (ends <= end)
        outcomes.append(
            PhaseOutcome(
                submitted=int(np.sum(phase_of == index)),
                inside=int(np.sum(inside[phase_of == index])),
                regained_s=regained_seconds(latencies, start, end, target_s),
                itl_p99_ms=_weighted_p99_ms(latencies, own),
            )
        )
    return tuple(outcomes)


def regained_seconds(
    latencies: StepLatencies, start_s: float, end_s: float, target_s: float
) -> float | None:
    """From the start of a phase until token gaps are inside the target again; see the module."""
    ends = np.array(latencies.ends_s)
    gaps = np.array(latencies.decode_seqs, dtype=float)
    over = (np.array(latencies.seconds) - target_s) * gaps
    last = min(SETTLING_SECONDS, end_s - start_s, (ends[-1] if len(ends) else 0.0) - start_s)
    regained = 0.0
    begins = np.arange(0.0, last - WINDOW_SECONDS + 1e-9, WINDOW_EVERY_SECONDS)
    for begin in begins.tolist():
        first, past = np.searchsorted(
            ends, (start_s + begin, start_s + begin + WINDOW_SECONDS), side="right"
        )
        if over[first:past].sum() > 0:
            regained = begin + WINDOW_SECONDS
    return None if len(begins) and regained == begins[-1] + WINDOW_SECONDS else float(regained)


def _weighted_p99_ms(
    latencies: StepLatencies, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> float | None:
    """The 99th percentile of token gaps: of steps, each as often as sequences decoded in it."""
    if not chosen.any():
        return None
    seconds = np.array(latencies.seconds)[chosen]
    weights = np.array(latencies.decode_seqs)[chosen]
    order = np.argsort(seconds)
    reached = np.cumsum(weights[order]) >= 0.99 * weights.sum()
    return float(seconds[order][int(np.argmax(reached))] * 1e3)
