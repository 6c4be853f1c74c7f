"""What `batchpilot top` shows: engines as rows, from the newest messages of WatchEngine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.wire import BINDINGS, EngineKey, engine_key

STALE_SECONDS = 3.0
KV_HIGH = 0.9
COLUMNS = (
    *("ENGINE", "RUN", "WAIT", "KV", "ITL/TARGET ms", "TOK/S", "SEQS", "TOKENS", "BINDS"),
    *("SOURCE", "POLICY", "LEASE", "AGE"),
)
LEFT = ("ENGINE", "BINDS", "SOURCE", "POLICY")
#: Columns of names that are cut off where the screen is narrow, and how much of them is kept.
SHRINKING = ("ENGINE", "POLICY")
SHORTEST_NAME = 16
#: Cells between two columns.
GAP = 2
BINDS = {"none": "-", "max_num_seqs": "seqs", "token_budget": "tokens"}


class Row(NamedTuple):
    """One engine as it is shown; None is not known.

    Attributes:
        engine: Group, name and rank.
        model: What it serves.
        running: Sequences in RUNNING.
        waiting: Requests that wait.
        kv_cache_usage: Share of KV blocks in use, 0 to 1.
        itl_ms: Mean inter-token latency of the newest report.
        itl_slo_ms: The target for it.
        tokens_per_second: Output tokens of the newest report, over its time.
        preemptions: In the newest report.
        max_num_seqs: Limit in force.
        max_num_batched_tokens: Limit in force.
        binding: What kept the next request out of the newest step.
        source: Who decided the limits in force.
        policy: What the service decides by.
        lease_seconds: How much longer the newest lease runs; None without one.
        report_seconds: Since the newest report.
        canary: Whether it tries its group's canary policy.
        problem: Why it gets no leases; empty while it does.
    """

    engine: str
    model: str
    running: int
    waiting: int
    kv_cache_usage: float
    itl_ms: float | None
    itl_slo_ms: float | None
    tokens_per_second: float
    preemptions: int
    max_num_seqs: int
    max_num_batched_tokens: int
    binding: str
    source: str
    policy: str
    lease_seconds: float | None
    report_seconds: float
    canary: bool
    problem: str


class Board:
    """The newest state of every engine; one thread writes, another reads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts empty."""
        self._clock = clock
        self._engines: dict[EngineKey, tuple[pb.EngineStatus, float]] = {}
        self.state = "connecting"
        self.messages = 0

    def take(self, response: pb.WatchEngineResponse) -> None:
        """Takes in what has changed."""
        now = self._clock()
        for status in response.engines:
            self._engines[engine_key(status.id)] = (status, now)
        for gone in response.gone:
            self._engines.pop(engine_key(gone), None)
        self.messages += 1

    def restart(self) -> None:
        """A new stream tells everything again."""
        self._engines = {}

    def rows(self) -> list[Row]:
        """Every engine, by group, name and rank."""
        now = self._clock()
        held = sorted(list(self._engines.items()))
        return [_row(key, status, now - then) for key, (status, then) in held]


def _row(key: EngineKey, status: pb.EngineStatus, since: float) -> Row:
    window, limits, hello = status.window, status.applied_limits, status.hello
    age = status.report_age_ms / 1e3 + since
    leased = status.HasField("lease")
    return Row(
        engine=str(key),
        model=hello.model_name,
        running=window.running,
        waiting=window.waiting,
        kv_cache_usage=window.used_blocks / max(1, hello.facts.total_blocks),
        itl_ms=1e3 * window.decode_seconds / window.decode_tokens if window.decode_tokens else None,
        itl_slo_ms=_itl_slo_ms(status),
        tokens_per_second=window.decode_tokens / window.seconds if window.seconds > 0 else 0.0,
        preemptions=window.preemptions,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        binding=BINDINGS[status.binding] if status.binding < len(BINDINGS) else "unknown",
        source=status.source,
        policy=status.lease.policy if leased else "",
        lease_seconds=_lease_seconds(status, since) if leased else None,
        report_seconds=age,
        canary=status.canary,
        problem=status.problem,
    )


def _itl_slo_ms(status: pb.EngineStatus) -> float | None:
    """The target in force; an older service tells the engine's own only."""
    told = status if status.HasField("itl_slo_ms") else status.hello
    return told.itl_slo_ms if told.HasField("itl_slo_ms") else None


def _lease_seconds(status: pb.EngineStatus, since: float) -> float:
    """How much longer the newest lease runs at most."""
    return max(0.0, (status.lease.lease_ms - status.lease_age_ms) / 1e3 - since)


