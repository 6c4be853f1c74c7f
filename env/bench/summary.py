"""A bench's numbers, one summary per policy over all rounds, and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from batchpilot.env.bench.capacity import TOLERANCE, Capacity
from batchpilot.env.bench.measure import Distribution, RunMeasurement
from batchpilot.env.bench.results import BenchResults

MISSING = "-"
LATENCY_NAMES = ("ITL", "TPOT", "TTFT")
STATISTICS = ("mean", "p50", "p95", "p99")


@dataclass(frozen=True, slots=True)
class Spread:
    """One number over the rounds.

    Attributes:
        median: The middle one.
        low: The least.
        high: The greatest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """None where no round has the number."""
        known = [value for value in values if value is not None]
        return cls(median(known), min(known), max(known)) if known else None


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """What one policy did over all rounds; None where no round has the number.

    Attributes:
        policy: Its label.
        rounds: How often it ran.
        rounds_differ: Whether any round came out otherwise than the first.
        submitted: Requests of all rounds; completed and failed likewise.
        completed: Those that gave every token.
        failed: The others.
        output_tokens: A round's.
        output_tokens_per_s: A round's.
        ratio: Median tokens/s over the first policy's.
        preemptions: A round's.
        recomputed_tokens: A round's.
        mean_running: A round's mean over time.
        peak_running: Most of any round.
        least_limit: Least `max_num_seqs` applied in any step.
        greatest_limit: Greatest `max_num_seqs` applied in any step.
        slo_attainment: A round's share, 0 to 1.
        goodput_per_s: A round's.
        latencies: Milliseconds by LATENCY_NAMES, then by STATISTICS.
    """

    policy: str
    rounds: int
    rounds_differ: bool
    submitted: int
    completed: int
    failed: int
    output_tokens: Spread | None
    output_tokens_per_s: Spread | None
    ratio: float | None
    preemptions: Spread | None
    recomputed_tokens: Spread | None
    mean_running: Spread | None
    peak_running: int
    least_limit: int | None
    greatest_limit: int | None
    slo_attainment: Spread | None
    goodput_per_s: Spread | None
    latencies: dict[str, dict[str, Spread | None]]


def summarise(results: BenchResults) -> list[PolicySummary]:
    """One summary per policy, in the order they were asked for."""
    first = spread_over(measurements(results, results.policies[0]), _rate)
    return [
        _summarise_policy(policy, measurements(results, policy), first)
        for policy in results.policies
    ]


def measurements(results: BenchResults, policy: str) -> list[RunMeasurement]:
    """What one policy's runs gave, by round."""
    return [run.measurement for run in results.of(policy)]


def spread_over(
    measured: Sequence[RunMeasurement], read: Callable[[RunMeasurement], float | None]
) -> Spread | None:
    """One number of every round."""
    return Spread.of([read(measurement) for measurement in measured])


def headline(summaries: Sequence[PolicySummary], capacities: Sequence[Capacity] = ()) -> str:
    """What the bench showed in a sentence, which claims nothing that lies within the spread.

    Compared by capacity where it was searched for, since each policy then ran at another rate; else
    by goodput where a target is set, else by tokens per second.
    """
    if capacities:
        return _capacity_headline(capacities)
    first = summaries[0]
    judge, describe = (
        (_goodput, _goodput_text) if first.slo_attainment else (_tokens_per_s, _rate_text)
    )
    best = max(summaries, key=lambda summary: judge(summary).median)
    if len(summaries) == 1:
        return f"{first.policy}: {describe(first)}."
    if best is first:
        text = f"No policy gave more than {first.policy}: {describe(first)}."
    else:
        text = f"{best.policy}: {describe(best)}, against {describe(first)} for {first.policy}."
    compared = summaries if best is first else (first, best)
    if best.rounds > 1 and not any(summary.rounds_differ for summary in compared):
        return (
            f"{text} One run each: nothing differs between the rounds, "
            "so there is no spread to judge that by."
        )
    if best is first:
        return text
    if best.rounds == 1:
        return f"{text} One round has no spread to judge that by."
    if judge(best).low <= judge(first).high:
        return f"{text} Their rounds overlap: read no winner from it."
    return text


