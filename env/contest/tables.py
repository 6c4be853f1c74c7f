"""The contest's tables: plain rows of text, the same for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from batchpilot.env.bench.summary import MISSING, number, percent
from batchpilot.env.contest.capacity import CapacityResult, CapacityRow
from batchpilot.env.contest.lineup import (
    DEFAULT,
    OURS,
    PUBLISHED,
    WATERMARKS,
    grid_name,
    short_name,
)
from batchpilot.env.contest.overload import OverloadResult, OverloadRow
from batchpilot.env.contest.saturation import SaturationResult
from batchpilot.env.contest.shifting import ShiftResult, ShiftRow
from batchpilot.env.contest.summary import Spread, geometric_mean, ratio, spread


@dataclass(frozen=True)
class TextTable:
    """A table.

    Attributes:
        title: Above it.
        headings: Of the columns; the first is the row's name.
        rows: As many cells each.
        legend: Below it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: str = ""


def capacity_tables(results: Sequence[CapacityResult]) -> list[TextTable]:
    """One table of all scenarios, one of all contestants, and one for each scenario."""
    return [
        _capacity_overview(results),
        _ranking(results),
        *(_capacity_of(result) for result in results),
    ]


def _capacity_overview(results: Sequence[CapacityResult]) -> TextTable:
    rows = []
    for result in results:
        default, ours = result.row(DEFAULT), result.row(OURS)
        best = result.best_static
        published, marked = result.row(PUBLISHED), _best_watermark(result)
        rows.append(
            (
                result.scenario.label,
                _rate(default),
                f"{number(best.capacity.median)} ({short_name(best.policy)})",
                _rate(marked),
                _rate(published),
                _rate(ours),
                _times(ours, default),
                _times(ours, best),
            )
        )
    return TextTable(
        "Capacity: requests/s at which the targets are kept",
        (
            *("scenario", "default", "best static pair", "best watermark", "1+2 published"),
            *(OURS, "x default", "x best static"),
        ),
        tuple(rows),
        "Medians over the seeds, (least-greatest). The best pair is the best for that scenario "
        "alone.",
    )


def _ranking(results: Sequence[CapacityResult]) -> TextTable:
    """Everybody over all scenarios, the best first."""
    standings: dict[str, list[_Standing]] = {}
    for result in results:
        for row in result.rows:
            name = grid_name(row.policy, result.scenario)
            standings.setdefault(name, []).append(_Standing.of(row, result))
    complete = {name: found for name, found in standings.items() if len(found) == len(results)}

    def shares(name: str) -> list[float]:
        return [standing.share for standing in complete[name]]

    rows = [
        (
            name,
            f"{geometric_mean(shares(name)):.2f} ({min(shares(name)):.2f}-{max(shares(name)):.2f})",
            _mean_percent([standing.attainment for standing in complete[name]]),
            _mean_ratio([standing.itl for standing in complete[name]]),
            _mean_ratio([standing.ttft for standing in complete[name]]),
        )
        for name in sorted(complete, key=lambda name: -geometric_mean(shares(name)))
    ]
    return TextTable(
        "All over all scenarios: capacity over the best static pair's of each, and how targets are "
        "kept at the common load",
        ("contestant", "capacity", "in SLO*", "ITL p99 / target*", "TTFT p99 / target*"),
        tuple(rows),
        "Over the scenarios: geometric means, of the share in SLO the mean; (least-greatest). Only "
        "who took part in all of them. Pairs go by the large devices' names: small ones have half "
        "the sequences. 0: in some scenario no rate was kept. * at each scenario's common load.",
    )


class _Standing(NamedTuple):
    """A contestant in one scenario, in units that scenarios share."""

    share: float
    attainment: float | None
    itl: float | None
    ttft: float | None

    @classmethod
    def of(cls, row: CapacityRow, result: CapacityResult) -> _Standing:
        best, slo = result.best_static.capacity.median, result.scenario.slo
        assert slo.itl_slo_ms is not None
        assert slo.ttft_slo_ms is not None
        return cls(
            row.capacity.median / best if best else 0.0,
            row.attainment,
            ratio(row.itl_p99_ms, slo.itl_slo_ms) if row.itl_p99_ms else None,
            ratio(row.ttft_p99_ms, slo.ttft_slo_ms) if row.ttft_p99_ms else None,
        )


