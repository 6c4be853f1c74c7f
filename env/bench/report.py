"""One self-contained HTML page about a bench: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from batchpilot.env.bench import figures
from batchpilot.env.bench.results import BenchResults
from batchpilot.env.bench.summary import (
    MISSING,
    STATISTICS,
    Spread,
    headline,
    limit_text,
    number,
    percent,
    summarise,
)

# Stand-ins that the page replaces by its own variables: one drawing serves light and dark.
_VARIABLES = {
    "#010101": "--ink",
    "#010102": "--muted",
    "#010103": "--grid",
    "#010104": "--alarm",
    **{f"#0202{index:02x}": f"--series-{index}" for index in range(len(figures.PAPER.series))},
}
_THEMED = figures.Colours(
    ink="#010101",
    muted="#010102",
    grid="#010103",
    alarm="#010104",
    paper=None,
    series=tuple(colour for colour in _VARIABLES if colour.startswith("#0202")),
)


def render_report(results: BenchResults) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "spread": _spread_markup}
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    summaries = summarise(results)
    return environment.from_string(template).render(
        results=results,
        summaries=summaries,
        headline=headline(summaries, results.capacity),
        figures=_draw_all(results),
        statistics=STATISTICS,
        limit_text=limit_text,
        percent=percent,
        rounds=max(run.round for run in results.runs),
        runs=results.to_json()["runs"],
        facts=_facts(results),
        series=range(len(_THEMED.series)),
    )


def _draw_all(results: BenchResults) -> dict[str, Markup]:
    itl_ms, ttft_ms = results.config.get("itl_slo_ms"), results.config.get("ttft_slo_ms")
    drawings: dict[str, Callable[[], Figure]] = {
        "bars": lambda: figures.bars_figure(results, _THEMED),
        "timeline": lambda: figures.timeline_figure(results, _THEMED),
        "latency": lambda: figures.latency_figure(results, _THEMED, itl_ms, ttft_ms),
    }
    return {
        name: inline_svg(figures.render(draw, _THEMED).decode("utf-8"))
        for name, draw in drawings.items()
    }


def inline_svg(svg: str) -> Markup:
    """Makes a file's SVG fit to stand inside a page: its element only, in the page's colours."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, f"var({variable})")
    return Markup(element)


def _facts(results: BenchResults) -> dict[str, Mapping[str, Any]]:
    """The three blocks of settings, flat."""
    return {
        "Workload": _flat(results.workload),
        "Configuration": _flat(results.config),
        "Environment": _flat(results.environment),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[prefix + key] = ", ".join(map(str, value))
        else:
            flat[prefix + key] = MISSING if value is None else str(value)
    return flat


def _spread_markup(
    spread: Spread | None, show: Callable[[float | None], str] = number
) -> Markup | str:
    """The median, and the range below it where there is one."""
    if spread is None:
        return MISSING
    if spread.low == spread.high:
        return show(spread.median)
    return Markup("{}<small>{}&#8211;{}</small>").format(
        show(spread.median), show(spread.low), show(spread.high)
    )
