"""Tables of capacity under targets, and of how the targets are kept at the common load."""

from __future__ import annotations

from collections.abc import Sequence
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
from batchpilot.env.contest.summary import geometric_mean, ratio
from batchpilot.env.contest.text_table import TextTable, spread_text, times


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
                _by_seed(ours, best),
                f"{result.scenario.num_requests:,}",
            )
        )
    return TextTable(
        "Capacity: requests/s at which the targets are kept",
        (
            *("scenario", "default", "best static pair", "best watermark", "1+2 published"),
            *(OURS, "x default", "x best static", "seeds above, equal, below", "requests"),
        ),
        tuple(rows),
        "Medians over the seeds, (least-greatest). The best pair is the best for that scenario "
        f"alone; {OURS} is above, equal to or below it on so many seeds. Requests of a run: the "
        "fewer, the more one burst decides (--length).",
    )


def _by_seed(row: CapacityRow | None, rival: CapacityRow) -> str:
    """On how many seeds a row's capacity is above, equal to and below its rival's."""
    if row is None:
        return MISSING
    pairs = list(zip(row.rates_per_s, rival.rates_per_s, strict=True))
    above, below = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return f"{above}, {len(pairs) - above - below}, {below}"


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
    attainment: float
    itl: float | None
    ttft: float | None

    @classmethod
    def of(cls, row: CapacityRow, result: CapacityResult) -> _Standing:
        best, slo = result.best_static.capacity.median, result.scenario.slo
        assert slo.itl_slo_ms is not None
        assert slo.ttft_slo_ms is not None
        return cls(
            row.capacity.median / best if best else 0.0,
            row.pooled_attainment,
            ratio(row.itl_p99_ms, slo.itl_slo_ms) if row.itl_p99_ms else None,
            ratio(row.ttft_p99_ms, slo.ttft_slo_ms) if row.ttft_p99_ms else None,
        )


def _mean_percent(shares: Sequence[float]) -> str:
    return f"{percent(fmean(shares))} ({percent(min(shares))}-{percent(max(shares))})"


def _mean_ratio(ratios: Sequence[float | None]) -> str:
    known = [value for value in ratios if value is not None]
    return f"{geometric_mean(known):.2f}" if known else MISSING


def _capacity_of(result: CapacityResult) -> TextTable:
    target = result.scenario.slo.itl_slo_ms
    default = result.row(DEFAULT)
    rows = [
        (
            short_name(row.policy),
            spread_text(row.capacity),
            _times(row, default),
            percent(row.pooled_attainment),
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
                MISSING if ours is None else percent(ours.pooled_attainment),
            )
        )
    return TextTable(
        "The target is held: ITL p99 / target at the common load",
        ("scenario", "least of the static pairs", "which", OURS, f"{OURS} in SLO"),
        tuple(rows),
        "ITL p99 is over all token gaps; medians over the seeds. What no pair holds cannot be held "
        "by a token budget and a sequence limit of the grid.",
    )


def _best_watermark(result: CapacityResult) -> CapacityRow | None:
    rows = (row for row in result.rows if row.policy in WATERMARKS)
    return max(rows, key=lambda row: row.capacity.median, default=None)


def _rate(row: CapacityRow | None) -> str:
    return MISSING if row is None else spread_text(row.capacity)


def _times(row: CapacityRow | None, reference: CapacityRow | None) -> str:
    if row is None or reference is None:
        return MISSING
    return times(row.capacity.median, reference.capacity.median)


def _share(row: CapacityRow | None, target_ms: float) -> str:
    if row is None or row.itl_p99_ms is None:
        return MISSING
    return f"{row.itl_p99_ms / target_ms:.2f}"
