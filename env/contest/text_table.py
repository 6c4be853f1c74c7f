"""A table as plain rows of text, and what the cells of several tables have in common."""

from __future__ import annotations

from dataclasses import dataclass

from batchpilot.env.bench.summary import MISSING, number
from batchpilot.env.contest.summary import Spread, ratio


@dataclass(frozen=True)
class TextTable:
    """A table.

    Attributes:
        title: Above it.
        headings: Of the columns; the first is the row's name.
        rows: As many cells each.
        legend: Below it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: str = ""


def times(value: float | None, reference: float | None) -> str:
    """How many times the reference a value is, a dash where one of them is not there."""
    found = None if value is None or reference is None else ratio(value, reference)
    return MISSING if found is None else f"{found:.2f}"


def spread_text(found: Spread) -> str:
    """Median and range, the median alone where all values are the same."""
    if found.low == found.high:
        return number(found.median)
    return f"{number(found.median)} ({number(found.low)}-{number(found.high)})"
