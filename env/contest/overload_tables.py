"""Tables of who is inside the targets beyond capacity."""

from __future__ import annotations

from collections.abc import Sequence

from batchpilot.env.bench.summary import MISSING, percent
from batchpilot.env.contest.lineup import DEFAULT, OURS, PUBLISHED, short_name
from batchpilot.env.contest.overload import OverloadResult
from batchpilot.env.contest.results import Row
from batchpilot.env.contest.text_table import TextTable, times


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
            times(row.itl_p99_ms, slo.itl_slo_ms),
            times(row.ttft_p99_ms, slo.ttft_slo_ms),
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


def _times_inside(row: Row | None, reference: Row | None) -> str:
    if row is None or reference is None:
        return MISSING
    return times(row.inside, reference.inside)


def _inside(row: Row | None) -> str:
    if row is None:
        return MISSING
    found = row.attainment
    if found.low == found.high:
        return percent(found.median)
    return f"{percent(found.median)} ({percent(found.low)}-{percent(found.high)})"