def _capacity_headline(capacities: Sequence[Capacity]) -> str:
    first = capacities[0]
    best = max(capacities, key=lambda capacity: capacity.rate_per_s)
    if not best.rate_per_s:
        return "No policy kept the targets at any rate tried."
    if len(capacities) == 1:
        return f"{first.policy} keeps the targets up to {_capacity_text(first)}."
    if best is first:
        return (
            f"No policy keeps the targets at a higher rate than {first.policy}: "
            f"up to {_capacity_text(first)}."
        )
    text = (
        f"{best.policy} keeps the targets up to {_capacity_text(best)}, "
        f"against {_capacity_text(first)} for {first.policy}."
    )
    if best.rate_per_s <= first.rate_per_s * (1 + TOLERANCE):
        return f"{text} The search tells no closer than {TOLERANCE:.0%}: read no winner from it."
    return text


def _capacity_text(capacity: Capacity) -> str:
    more = "" if capacity.is_bounded else " or more"
    return f"{number(capacity.rate_per_s)} requests/s{more}"


def number(value: float | None) -> str:
    """A number with as many digits as help: 6,390 or 87.4 or 0.0371."""
    if value is None:
        return MISSING
    if value == int(value) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) < 1:
        return f"{value:#.3g}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share as per cent."""
    return MISSING if value is None else f"{value * 100:.1f}%"


def limit_text(summary: PolicySummary) -> str:
    """The limits applied: one number, or least to greatest."""
    low, high = summary.least_limit, summary.greatest_limit
    if low is None:
        return MISSING
    return str(low) if low == high else f"{low}-{high}"


def _summarise_policy(
    policy: str, measured: list[RunMeasurement], first: Spread | None
) -> PolicySummary:
    rate = spread_over(measured, _rate)
    limits = [sample.limits.max_num_seqs for m in measured for sample in m.timeline]
    return PolicySummary(
        policy=policy,
        rounds=len(measured),
        rounds_differ=any(not _came_out_alike(measured[0], other) for other in measured[1:]),
        submitted=sum(m.submitted for m in measured),
        completed=sum(m.completed for m in measured),
        failed=sum(m.failed for m in measured),
        output_tokens=spread_over(measured, lambda m: m.output_tokens),
        output_tokens_per_s=rate,
        ratio=rate.median / first.median if rate and first and first.median else None,
        preemptions=spread_over(measured, lambda m: m.preemptions),
        recomputed_tokens=spread_over(measured, lambda m: m.recomputed_tokens),
        mean_running=spread_over(measured, lambda m: m.mean_running),
        peak_running=max(m.peak_running for m in measured),
        least_limit=min(limits, default=None),
        greatest_limit=max(limits, default=None),
        slo_attainment=spread_over(measured, lambda m: m.slo_attainment),
        goodput_per_s=spread_over(measured, lambda m: m.goodput_per_s),
        latencies=_latencies(measured),
    )


def _came_out_alike(one: RunMeasurement, other: RunMeasurement) -> bool:
    """Whether two runs gave the same at the same times, but for the last digits of a sum."""
    return (one.completed, one.failed, one.output_tokens, one.preemptions) == (
        other.completed,
        other.failed,
        other.output_tokens,
        other.preemptions,
    ) and all(
        len(mine) == len(others) and np.allclose(mine, others, rtol=1e-9, atol=1e-6)
        for mine, others in ((one.itl_ms, other.itl_ms), (one.ttft_ms, other.ttft_ms))
    )


def _latencies(measured: list[RunMeasurement]) -> dict[str, dict[str, Spread | None]]:
    values = {
        "ITL": [Distribution.of(m.itl_ms) for m in measured],
        "TPOT": [Distribution.of(m.tpot_ms) for m in measured],
        "TTFT": [Distribution.of(m.ttft_ms) for m in measured],
    }
    return {
        name: {key: Spread.of([getattr(s, key) for s in rounds]) for key in STATISTICS}
        for name, rounds in values.items()
    }


def _rate(measured: RunMeasurement) -> float:
    return measured.output_tokens_per_s


def _tokens_per_s(summary: PolicySummary) -> Spread:
    return summary.output_tokens_per_s or Spread(0.0, 0.0, 0.0)


def _goodput(summary: PolicySummary) -> Spread:
    return summary.goodput_per_s or Spread(0.0, 0.0, 0.0)


def _rate_text(summary: PolicySummary) -> str:
    preemptions = summary.preemptions.median if summary.preemptions else None
    rate = _tokens_per_s(summary).median
    return f"{number(rate)} tokens/s with {number(preemptions)} preemptions"


def _goodput_text(summary: PolicySummary) -> str:
    share = summary.slo_attainment.median if summary.slo_attainment else None
    rate = _goodput(summary).median
    return f"{number(rate)} requests/s inside the targets ({percent(share)} of all)"
