"""Draws a calibration: measured steps and the fitted curve through them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchpilot.env.bench.figures import WIDTH_INCHES, Colours
from batchpilot.env.calibrate.fit import StepSample
from batchpilot.env.calibrate.measure import Cell
from batchpilot.env.profiles import GpuProfile, StepTimeModel

_KINDS = ("decode", "prefill", "mixed")
_MARKERS = ("o", "s", "^")
_CURVE_POINTS = 120


def calibration_figure(profile: GpuProfile, cells: Sequence[Cell], colours: Colours) -> Figure:
    """Decoding by batch size, prompts by length, and every cell measured against fitted."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    samples = [cell.sample for cell in cells]
    _draw_decode(left, _of_kind(samples, "decode"), profile.step_time, colours)
    _draw_prefill(middle, _of_kind(samples, "prefill"), profile.step_time, colours)
    _draw_all(right, samples, profile.step_time, colours)
    error = profile.fit_error
    figure.suptitle(
        f"{profile.name}: {error.samples} cells, mean error {error.mean_relative:.1%}, "
        f"nine of ten within {error.p90_relative:.1%}",
        x=0.01,
        ha="left",
        color=colours.ink,
        fontsize=10,
    )
    return figure


def kind_of(sample: StepSample) -> str:
    """What a step held: `decode`, `prefill` or `mixed`."""
    if not sample.prefill_tokens:
        return "decode"
    return "mixed" if sample.decode_seqs else "prefill"


def _of_kind(samples: Sequence[StepSample], kind: str) -> list[StepSample]:
    return [sample for sample in samples if kind_of(sample) == kind]


def _draw_decode(
    axis: Axes, samples: Sequence[StepSample], model: StepTimeModel, colours: Colours
) -> None:
    """A curve for each context length, rounded to a power of two."""
    _prepare(axis, "decoding sequences", "step, ms", colours)
    contexts = [2 ** round(np.log2(s.kv_tokens / s.decode_seqs)) for s in samples]
    for index, context in enumerate(sorted(set(contexts))):
        chosen = [s for s, c in zip(samples, contexts, strict=True) if c == context]
        colour = colours.of(index)
        sizes = [sample.decode_seqs for sample in chosen]
        measured = [sample.seconds * 1e3 for sample in chosen]
        axis.plot(sizes, measured, "o", color=colour, markersize=3.5)
        fitted = [model.seconds(*sample[1:]) * 1e3 for sample in chosen]
        order = np.argsort(sizes)
        axis.plot(
            np.array(sizes)[order],
            np.array(fitted)[order],
            color=colour,
            linewidth=1.3,
            label=f"context near {context}",
        )
    _finish(axis, colours)


def _draw_prefill(
    axis: Axes, samples: Sequence[StepSample], model: StepTimeModel, colours: Colours
) -> None:
    _prepare(axis, "prompt tokens", "", colours)
    tokens = [sample.prefill_tokens for sample in samples]
    measured = [sample.seconds * 1e3 for sample in samples]
    axis.plot(tokens, measured, "s", color=colours.of(0), markersize=3.5, label="measured")
    if tokens:
        grid = np.linspace(0, max(tokens), _CURVE_POINTS)
        fitted = [model.seconds(0, round(count), 0) * 1e3 for count in grid]
        axis.plot(grid, fitted, color=colours.of(0), linewidth=1.3, label="fitted, one prompt")
    _finish(axis, colours)


def _draw_all(
    axis: Axes, samples: Sequence[StepSample], model: StepTimeModel, colours: Colours
) -> None:
    """Measured against fitted; the band is 10 % either way."""
    _prepare(axis, "measured, ms", "fitted, ms", colours)
    axis.set_xscale("log")
    axis.set_yscale("log")
    times = [sample.seconds * 1e3 for sample in samples]
    line = np.array([min(times) * 0.9, max(times) * 1.1])
    axis.fill_between(line, 0.9 * line, 1.1 * line, color=colours.grid, linewidth=0)
    axis.plot(line, line, color=colours.muted, linewidth=0.8)
    for index, (kind, marker) in enumerate(zip(_KINDS, _MARKERS, strict=True)):
        chosen = _of_kind(samples, kind)
        measured = [sample.seconds * 1e3 for sample in chosen]
        fitted = [model.seconds(*sample[1:]) * 1e3 for sample in chosen]
        axis.plot(
            measured, fitted, marker, color=colours.of(index), markersize=3, alpha=0.8, label=kind
        )
    _finish(axis, colours)


def _prepare(axis: Axes, x_label: str, y_label: str, colours: Colours) -> None:
    """Only the lines that carry something."""
    axis.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(which="both", length=0, labelsize=8)
    axis.grid(color=colours.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel(x_label, color=colours.muted)
    axis.set_ylabel(y_label, color=colours.muted)


def _finish(axis: Axes, colours: Colours) -> None:
    if axis.get_xscale() == "linear":
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, labelcolor=colours.ink)
