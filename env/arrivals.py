"""When requests arrive: processes that give each request its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.env.specs import Kind


class ArrivalProcess(Protocol):
    """Where arrival times come from."""

    def draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """Draws arrival times.

        Args:
            rng: Source of chance.
            count: How many.

        Returns:
            Shape (count,): seconds since the start, never falling.
        """


@dataclass(frozen=True)
class SaturatedParameters(Parameters):
    """Nothing to choose."""


class SaturatedArrivals:
    """Every request is there at the start: the engine is as full as its limits let it be."""

    def __init__(self, params: SaturatedParameters) -> None:
        """Takes no parameter."""

    def draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """All zero."""
        return np.zeros(count)


@dataclass(frozen=True)
class PoissonParameters(Parameters):
    """How many arrive."""

    rate: float = parameter(above=0, help="requests per second, on average")


class PoissonArrivals:
    """A Poisson process: independent exponential gaps of mean 1 / rate, one before each request."""

    def __init__(self, params: PoissonParameters) -> None:
        """Keeps the rate."""
        self._mean_gap_seconds = 1 / params.rate

    def draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """The running sum of the gaps."""
        return np.cumsum(rng.exponential(self._mean_gap_seconds, count))


ARRIVALS: dict[str, Kind[ArrivalProcess]] = {
    "saturated": Kind(SaturatedParameters, SaturatedArrivals),
    "poisson": Kind(PoissonParameters, PoissonArrivals),
}
