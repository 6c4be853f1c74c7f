"""Tables of throughput where memory binds."""

from __future__ import annotations

from collections.abc import Sequence

from batchpilot.env.bench.summary import MISSING, number
from batchpilot.env.contest.lineup import DEFAULT, OURS, short_name
from batchpilot.env.contest.saturation import SaturationResult
from batchpilot.env.contest.text_table import TextTable, spread_text, times


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
                times(tokens, default.tokens_per_s.median if default else None),
                times(tokens, best.tokens_per_s.median),
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
            spread_text(row.tokens_per_s),
            times(row.tokens_per_s.median, reference),
            spread_text(row.preemptions),
            number(sum(o.mean_running for o in row.outcomes) / len(row.outcomes)),
        )
        for row in result.rows
    ]
    return TextTable(
        f"{result.scenario.label}, saturated",
        ("contestant", "tokens/s", "x default", "preemptions", "running"),
        tuple(rows),
    )
