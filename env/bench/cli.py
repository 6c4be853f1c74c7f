"""Run one workload under several policies on one engine, and compare them.

All policies serve the same requests on the same engine, in interleaved rounds after a discarded
warm-up. Writes results.json and one self-contained report.html, and prints tables. Nothing starts
before every setting has been checked; a bench that is interrupted writes nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from batchpilot.env.bench import measure
from batchpilot.env.bench.capacity import Capacity, Point
from batchpilot.env.bench.capacity_search import find_capacities
from batchpilot.env.bench.cells import Cells, LiveCells, bench_cells, open_cells, run_cells
from batchpilot.env.bench.contestants import describe_policies
from batchpilot.env.bench.environment import read_environment
from batchpilot.env.bench.figures import PAPER, render, timeline_figure
from batchpilot.env.bench.plan import BenchPlan, open_engine, prepare
from batchpilot.env.bench.progress import show_progress
from batchpilot.env.bench.report import render_report
from batchpilot.env.bench.results import (
    BenchResults,
    check_folder,
    check_writable,
    to_json_text,
    write_whole,
)
from batchpilot.env.bench.runner import BenchRun, EngineStalledError, run_bench, warm_up
from batchpilot.env.bench.settings import BenchSettings, option
from batchpilot.env.bench.summary import headline, summarise
from batchpilot.env.bench.table import print_capacity, print_tables

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# Where the output is no terminal its width is unknown; the tables fit this.
PLAIN_WIDTH = 100

WORKLOAD_FILE = """\
a workload file, as in --workload workload.yaml (--arrivals and --num-requests win over its own):
  workload:
    - chat: {output_max: 400}
    - lognormal: {prompt_mean: 1000, output_mean: 50}
      at_s: 60
  arrivals: poisson:4,poisson:16@60
  num_requests: 500"""

EXAMPLES = """\
examples:
  batchpilot bench --engine live --model tiny --policies static,watermark:0.05,memory
  batchpilot bench --engine live --policies static:max_num_seqs=16,static:max_num_seqs=64,static
  batchpilot bench --engine live --workload chat --arrivals poisson:4 --itl-slo-ms 50 \\
      --ttft-slo-ms 2000 --policies static,sla-guarded,memory+sla
  batchpilot bench --engine live --workload trace.csv --rate-scale 2 --html trace.html
  batchpilot bench --engine virtual --profile llama-3.1-8b-h100 --arrivals poisson:20 \\
      --workload chat --itl-slo-ms 40 --policies static,memory-peak
  batchpilot bench --engine virtual --profile llama-3.1-8b-rtx4090 --find-capacity \\
      --itl-slo-ms 60 --ttft-slo-ms 3000 --policies static,memory-peak,memory+sla"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option per setting; values are checked by `BenchSettings`, in one place."""
    for item in fields(BenchSettings):
        text = str(item.metadata["help"]).replace("%", "%%")
        if item.default is not MISSING and item.default is not None:
            text += f" (default: {item.default})"
        if item.name in _FLAGS:
            parser.add_argument(option(item.name), action="store_true", default=None, help=text)
            continue
        parser.add_argument(
            option(item.name),
            default=item.default,
            choices=item.metadata["choices"] or None,
            metavar=_METAVARS.get(item.name, "N"),
            help=text,
        )
    parser.epilog = "\n\n".join((_policies_text(), _definitions_text(), WORKLOAD_FILE, EXAMPLES))


_FLAGS = ("find_capacity", "fresh")
_METAVARS = {
    "engine": "live|virtual",
    "profile": "NAME|FILE",
    "noise": "X",
    "attainment": "X",
    "work_dir": "FOLDER",
    "model": "NAME",
    "policies": "A,B,C",
    "workload": "NAME|CSV|YAML",
    "arrivals": "HOW",
    "rate_scale": "X",
    "itl_slo_ms": "MS",
    "ttft_slo_ms": "MS",
    "json": "FILE",
    "html": "FILE",
    "plot": "FILE",
}


