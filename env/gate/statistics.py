"""How sure a gain is: a paired bootstrap over cells and seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_SEED = 20250305


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
    interval is that of percentiles, two-sided. Source: Davison and Hinkley, "Bootstrap Methods and
    Their Application", 1997, sections 3.8 (hierarchical data) and 5.3 (percentile intervals).

    Args:
        gains: Shape (cells, seeds).
        confidence: Such as 0.95.
        resamples: How many.
    """
    cells, seeds = gains.shape
    rng = np.random.default_rng(_SEED)
    chosen_cells = rng.integers(cells, size=(resamples, cells, 1))
    chosen_seeds = rng.integers(seeds, size=(resamples, cells, seeds))
    means = gains[chosen_cells, chosen_seeds].mean(axis=(1, 2))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, (tail, 1.0 - tail))
    return Gain(float(gains.mean()), float(low), float(high))
