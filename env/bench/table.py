"""The bench's tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchpilot.env.bench.capacity import Capacity
from batchpilot.env.bench.summary import (
    LATENCY_NAMES,
    MISSING,
    STATISTICS,
    PolicySummary,
    Spread,
    limit_text,
    number,
    percent,
)

LEGEND = (
    "Medians over the rounds, (least-greatest) below. x first: tokens/s over the first policy's. "
    "completed, failed: requests of all rounds. recomputed: KV tokens thrown away by preemptions."
)
BATCH_LEGEND = (
    "running: sequences, averaged over time. limit: max_num_seqs applied, least-greatest. in SLO: "
    "share of submitted requests completed inside the targets. goodput/s: such requests per "
    "second; all completed ones where no target is set."
)
LATENCY_LEGEND = (
    "Milliseconds. ITL: gap between a request's tokens. TPOT: a request's mean gap. "
    "TTFT: first token after arrival, queueing included."
)


def print_tables(summaries: Sequence[PolicySummary], console: Console) -> None:
    """Prints what each policy served, how full it ran, and how long tokens took."""
    tables = (
        (throughput_table, LEGEND),
        (batch_table, BATCH_LEGEND),
        (latency_table, LATENCY_LEGEND),
    )
    for make, legend in tables:
        console.print(make(summaries))
        console.print(legend, style="dim", highlight=False)


def print_capacity(found: Sequence[Capacity], attainment: float, console: Console) -> None:
    """Prints the highest rate at which each policy keeps the targets."""
    table = _table("requests/s", "x\nfirst", "inside\ntargets", "arrivals\nlast, s", "rates\ntried")
    first = found[0].rate_per_s
    for capacity in found:
        table.add_row(
            Text(capacity.policy),
            ("" if capacity.is_bounded else "at least ") + number(capacity.rate_per_s),
            f"{capacity.rate_per_s / first:.2f}" if first else MISSING,
            percent(capacity.attainment),
            number(capacity.arrivals_s),
            str(len(capacity.points)),
        )
    console.print(table)
    legend = (
        f"Capacity: the highest rate at which {percent(attainment)} of all requests are inside the "
        "targets, to 2 %. 0: not even at the lowest rate tried. The tables above are at that rate. "
        "Where the arrivals last a few seconds only, more requests are needed for a lasting rate."
    )
    console.print(legend, style="dim", highlight=False)


def throughput_table(summaries: Sequence[PolicySummary]) -> Table:
    """What each policy served: a row each."""
    table = _table(
        "tokens/s",
        "x\nfirst",
        "comp-\nleted",
        "\nfailed",
        "output\ntokens",
        "preemp-\ntions",
        "recom-\nputed",
    )
    for summary in summaries:
        table.add_row(
            Text(summary.policy),
            _cell(summary.output_tokens_per_s),
            MISSING if summary.ratio is None else f"{summary.ratio:.2f}",
            f"{summary.completed:,}",
            f"{summary.failed:,}",
            _median(summary.output_tokens),
            _cell(summary.preemptions),
            _median(summary.recomputed_tokens),
        )
    return table


def batch_table(summaries: Sequence[PolicySummary]) -> Table:
    """How full each policy ran, and how many requests met their targets: a row each."""
    table = _table("running\nmean", "running\npeak", "limit", "in SLO", "goodput/s")
    for summary in summaries:
        table.add_row(
            Text(summary.policy),
            _median(summary.mean_running),
            str(summary.peak_running),
            limit_text(summary),
            _cell(summary.slo_attainment, percent),
            _cell(summary.goodput_per_s),
        )
    return table


def latency_table(summaries: Sequence[PolicySummary]) -> Table:
    """How long tokens took: three rows each."""
    table = _table("", *STATISTICS)
    for summary in summaries:
        name = summary.policy
        for latency, statistics in summary.latencies.items():
            cells = [_median(statistics[key]) for key in STATISTICS]
            table.add_row(Text(name), latency, *cells, end_section=latency == LATENCY_NAMES[-1])
            name = ""
    return table


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy", overflow="fold", vertical="top", min_width=14)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="top")
    return table


def _median(spread: Spread | None) -> str:
    return number(None if spread is None else spread.median)


def _cell(spread: Spread | None, show: Callable[[float | None], str] = number) -> str:
    """The median, and the range below it where there is one."""
    if spread is None:
        return MISSING
    if spread.low == spread.high:
        return show(spread.median)
    return f"{show(spread.median)}\n[dim]({show(spread.low)}-{show(spread.high)})[/dim]"