def run(args: argparse.Namespace) -> int:
    """Runs the bench; returns its exit status.

    Raises:
        ConfigError: A setting that cannot be used; nothing has been started or written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    given = {f.name: getattr(args, f.name) for f in fields(BenchSettings)}
    settings = BenchSettings(**{name: v for name, v in given.items() if v is not None})
    plan = prepare(settings)
    _check_places(settings)
    progress = Console(stderr=True)
    try:
        results = _measure(plan, progress)
    except KeyboardInterrupt:
        _complain(f"interrupted; nothing was written{_how_to_go_on(settings)}")
        return EXIT_INTERRUPTED
    except EngineStalledError as error:
        _complain(f"{error}; nothing was written")
        return EXIT_FAILED
    except BrokenProcessPool:
        _complain(
            "a worker process was killed, perhaps for want of memory (try fewer --workers); "
            f"nothing was written{_how_to_go_on(settings)}"
        )
        return EXIT_FAILED
    status = _save_results(results, settings, progress)
    _print_results(results)
    return status


def _check_places(settings: BenchSettings) -> None:
    """Tries every place that is written to, and makes its folder: when all the rest is right."""
    if settings.work_dir:
        check_folder("work_dir", Path(settings.work_dir))
    for path in settings.output_files:
        check_writable(path)


def _how_to_go_on(settings: BenchSettings) -> str:
    if settings.engine == "live":
        return ""
    again = "the command without --fresh" if settings.fresh else "the same command"
    return f"; finished runs are kept, {again} goes on from there"


def _measure(plan: BenchPlan, console: Console) -> BenchResults:
    """Runs every round, or searches for capacity, on the engine asked for."""
    settings = plan.settings
    target = settings.model if settings.engine == "live" else settings.profile
    console.print(f"starting the {settings.engine} engine with {target}", highlight=False)
    measure_on = _measure_live if settings.engine == "live" else _measure_virtual
    found = measure_on(plan, console)
    config = settings.to_json() | {
        "max_model_len": plan.max_model_len,
        "kv_capacity_tokens": found.kv_capacity_tokens,
    }
    return BenchResults(
        engine=settings.engine,
        model=plan.model.name,
        workload=plan.workload_to_json(),
        config=config,
        environment=read_environment(),
        command=settings.command(),
        runs=tuple(found.runs),
        capacity=found.capacity,
    )


class _Found(NamedTuple):
    """What an engine gave."""

    runs: list[BenchRun]
    capacity: tuple[Capacity, ...]
    kv_capacity_tokens: int


def _measure_live(plan: BenchPlan, console: Console) -> _Found:
    """Starts the engine, runs everything on it, and closes it again."""
    settings = plan.settings
    runs = len(plan.contestants) * settings.rounds
    with closing(open_engine(plan)) as engine:
        tokens = engine.facts.kv_capacity_tokens
        known = None if settings.find_capacity else runs  # a search ends when it has found
        with show_progress(console, known, settings.rounds) as progress:
            if settings.find_capacity:
                warm_up(engine, plan.rounds[0], settings.slo, progress)
                return _search(plan, LiveCells(engine, progress), console, tokens)
            measured = run_bench(engine, plan.contestants, plan.rounds, settings.slo, progress)
    return _Found(measured, (), tokens)


def _measure_virtual(plan: BenchPlan, console: Console) -> _Found:
    """Runs everything in processes of their own, one for each core."""
    settings = plan.settings
    tokens = (plan.kv_blocks - 1) * plan.block_size  # vLLM keeps one block for itself
    with open_cells(plan) as cells:
        if settings.find_capacity:
            return _search(plan, cells, console, tokens)
        wanted = bench_cells(plan)
        with show_progress(console, len(wanted), settings.rounds) as progress:
            return _Found(run_cells(cells, wanted, progress), (), tokens)


def _search(plan: BenchPlan, cells: Cells, console: Console, tokens: int) -> _Found:
    def tried(policy: str, point: Point) -> None:
        text = f"{policy}: {point.attainment:.1%} inside the targets at {point.rate:.3g} requests/s"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    capacity, runs = find_capacities(plan, cells, tried)
    return _Found(runs, capacity, tokens)


def _save_results(results: BenchResults, settings: BenchSettings, console: Console) -> int:
    """Writes every file and says so; returns the exit status."""
    try:
        _write_results(results, settings)
    except OSError as error:
        _complain(f"cannot write the results: {error.strerror or error}")
        return EXIT_FAILED
    written = ", ".join(str(path) for path in settings.output_files)
    console.print(f"wrote {written}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _print_results(results: BenchResults) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    summaries = summarise(results)
    print_tables(summaries, console)
    if results.capacity:
        print_capacity(results.capacity, float(results.config["attainment"]), console)
    console.print(headline(summaries, results.capacity), highlight=False, markup=False)


def _write_results(results: BenchResults, settings: BenchSettings) -> None:
    """Writes the numbers first: they are what took the time."""
    write_whole(Path(settings.json), to_json_text(results))
    write_whole(Path(settings.html), render_report(results))
    if settings.plot is not None:
        picture = render(lambda: timeline_figure(results, PAPER), PAPER, settings.plot_kind)
        write_whole(Path(settings.plot), picture)


def _complain(text: str) -> None:
    print(f"batchpilot bench: {text}", file=sys.stderr)


def _policies_text() -> str:
    listing = describe_policies()
    width = max(len(name) for name, _ in listing)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in listing]
    return "\n".join(
        ["policies (parameters follow the name, as in static:max_num_seqs=64):", *lines]
    )


def _definitions_text() -> str:
    """The definitions, from the one place that has them."""
    _, _, definitions = (measure.__doc__ or "").partition("\n\n")
    return f"definitions:\n{definitions.partition(chr(10) * 2)[2].strip()}"
