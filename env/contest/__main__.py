"""Every policy against every baseline on virtual GPUs: `python -m batchpilot.env.contest`.

Sections:

  capacity    the highest rate of bursty arrivals at which 99 % of the requests are inside the
              targets, for every contestant; and latency at one common load
  target      whether token gaps stay inside the target at that load, ours and the static pairs
  overload    share of requests inside the targets at the rate that smooth traffic would just allow
  saturation  output tokens/s and preemptions where the KV cache is what binds
  shifts      lengths, rate or GPU speed change half-way: regret to the best static pair of each
              phase, and the time until the target is regained

Finished runs are kept, so that what was interrupted goes on where it stopped; a changed policy has
only its own runs made again. The same settings give the same tables on every machine.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.environment import read_environment, usable_cores
from batchpilot.env.bench.results import check_folder, check_writable, write_whole
from batchpilot.env.bench.settings import option
from batchpilot.env.cache import cache_folder
from batchpilot.env.contest.capacity import compare_capacity
from batchpilot.env.contest.crew import Crew, open_crew
from batchpilot.env.contest.overload import compare_overloaded
from batchpilot.env.contest.report import ContestResults, render_markdown, render_page
from batchpilot.env.contest.saturation import compare_saturated
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.shifting import compare_shifts
from batchpilot.env.contest.text_table import TextTable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_PLAIN_WIDTH = 150
_FILES = ("json", "html", "markdown", "work_dir", "workers")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contest; returns the exit status (2 for bad input, 130 for Ctrl-C)."""
    args = vars(_parser().parse_args(argv))
    try:
        settings = ContestSettings(**args)
        if settings.work_dir:
            check_folder("work_dir", Path(settings.work_dir))
        for path in settings.output_files:
            check_writable(path)
        run(settings)
    except ConfigError as error:
        print(f"contest: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("contest: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run(settings: ContestSettings) -> ContestResults:
    """Runs what the settings ask for, prints the tables and writes the files.

    Raises:
        ConfigError: Something cannot be run.
    """
    folder = Path(settings.work_dir) if settings.work_dir else cache_folder() / "contest"
    with open_crew(settings.workers or usable_cores(), Console(stderr=True)) as crew:
        results = _compare(settings, crew, folder)
    write_whole(Path(settings.json), results.to_json_text())
    write_whole(Path(settings.html), render_page(results))
    if settings.markdown is not None:
        write_whole(Path(settings.markdown), render_markdown(results))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    for table in results.tables():
        print_table(table, console)
    return results


def _compare(settings: ContestSettings, crew: Crew, folder: Path) -> ContestResults:
    sections = settings.sections
    capacity = compare_capacity(settings, crew, folder) if "capacity" in sections else []
    target = capacity
    if "target" not in sections:
        target = []
    elif not capacity:
        target = compare_capacity(settings, crew, folder, only_target=True)
    return ContestResults(
        command=command(settings),
        settings={key: value for key, value in asdict(settings).items() if key not in _FILES},
        environment=read_environment(),
        capacity=capacity,
        target=target,
        overload=compare_overloaded(settings, crew, folder) if "overload" in sections else [],
        saturation=compare_saturated(settings, crew, folder) if "saturation" in sections else [],
        shifts=compare_shifts(settings, crew, folder) if "shifts" in sections else [],
    )


def command(settings: ContestSettings) -> str:
    """The command line that asks for these settings."""
    words = ["python", "-m", "batchpilot.env.contest"]
    for item in fields(settings):
        value = getattr(settings, item.name)
        if value is True:
            words.append(option(item.name))
        elif value != item.default and item.name not in _FILES:
            words += [option(item.name), str(value)]
    return shlex.join(words)


def print_table(table: TextTable, console: Console) -> None:
    """Prints a table."""
    shown = Table(title=table.title, title_justify="left")
    for place, heading in enumerate(table.headings):
        shown.add_column(heading, justify="right" if place else "left", overflow="fold")
    for row in table.rows:
        style = "bold" if row[0] == "predictive" else None
        shown.add_row(*(Text(cell) for cell in row), style=style)
    console.print(shown)
    if table.legend:
        console.print(table.legend, style="dim", highlight=False)
    console.print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m batchpilot.env.contest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for item in fields(ContestSettings):
        text = str(item.metadata["help"]).replace("%", "%%")
        if item.default is False:
            parser.add_argument(option(item.name), action="store_true", help=text)
            continue
        choices = item.metadata["choices"] or None
        parser.add_argument(
            option(item.name), default=item.default, choices=choices, metavar="VALUE", help=text
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
