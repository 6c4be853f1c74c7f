"""Measure an engine's step times and write them as a GPU profile.

Starts a real vLLM on whatever device it finds, runs batches, contexts and prompts of many sizes,
fits the step-time form of a profile to what the steps took, and writes the profile, with its fit
error, for `--profile FILE`. A calibration that is interrupted writes nothing. Keep the machine
free of other work meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from batchpilot.env.bench.figures import PAPER, render
from batchpilot.env.bench.results import write_whole
from batchpilot.env.bench.runner import EngineStalledError
from batchpilot.env.bench.settings import option
from batchpilot.env.calibrate.fit import fit_error
from batchpilot.env.calibrate.measure import Cell, Progress
from batchpilot.env.calibrate.plot import calibration_figure, kind_of
from batchpilot.env.calibrate.runner import calibrate
from batchpilot.env.calibrate.settings import CalibrateSettings
from batchpilot.env.profiles import GpuProfile, profile_to_text

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
#: Mean relative error beyond which a fit is more likely disturbed than the form wrong.
DOUBTFUL_ERROR = 0.1
#: Share of the KV cache below which the largest measured batch says little of a full one.
LEAST_MEASURED_SHARE = 0.25
# Where the output is no terminal its width is unknown; the table fits this.
PLAIN_WIDTH = 100

EXAMPLES = """\
examples:
  batchpilot calibrate --model smollm2-135m --out smollm2.json --plot smollm2.svg
  batchpilot calibrate --model tiny --quick --out tiny.json"""

_FLAGS = ("quick",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option per setting; values are checked by `CalibrateSettings`, in one place."""
    for item in fields(CalibrateSettings):
        text = str(item.metadata["help"])
        if item.name in _FLAGS:
            parser.add_argument(option(item.name), action="store_true", help=text)
            continue
        if item.default is not None:
            text += f" (default: {item.default})"
        parser.add_argument(option(item.name), default=item.default, metavar="X", help=text)
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    """Calibrates; returns the exit status.

    Raises:
        ConfigError: A setting that cannot be used; nothing has been written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings = CalibrateSettings(
        **{item.name: getattr(args, item.name) for item in fields(CalibrateSettings)}
    )
    console = Console(stderr=True)
    _say(console, f"starting vLLM with {settings.model}")
    try:
        with show_progress(console) as progress:
            profile, cells = calibrate(settings, progress)
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        return EXIT_INTERRUPTED
    except EngineStalledError as error:
        _complain(f"{error}; nothing was written")
        return EXIT_FAILED
    status = _save(settings, profile, cells, console)
    _print_profile(profile, cells)
    if profile.fit_error.mean_relative > DOUBTFUL_ERROR:
        _complain("the fit is poor; if the machine did other work meanwhile, calibrate again")
    measured = max((cell.sample.kv_tokens for cell in cells), default=0)
    if measured < LEAST_MEASURED_SHARE * profile.kv_capacity_tokens:
        _complain(
            f"steps with up to {measured:,} KV tokens were measured, where "
            f"{profile.kv_capacity_tokens:,} fit: larger batches are extrapolated, and the error "
            "above says nothing of them"
        )
    return status


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """A bar on a terminal, a line per part elsewhere."""
    if not console.is_terminal:
        yield lambda part, done, total: _say(console, f"[{done}/{total}] {part}")
        return
    # Two refreshes a second: the display shares the interpreter with the engine it watches.
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(
        *columns, TextColumn("{task.description}"), console=console, refresh_per_second=2
    ) as bars:
        task = bars.add_task("starting", total=None)

        def show(part: str, done: int, total: int) -> None:
            bars.update(task, description=part, completed=done, total=total)

        yield show


def _print_profile(profile: GpuProfile, cells: Sequence[Cell]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    console.print(_error_table(profile, cells))
    step = profile.step_time
    console.print(
        f"{profile.name}: floor {step.floor_ms:.4g} ms, {step.token_ms:.3g} ms a token beyond "
        f"{knee_tokens(profile):.0f}, {step.decode_seq_ms:.3g} ms a decoding sequence, "
        f"{step.kv_token_ms * 1e3:.3g} ms per 1,000 tokens of context, noise {profile.noise:.1%}, "
        f"{profile.kv_capacity_tokens:,} KV tokens",
        highlight=False,
        markup=False,
    )


def knee_tokens(profile: GpuProfile) -> float:
    """Tokens in a step from which on it takes longer than the weights' read time."""
    step = profile.step_time
    if not step.token_ms:
        return float("inf")
    return (step.floor_ms - step.linear_base_ms) / step.token_ms


def _error_table(profile: GpuProfile, cells: Sequence[Cell]) -> Table:
    """The fit's error, kind by kind."""
    table = Table(title=f"fit of {profile.name}", title_justify="left")
    for heading in ("steps", "cells", "measured, ms", "mean error", "9 of 10 within"):
        table.add_column(heading, justify="left" if heading == "steps" else "right")
    samples = [cell.sample for cell in cells]
    for kind in ("decode", "prefill", "mixed", "all"):
        chosen = [s for s in samples if kind in ("all", kind_of(s))]
        if not chosen:
            continue
        measured = np.array([sample.seconds for sample in chosen])
        fitted = np.array([profile.step_time.seconds(*sample[1:]) for sample in chosen])
        error = fit_error(measured, fitted)
        table.add_row(
            kind,
            str(error.samples),
            f"{measured.min() * 1e3:.3g} to {measured.max() * 1e3:.3g}",
            f"{error.mean_relative:.1%}",
            f"{error.p90_relative:.1%}",
        )
    return table


def _save(
    settings: CalibrateSettings, profile: GpuProfile, cells: Sequence[Cell], console: Console
) -> int:
    """Writes every file and says so; returns the exit status."""
    try:
        _write(settings, profile, cells)
    except OSError as error:
        _complain(f"cannot write the profile: {error.strerror or error}")
        return EXIT_FAILED
    written = ", ".join(str(path) for path in settings.output_files)
    _say(console, f"wrote {written}")
    return 0


def _write(settings: CalibrateSettings, profile: GpuProfile, cells: Sequence[Cell]) -> None:
    """Writes the profile first: it is what took the time."""
    write_whole(Path(settings.out), profile_to_text(profile))
    if settings.plot is not None:
        picture = render(
            lambda: calibration_figure(profile, cells, PAPER), PAPER, settings.plot_kind
        )
        write_whole(Path(settings.plot), picture)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _complain(text: str) -> None:
    print(f"batchpilot calibrate: {text}", file=sys.stderr)
