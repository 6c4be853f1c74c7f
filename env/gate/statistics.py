"""How sure a gain is: a paired bootstrap over cells and seeds."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_SEED = 20250305
#: From so many on, cells have a standard error, and tell of others.
FEWEST_CELLS = 3
ROUNDING = 1e-9


class Gain(NamedTuple):
    """A mean, and the interval it is in with the confidence asked for.

    Attributes:
        mean: Over cells of the mean over seeds.
        low: Lower end of the interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def relative_gains(new: Floats, old: Floats) -> Floats:
    """Gains of pairs: (new - old) / max(new, old), from -1 to 1.

    A loss is the usual share of the old. A gain is a share of the new: 0.5 is twice as much. So no
    cell in which the old one serves next to nobody can outweigh all others.

    Args:
        new: Shape (cells, seeds), at least 0.
        old: The same.
    """
    most = np.maximum(new, old)
    return np.where(most > 0, (new - old) / np.where(most > 0, most, 1.0), 0.0)


def bootstrap_gain(gains: Floats, *, confidence: float, resamples: int) -> Gain:
    """The mean gain with its interval, by resampling cells and, inside each, seeds.

    Both levels are drawn with replacement: the cells too stand for others that are not there. The
    interval is two-sided and studentised, since there are few cells: of a resample it takes
    (m* - m) / s*, with m* its mean and s* the standard error of its cells' means, and ends where
    m - s q does, q being that ratio's quantiles. (Percentiles of m* itself would be too narrow:
    with eight cells, 95 % of confidence would be 88.) Source: Davison and Hinkley, "Bootstrap
    Methods and Their Application", 1997, sections 3.8 (hierarchical data) and 5.2 (studentised).

    One cell or two have no standard error worth the name: there percentiles have to do, of the
    seeds in the main, and say nothing of other cells.

    Args:
        gains: Shape (cells, seeds).
        confidence: Such as 0.95.
        resamples: How many.
    """
    cells, seeds = gains.shape
    rng = np.random.default_rng(_SEED)
    chosen_cells = rng.integers(cells, size=(resamples, cells, 1))
    chosen_seeds = rng.integers(seeds, size=(resamples, cells, seeds))
    cell_means = gains[chosen_cells, chosen_seeds].mean(axis=2)
    mean, means = float(gains.mean()), cell_means.mean(axis=1)
    tail = (1.0 - confidence) / 2.0
    if cells < FEWEST_CELLS:
        low, high = np.quantile(means, (tail, 1.0 - tail))
        return Gain(mean, float(low), float(high))
    errors = _standard_error(cell_means)
    # A resample of one cell alone, again and again, says nothing, to within rounding.
    tells = errors > ROUNDING * errors.max()
    ratios = (means - mean)[tells] / errors[tells]
    low, high = np.quantile(ratios, (tail, 1.0 - tail)) if len(ratios) else (0.0, 0.0)
    error = float(_standard_error(gains.mean(axis=1)))
    return Gain(mean, mean - error * float(high), mean - error * float(low))


def _standard_error(cell_means: Floats) -> Floats:
    """Of the mean over cells, which come last."""
    found: Floats = cell_means.std(axis=-1, ddof=1) / math.sqrt(cell_means.shape[-1])
    return found
