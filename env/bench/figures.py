"""The bench's pictures. Colours are the caller's: a report has themes, a README has paper."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from batchpilot.env.bench.measure import Milliseconds, RunMeasurement, Sample
from batchpilot.env.bench.results import BenchResults, thin
from batchpilot.env.bench.summary import measurements, number, spread_over

POINTS = 600
# Points of a distribution's curve; its far tail is kept whole.
CURVE_POINTS = 400
WIDTH_INCHES = 9.6
# Of a policy's label: what a line may hold, and what a line more of it takes.
LABEL_CHARACTERS = 40
LINE_INCHES = 0.17
# Of a legend's row, its lines and gaps included.
LEGEND_CHARACTERS = 128
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Colours:
    """What a figure is drawn in.

    Attributes:
        ink: Text and lines that matter.
        muted: Axes and text that helps.
        grid: Lines behind.
        alarm: Preemptions and targets.
        paper: Background, None for none.
        series: One per policy; colour-blind safe (after Okabe and Ito), used in turn.
    """

    ink: str
    muted: str
    grid: str
    alarm: str
    paper: str | None
    series: tuple[str, ...]

    def of(self, index: int) -> str:
        """The colour of the policy at a place."""
        return self.series[index % len(self.series)]


PAPER = Colours(
    ink="#1b1f24",
    muted="#5f6873",
    grid="#e3e6ea",
    alarm="#b3123f",
    paper="#ffffff",
    series=("#0072b2", "#d55e00", "#008f68", "#a2458f", "#b87a00", "#3b6fd1"),
)


def timeline_figure(results: BenchResults, colours: Colours, round_index: int = 1) -> Figure:
    """Limit, running sequences and KV usage over time, a row per policy, all on the same scales.

    Args:
        results: A bench.
        colours: What to draw in.
        round_index: The round to show; all policies served the same requests in it.
    """
    runs = [run for policy in results.policies for run in results.of(policy)]
    shown = [run for run in runs if run.round == round_index]
    labels = [wrapped(run.policy) for run in shown]
    more_lines = sum(label.count("\n") for label in labels)
    height = 0.55 + 1.62 * len(shown) + LINE_INCHES * more_lines
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False, sharex=True)
    peak = max(run.measurement.peak_running for run in shown)
    for row, (run, label) in enumerate(zip(shown, labels, strict=True)):
        samples = thin(run.measurement.timeline, POINTS)
        left, right = axes[row]
        left.set_title(
            label,
            loc="left",
            color=colours.ink,
            fontweight="bold",
            fontsize=10,
            parse_math=False,
        )
        _draw_sequences(left, samples, colours, row, top=1.3 * max(peak, 1))
        _draw_kv_cache(right, samples, colours, row)
        summary = _one_line(run.measurement)
        right.set_title(summary, loc="right", color=colours.muted, fontsize=9)
    for axis, label in zip(axes[-1], ("seconds", "seconds"), strict=True):
        axis.set_xlabel(label, color=colours.muted)
        axis.set_xlim(left=0)
    return figure


def bars_figure(results: BenchResults, colours: Colours) -> Figure:
    """A bar per policy and measure: the median, its range, and a dot per round."""
    panels = _bar_panels(results)
    labels = [wrapped(policy) for policy in results.policies]
    lines = max(label.count("\n") for label in labels) + 1
    height = 0.75 + max(0.42, LINE_INCHES * lines) * len(labels)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, read) in zip(axes, panels.items(), strict=True):
        _draw_bars(axis, results, read, colours)
        axis.set_title(title, loc="left", color=colours.ink, fontsize=9)
    axes[0].set_yticks(range(len(labels)), labels, parse_math=False)
    axes[0].tick_params(axis="y", labelcolor=colours.ink)
    axes[0].invert_yaxis()
    return figure


def latency_figure(
    results: BenchResults, colours: Colours, itl_ms: float | None, ttft_ms: float | None
) -> Figure:
    """How many token gaps, and first tokens, are longer than a time; each with its target."""
    labels = [wrapped(policy) for policy in results.policies]
    columns, lines = _legend_shape(labels)
    figure = Figure(figsize=(WIDTH_INCHES, 3.53 + LINE_INCHES * lines), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_tails(left, results, colours, lambda m: m.itl_ms, itl_ms)
    left.set_xlabel("inter-token latency, ms", color=colours.muted)
    left.set_ylabel("share of gaps longer than this", color=colours.muted)
    _draw_tails(right, results, colours, lambda m: m.ttft_ms, ttft_ms)
    right.set_xlabel("time to first token, ms", color=colours.muted)
    right.set_ylabel("share of requests that waited longer", color=colours.muted)
    handles, _ = left.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        labelcolor=colours.ink,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def wrapped(label: str) -> str:
    """A policy's label in lines that a picture has room for, ended behind ':' and '/'."""
    most = LABEL_CHARACTERS
    lines = [""]
    for part in re.findall(rf"[^:/]{{0,{most - 1}}}[:/]|[^:/]{{1,{most}}}", label):
        if len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _legend_shape(labels: Sequence[str]) -> tuple[int, int]:
    """How many labels stand side by side, and how many lines that takes."""
    lines = [label.split("\n") for label in labels]
    widest = max(len(line) for several in lines for line in several)
    columns = min(len(labels), 4, LEGEND_CHARACTERS // (widest + 9))
    return columns, -(-len(labels) // columns) * max(map(len, lines))


def render(draw: Callable[[], Figure], colours: Colours, kind: str = "svg") -> bytes:
    """Draws a figure and gives the file's content.

    Args:
        draw: Makes the figure.
        colours: What it is drawn in.
        kind: "svg" or "png".
    """
    style: Any = {
        # Text stays text: small, searchable, and in the page's own font.
        "svg.fonttype": "none",
        # The same results give the same bytes.
        "svg.hashsalt": "batchpilot",
        "font.size": 9,
        "figure.constrained_layout.w_pad": 0.08,
        "figure.constrained_layout.h_pad": 0.08,
        "axes.edgecolor": colours.grid,
        "xtick.color": colours.muted,
        "ytick.color": colours.muted,
    }
    buffer = io.BytesIO()
    background = colours.paper or "none"
    with mpl.rc_context(style):
        figure = draw()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(
            buffer,
            format=kind,
            dpi=160,
            facecolor=background,
            metadata=metadata if kind == "svg" else None,
        )
    return _rounded(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _rounded(svg: bytes) -> bytes:
    """Cuts coordinates of paths to a hundredth of a point, which halves the file."""
    return re.sub(rb' d="[^"]+"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path.group()), svg)


def _plain(axis: Axes, colours: Colours) -> None:
    """Only the lines that carry something."""
    axis.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(which="both", length=0, labelsize=8)
    axis.grid(axis="y", color=colours.grid, linewidth=0.8)
    axis.set_axisbelow(True)


def _draw_sequences(
    axis: Axes, samples: Sequence[Sample], colours: Colours, row: int, top: float
) -> None:
    _plain(axis, colours)
    seconds = [sample.seconds for sample in samples]
    running = [sample.running for sample in samples]
    limit = [sample.limits.max_num_seqs for sample in samples]
    axis.fill_between(seconds, running, step="pre", color=colours.of(row), alpha=0.28, linewidth=0)
    axis.plot(seconds, running, drawstyle="steps-pre", color=colours.of(row), linewidth=1.1)
    axis.plot(seconds, limit, drawstyle="steps-pre", color=colours.ink, linewidth=1.3)
    beside = [s.shadow.max_num_seqs for s in samples if s.shadow]
    if beside:
        shadow = [s.shadow.max_num_seqs if s.shadow else np.nan for s in samples]
        axis.plot(
            seconds,
            shadow,
            drawstyle="steps-pre",
            color=colours.alarm,
            linewidth=1.2,
            linestyle=DASHES[1],
        )
    axis.set_ylim(0, top)
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_ylabel("sequences", color=colours.muted, fontsize=8)
    if row == 0:
        dashed = " · dashed: the shadow's" if beside else ""
        _key(axis, f"area: running · line: limit{dashed}", colours)
    height = 0.97
    if limit and min(limit) > top:
        _note(axis, f"limit {_range_text(limit)}, above the scale", colours.ink, height)
        height -= 0.11
    if beside and min(beside) > top:
        text = f"the shadow's limit {_range_text(beside)}, above the scale"
        _note(axis, text, colours.alarm, height)


def _range_text(limits: Sequence[int]) -> str:
    """One number, or least to greatest."""
    low, high = min(limits), max(limits)
    return f"{low}" if low == high else f"{low}-{high}"


def _draw_kv_cache(axis: Axes, samples: Sequence[Sample], colours: Colours, row: int) -> None:
    _plain(axis, colours)
    seconds = np.array([sample.seconds for sample in samples])
    usage = np.array([sample.kv_cache_usage * 100 for sample in samples])
    axis.fill_between(seconds, usage, step="pre", color=colours.of(row), alpha=0.28, linewidth=0)
    axis.plot(seconds, usage, drawstyle="steps-pre", color=colours.of(row), linewidth=1.1)
    preempted = np.diff([sample.preemptions for sample in samples], prepend=0) > 0
    axis.vlines(seconds[preempted], 104, 118, color=colours.alarm, linewidth=0.9)
    axis.set_ylim(0, 122)
    axis.set_yticks((0, 50, 100), ("0", "50", "100%"))
    axis.set_ylabel("KV cache", color=colours.muted, fontsize=8)
    if row == 0:
        _key(axis, "area: blocks in use · ticks on top: preemptions", colours)


def _key(axis: Axes, text: str, colours: Colours) -> None:
    """What is what, above the title."""
    more_lines = axis.get_title(loc="left").count("\n")
    axis.annotate(
        text,
        (1, 1.0),
        xycoords="axes fraction",
        xytext=(0, 18 + 72 * LINE_INCHES * more_lines),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=colours.muted,
        fontsize=8,
    )


def _note(axis: Axes, text: str, colour: str, height: float) -> None:
    axis.text(
        0.99, height, text, transform=axis.transAxes, ha="right", va="top", color=colour, fontsize=8
    )


def _one_line(measured: RunMeasurement) -> str:
    return (
        f"{number(measured.output_tokens_per_s)} tok/s, {measured.preemptions:,} preemptions, "
        f"{measured.mean_running:.0f} running on average"
    )


Read = Callable[[RunMeasurement], float | None]


def _p99(values: Milliseconds) -> float | None:
    return float(np.percentile(values, 99)) if len(values) else None


def _bar_panels(results: BenchResults) -> dict[str, Read]:
    panels: dict[str, Read] = {
        "output tokens/s": lambda m: m.output_tokens_per_s,
        "preemptions": lambda m: float(m.preemptions),
        "ITL p99, ms": lambda m: _p99(m.itl_ms),
        "TTFT p99, ms": lambda m: _p99(m.ttft_ms),
    }
    if any(run.measurement.slo_is_set for run in results.runs):
        panels["goodput, requests/s"] = lambda m: m.goodput_per_s
    return panels


def _draw_bars(axis: Axes, results: BenchResults, read: Read, colours: Colours) -> None:
    _plain(axis, colours)
    axis.grid(visible=False)
    axis.set_xticks(())
    axis.spines["bottom"].set_visible(False)
    highest = 0.0
    for row, policy in enumerate(results.policies):
        measured = measurements(results, policy)
        spread = spread_over(measured, read)
        if spread is None:
            continue
        values = [value for m in measured if (value := read(m)) is not None]
        highest = max(highest, spread.high)
        axis.barh(row, spread.median, height=0.62, color=colours.of(row), alpha=0.75, linewidth=0)
        axis.hlines(row, spread.low, spread.high, color=colours.ink, linewidth=1.2)
        axis.plot(values, [row] * len(values), "o", color=colours.ink, markersize=2.6)
        axis.annotate(
            number(spread.median),
            (spread.high, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colours.ink,
            fontsize=8,
        )
    axis.set_xlim(0, highest * 1.45 or 1)


def _draw_tails(
    axis: Axes,
    results: BenchResults,
    colours: Colours,
    read: Callable[[RunMeasurement], Milliseconds],
    target_ms: float | None,
) -> None:
    _plain(axis, colours)
    axis.grid(axis="x", color=colours.grid, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    longest = 0
    for row, policy in enumerate(results.policies):
        values = np.concatenate([read(run.measurement) for run in results.of(policy)])
        milliseconds, share = tail(values)
        longest = max(longest, len(values))
        axis.plot(
            milliseconds,
            share,
            color=colours.of(row),
            linewidth=1.6,
            linestyle=DASHES[row % len(DASHES)],
            label=policy,
        )
    axis.set_ylim(max(0.5 / max(longest, 1), 1e-4), 1.15)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g}%"))
    # Labels also where all values lie within one power of ten.
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    if target_ms is not None:
        axis.axvline(target_ms, color=colours.alarm, linewidth=1.3, linestyle=(0, (4, 2)))
        text = f" target {target_ms:g} ms"
        axis.text(target_ms, 1.2, text, color=colours.alarm, fontsize=8, ha="center", va="bottom")


def tail(values: Milliseconds) -> tuple[Milliseconds, Milliseconds]:
    """The share of values greater than each, thinned evenly on the logarithm of the share.

    Returns:
        Values in ascending order, and the share of all values that are at least as great.
    """
    ordered = np.sort(values[values > 0])
    if len(ordered) == 0:
        return ordered, ordered
    ranks = np.geomspace(1, len(ordered), min(CURVE_POINTS, len(ordered)))
    above = np.unique(np.round(ranks).astype(int))[::-1]
    return ordered[len(ordered) - above], above / len(values)
