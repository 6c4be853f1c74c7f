"""What the contest found, as JSON and as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from batchpilot.env.bench.figures import PAPER, Colours, render
from batchpilot.env.contest.capacity import CapacityResult
from batchpilot.env.contest.capacity_tables import capacity_tables, target_table
from batchpilot.env.contest.lineup import DEFAULT, OURS, is_static, short_name
from batchpilot.env.contest.overload import OverloadResult
from batchpilot.env.contest.overload_tables import overload_tables
from batchpilot.env.contest.saturation import SaturationResult
from batchpilot.env.contest.saturation_tables import saturation_tables
from batchpilot.env.contest.shift_tables import shift_tables
from batchpilot.env.contest.shifting import ShiftResult
from batchpilot.env.contest.text_table import TextTable

SCHEMA = 2
_WIDTH_INCHES = 9.6


@dataclass(frozen=True)
class ContestResults:
    """Everything a contest found; a section that was not asked for is empty.

    Attributes:
        command: The command line that runs it again.
        settings: Every setting, as JSON values.
        environment: What it ran on, as JSON values.
        capacity: By scenario.
        target: The same of static pairs and ours alone, where capacity was not asked for.
        overload: By scenario.
        saturation: By scenario.
        shifts: By scenario.
    """

    command: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    capacity: Sequence[CapacityResult] = ()
    target: Sequence[CapacityResult] = ()
    overload: Sequence[OverloadResult] = ()
    saturation: Sequence[SaturationResult] = ()
    shifts: Sequence[ShiftResult] = ()

    def tables(self) -> list[TextTable]:
        """All tables, in the order they are read."""
        found: list[TextTable] = []
        if self.capacity:
            found += capacity_tables(self.capacity)
        if self.target:
            found.append(target_table(self.target))
        if self.overload:
            found += overload_tables(self.overload)
        if self.saturation:
            found += saturation_tables(self.saturation)
        if self.shifts:
            found += shift_tables(self.shifts)
        return found

    def to_json_text(self) -> str:
        """The content of the JSON file."""
        sections = {
            name: [asdict(result) for result in getattr(self, name)]
            for name in ("capacity", "target", "overload", "saturation", "shifts")
        }
        head = {
            "schema": SCHEMA,
            "command": self.command,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "tables": [asdict(table) for table in self.tables()],
        }
        return json.dumps({**head, **sections}, indent=1, allow_nan=False) + "\n"


def render_page(results: ContestResults) -> str:
    """The page: a picture where there is a comparison of capacity, then every table."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    picture = None
    if results.capacity:
        svg = render(lambda: capacity_figure(results.capacity, PAPER), PAPER).decode()
        picture = Markup(svg[svg.index("<svg") :])
    return environment.from_string(template).render(
        results=results, tables=results.tables(), picture=picture
    )


def render_markdown(results: ContestResults) -> str:
    """Every table and the command that makes them, as Markdown."""
    parts = [f"# The contest's tables\n\nMade by `{results.command}`.\n"]
    for table in results.tables():
        parts.append(f"## {table.title}\n")
        rules = ("---", *["---:"] * (len(table.headings) - 1))
        lines = (table.headings, rules, *table.rows)
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        if table.legend:
            parts.append(table.legend + "\n")
    return "\n".join(parts).replace("*", r"\*")


def capacity_figure(results: Sequence[CapacityResult], colours: Colours) -> Figure:
    """A row per scenario: everybody's capacity over that of the best static pair."""
    figure = Figure(figsize=(_WIDTH_INCHES, 1.1 + 0.5 * len(results)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(1.0, color=colours.muted, linewidth=1.0)
    for row, result in enumerate(results):
        _draw_scenario(axis, row, result, colours)
    axis.set_yticks(range(len(results)), [result.scenario.label for result in results])
    axis.tick_params(axis="y", length=0, labelcolor=colours.ink)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("capacity over that of the best static pair", color=colours.muted)
    axis.grid(axis="x", color=colours.grid, linewidth=0.8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(
        shown.values(), shown, loc="outside upper left", ncols=4, frameon=False, fontsize=9
    )
    return figure


def _draw_scenario(axis: Any, row: int, result: CapacityResult, colours: Colours) -> None:
    best = result.best_static.capacity.median or 1.0
    for entry in result.rows:
        kind, colour, size, front = _look(entry.policy, colours)
        shown = entry.capacity
        if entry.policy in (OURS, DEFAULT):
            axis.hlines(row, shown.low / best, shown.high / best, color=colour, zorder=front)
        axis.plot(shown.median / best, row, "o", color=colour, ms=size, label=kind, zorder=front)


def _look(policy: str, colours: Colours) -> tuple[str, str, float, int]:
    """Its name in the legend, its colour, its size, and how far in front it stands."""
    if policy in (OURS, DEFAULT):
        return short_name(policy), colours.of(policy == DEFAULT), 8.0, 4
    if is_static(policy):
        return "static pairs", colours.muted, 4.0, 2
    return "other policies", colours.of(2), 4.0, 3
