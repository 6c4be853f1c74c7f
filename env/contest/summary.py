"""Medians and ranges over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, fsum, log
from statistics import median
from typing import NamedTuple


class Spread(NamedTuple):
    """Values over the seeds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest.

    Args:
        values: At least one.
    """
    return Spread(float(median(values)), min(values), max(values))


def median_of(values: Sequence[float | None]) -> float | None:
    """The median of what is there, None where nothing is."""
    known = [value for value in values if value is not None]
    return float(median(known)) if known else None


def geometric_mean(values: Sequence[float]) -> float:
    """Of values that are at least 0; 0 where one is."""
    if not values or min(values) <= 0:
        return 0.0
    return exp(fsum(log(value) for value in values) / len(values))


def ratio(value: float, reference: float) -> float | None:
    """How many times the reference a value is; None where the reference is 0."""
    return value / reference if reference else None