def _mean_percent(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    if not known:
        return MISSING
    return f"{percent(fmean(known))} ({percent(min(known))}-{percent(max(known))})"


def _mean_ratio(ratios: Sequence[float | None]) -> str:
    known = [value for value in ratios if value is not None]
    return f"{geometric_mean(known):.2f}" if known else MISSING


def _capacity_of(result: CapacityResult) -> TextTable:
    target = result.scenario.slo.itl_slo_ms
    default = result.row(DEFAULT)
    rows = [
        (
            short_name(row.policy),
            _spread(row.capacity),
            _times(row, default),
            percent(row.attainment),
            number(row.itl_p99_ms),
            MISSING if row.itl_p99_ms is None or not target else f"{row.itl_p99_ms / target:.2f}",
            number(row.ttft_p99_ms),
        )
        for row in result.rows
    ]
    slo = result.scenario.slo
    return TextTable(
        result.scenario.label,
        (
            *("contestant", "capacity, req/s", "x default", "in SLO*", "ITL p99*, ms"),
            *("/ target", "TTFT p99*, ms"),
        ),
        tuple(rows),
        f"Targets: ITL {slo.itl_slo_ms:g} ms, TTFT {slo.ttft_slo_ms:g} ms. * at the common load of "
        f"{result.common_rate_per_s:.3g} requests/s, which the best static pair keeps.",
    )


def target_table(results: Sequence[CapacityResult]) -> TextTable:
    """ITL p99 over the target, ours and the static pair that holds it best."""
    rows = []
    for result in results:
        ours, static = result.row(OURS), result.holding()
        target = result.scenario.slo.itl_slo_ms
        assert target is not None
        rows.append(
            (
                result.scenario.label,
                _share(static, target),
                MISSING if static is None else short_name(static.policy),
                _share(ours, target),
                MISSING if ours is None else percent(ours.attainment),
            )
        )
    return TextTable(
        "The target is held: ITL p99 / target at the common load",
        ("scenario", "least of the static pairs", "which", OURS, f"{OURS} in SLO"),
        tuple(rows),
        "ITL p99 is over all token gaps; medians over the seeds. What no pair holds cannot be held "
        "by a token budget and a sequence limit of the grid.",
    )


def overload_tables(results: Sequence[OverloadResult]) -> list[TextTable]:
    """One table of all scenarios, and one for each."""
    return [_overload_overview(results), *(_overload_of(result) for result in results)]


def _overload_overview(results: Sequence[OverloadResult]) -> TextTable:
    rows = []
    for result in results:
        ours, default = result.row(OURS), result.row(DEFAULT)
        best, published = result.best_static, result.row(PUBLISHED)
        rows.append(
            (
                f"{result.scenario.label}, {result.scenario.rate_per_s:.3g}/s",
                _inside(default),
                f"{_inside(best)} ({short_name(best.policy)})",
                _inside(published),
                _inside(ours),
                _times_inside(ours, default),
                _times_inside(ours, best),
            )
        )
    return TextTable(
        "Overload: share of requests inside the targets",
        (
            *("scenario", "default", "best static pair", "1+2 published", OURS),
            *("x default", "x best static"),
        ),
        tuple(rows),
        "At the rate that smooth traffic of mean lengths would just allow, in bursts. Medians over "
        "the seeds, (least-greatest); how many times as many, over all seeds.",
    )


def _overload_of(result: OverloadResult) -> TextTable:
    slo = result.scenario.slo
    assert slo.itl_slo_ms is not None
    assert slo.ttft_slo_ms is not None
    rows = [
        (
            short_name(row.policy),
            _inside(row),
            _ratio(row.itl_p99_ms, slo.itl_slo_ms),
            _ratio(row.ttft_p99_ms, slo.ttft_slo_ms),
        )
        for row in result.rows
    ]
    return TextTable(
        f"{result.scenario.label}, overloaded",
        ("contestant", "in SLO", "ITL p99 / target", "TTFT p99 / target"),
        tuple(rows),
        f"Targets: ITL {slo.itl_slo_ms:g} ms, TTFT {slo.ttft_slo_ms:g} ms; "
        f"{result.scenario.rate_per_s:.3g} requests/s.",
    )


def _times_inside(row: OverloadRow | None, reference: OverloadRow | None) -> str:
    if row is None or reference is None:
        return MISSING
    return _ratio(row.inside, reference.inside)


def _inside(row: OverloadRow | None) -> str:
    if row is None:
        return MISSING
    found = row.attainment
    if found.low == found.high:
        return percent(found.median)
    return f"{percent(found.median)} ({percent(found.low)}-{percent(found.high)})"


def saturation_tables(results: Sequence[SaturationResult]) -> list[TextTable]:
    """One table of all scenarios, and one for each."""
    return [_saturation_overview(results), *(_saturation_of(result) for result in results)]


def _saturation_overview(results: Sequence[SaturationResult]) -> TextTable:
    rows = []
    for result in results:
        ours, default, best = result.row(OURS), result.row(DEFAULT), result.best_by_hand
        marked = result.row("watermark:0.05")
        tokens = None if ours is None else ours.tokens_per_s.median
        rows.append(
            (
                result.scenario.label,
                MISSING if default is None else number(default.tokens_per_s.median),
                f"{number(best.tokens_per_s.median)} ({short_name(best.policy)})",
                number(tokens),
                _ratio(tokens, default.tokens_per_s.median if default else None),
                _ratio(tokens, best.tokens_per_s.median),
                MISSING if ours is None else number(ours.preemptions.median),
                MISSING if marked is None else number(marked.preemptions.median),
            )
        )
    return TextTable(
        "KV-bound saturation: output tokens/s",
        (
            *("scenario", "default", "best static or watermark", OURS, "x default", "x best"),
            *("preemptions", "of watermark 0.05"),
        ),
        tuple(rows),
        "Medians over the seeds. Every request is there at the start; no target is set.",
    )


def _saturation_of(result: SaturationResult) -> TextTable:
    default = result.row(DEFAULT)
    reference = default.tokens_per_s.median if default else None
    rows = [
        (
            short_name(row.policy),
            _spread(row.tokens_per_s),
            _ratio(row.tokens_per_s.median, reference),
            _spread(row.preemptions),
            number(sum(o.mean_running for o in row.outcomes) / len(row.outcomes)),
        )
        for row in result.rows
    ]
    return TextTable(
        f"{result.scenario.label}, saturated",
        ("contestant", "tokens/s", "x default", "preemptions", "running"),
        tuple(rows),
    )


def shift_tables(results: Sequence[ShiftResult]) -> list[TextTable]:
    """One table of all shifts, and one for each."""
    return [_shift_overview(results), *(_shift_of(result) for result in results)]


def _shift_overview(results: Sequence[ShiftResult]) -> TextTable:
    rows = []
    for result in results:
        ours, default = result.row(OURS), result.row(DEFAULT)
        oracle = " then ".join(short_name(result.oracle(p).policy) for p in result.phases)
        rows.append(
            (
                result.scenario.label,
                f"{percent(result.oracle_share)} ({oracle})",
                MISSING if default is None else percent(result.regret(default)),
                MISSING if ours is None else percent(result.regret(ours)),
                MISSING if ours is None else _regained(ours),
            )
        )
    return TextTable(
        "Shifts: regret to the best static pair of each phase",
        ("shift", "oracle in SLO", "regret of default", f"of {OURS}", "SLO regained after, s"),
        tuple(rows),
        "Regret: share of the oracle's requests inside the targets that a contestant lacks, over "
        "all seeds; negative where it has more. Regained: engine time, median (least-greatest).",
    )


def _shift_of(result: ShiftResult) -> TextTable:
    last = result.phases[-1]
    rows = [
        (
            short_name(row.policy),
            percent(result.regret(row)),
            _spread(spread([float(number_inside) for number_inside in row.inside_by_seed])),
            *(str(row.inside(phase)) for phase in result.phases),
            number(row.itl_p99_ms(last)),
            _regained(row),
        )
        for row in result.rows
    ]
    submitted = [
        sum(outcome.phases[phase].submitted for outcome in result.rows[0].outcomes)
        for phase in result.phases
    ]
    target = result.scenario.slo.itl_slo_ms
    return TextTable(
        result.scenario.label,
        (
            *("contestant", "regret", "inside a seed"),
            *(f"inside, phase {p + 1} of {submitted[p]}" for p in result.phases),
            *("ITL p99 after, ms", "regained after, s"),
        ),
        tuple(rows),
        f"Targets: ITL {target:g} ms, TTFT {result.scenario.slo.ttft_slo_ms:g} ms.",
    )


def _best_watermark(result: CapacityResult) -> CapacityRow | None:
    rows = (row for row in result.rows if row.policy in WATERMARKS)
    return max(rows, key=lambda row: row.capacity.median, default=None)


def _regained(row: ShiftRow) -> str:
    """Median and range; a seed on which the target was not regained counts as the longest."""
    values = [float("inf") if value is None else value for value in row.regained_s]
    found = spread(values)
    texts = ["never" if value == float("inf") else f"{value:.3g}" for value in found]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]}-{texts[2]})"


def _rate(row: CapacityRow | None) -> str:
    return MISSING if row is None else _spread(row.capacity)


def _times(row: CapacityRow | None, reference: CapacityRow | None) -> str:
    if row is None or reference is None:
        return MISSING
    return _ratio(row.capacity.median, reference.capacity.median)


def _ratio(value: float | None, reference: float | None) -> str:
    found = None if value is None or reference is None else ratio(value, reference)
    return MISSING if found is None else f"{found:.2f}"


def _share(row: CapacityRow | None, target_ms: float) -> str:
    if row is None or row.itl_p99_ms is None:
        return MISSING
    return f"{row.itl_p99_ms / target_ms:.2f}"


def _spread(found: Spread) -> str:
    if found.low == found.high:
        return number(found.median)
    return f"{number(found.median)} ({number(found.low)}-{number(found.high)})"