#: What the key `s` goes through.
ORDERS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.engine,
    "waiting": lambda row: -row.waiting,
    "KV": lambda row: -row.kv_cache_usage,
    "ITL": lambda row: -(row.itl_ms or 0.0) / (row.itl_slo_ms or 1e3),
    "report age": lambda row: -row.report_seconds,
}


def view(rows: Iterable[Row], *, target: str, state: str, order: str = "name") -> Group:
    """The whole screen."""
    rows = sorted(rows, key=ORDERS[order])
    # An idle engine does not report: its row stays that of its last steps.
    fresh = [row for row in rows if row.report_seconds < STALE_SECONDS]
    running, waiting = sum(row.running for row in fresh), sum(row.waiting for row in fresh)
    speed = sum(row.tokens_per_second for row in fresh)
    style = "green" if state == "connected" else "bold red"
    head = Text.assemble(
        ("batchpilot top", "bold"),
        f"  {target}  ",
        (state, style),
        f"  {len(rows)} engines, {running} running, {waiting} waiting, {speed:,.0f} tok/s",
    )
    foot = Text(f"q quit   s sort (by {order})   * canary   lease: seconds left", style="dim")
    return Group(head, _Table(rows), *_problems(rows), foot)


class _Table:
    """The engines as a table that is no wider than the screen; a number is whole or not there.

    Args:
        rows: The engines.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        """Takes them in their order."""
        self._rows = list(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        table = Table(box=None, pad_edge=False, expand=False, header_style="bold")
        cells = [_cells(row) for row in self._rows]
        wanted = {
            name: max(len(name), *(cell.cell_len for cell in column), 0)
            for name, *column in zip(COLUMNS, *cells, strict=True)
        }
        widths = column_widths(wanted, options.max_width)
        for name, width in widths.items():
            table.add_column(
                name, justify="left" if name in LEFT else "right", no_wrap=True, width=width
            )
        for row, line in zip(self._rows, cells, strict=True):
            style = "dim" if row.report_seconds > STALE_SECONDS else ""
            table.add_row(*line[: len(widths)], style=style)
        yield table


def column_widths(wanted: Mapping[str, int], space: int) -> dict[str, int]:
    """Widths of the columns that are shown.

    Names are shortened as far as may be, the first the least; then columns go, from the right.

    Args:
        wanted: Width of each column's content, in cells, from left to right.
        space: Width of all columns with the gaps between them.
    """
    least = {
        name: min(width, SHORTEST_NAME) if name in SHRINKING else width
        for name, width in wanted.items()
    }
    names = list(wanted)
    while len(names) > 1 and sum(least[name] + GAP for name in names) > space:
        names.pop()
    spare = max(0, space - sum(least[name] + GAP for name in names))
    widths = {}
    for name in names:
        widths[name] = min(wanted[name], least[name] + spare)
        spare -= widths[name] - least[name]
    return widths


def _cells(row: Row) -> tuple[Text, ...]:
    return (
        Text(row.engine + (" *" if row.canary else "")),
        Text(str(row.running)),
        Text(str(row.waiting)),
        Text(
            f"{100 * row.kv_cache_usage:.0f} %",
            style="red" if row.kv_cache_usage > KV_HIGH else "",
        ),
        _latency(row),
        Text(f"{row.tokens_per_second:,.0f}"),
        Text(str(row.max_num_seqs), style="bold" if row.binding == "max_num_seqs" else ""),
        Text(
            str(row.max_num_batched_tokens), style="bold" if row.binding == "token_budget" else ""
        ),
        Text(BINDS.get(row.binding, row.binding)),
        Text(row.source, style="green" if row.source == "remote" else "yellow"),
        Text(row.policy or "-"),
        Text("-" if row.lease_seconds is None else f"{row.lease_seconds:.1f}"),
        Text(f"{row.report_seconds:.1f}"),
    )


def _latency(row: Row) -> Text:
    measured = "-" if row.itl_ms is None else f"{row.itl_ms:.1f}"
    if row.itl_slo_ms is None:
        return Text(f"{measured}/-")
    late = row.itl_ms is not None and row.itl_ms > row.itl_slo_ms
    return Text(f"{measured}/{row.itl_slo_ms:g}", style="red" if late else "green")


def _problems(rows: Iterable[Row]) -> list[Text]:
    return [
        Text(f"{row.engine}: no lease: {row.problem}", style="red") for row in rows if row.problem
    ]
