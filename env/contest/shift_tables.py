"""Tables of what a change half-way costs."""

from __future__ import annotations

from collections.abc import Sequence

from batchpilot.env.bench.summary import MISSING, number, percent
from batchpilot.env.contest.lineup import DEFAULT, OURS, short_name
from batchpilot.env.contest.shifting import ShiftResult, ShiftRow
from batchpilot.env.contest.summary import spread
from batchpilot.env.contest.text_table import TextTable, spread_text


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
            spread_text(spread([float(number_inside) for number_inside in row.inside_by_seed])),
            *(str(row.inside_phase(phase)) for phase in result.phases),
            number(row.itl_p99_ms_of(last)),
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


def _regained(row: ShiftRow) -> str:
    """Median and range; a seed on which the target was not regained counts as the longest."""
    values = [float("inf") if value is None else value for value in row.regained_s]
    found = spread(values)
    texts = ["never" if value == float("inf") else f"{value:.3g}" for value in found]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]}-{texts[2]})"
