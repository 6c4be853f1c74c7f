"""When requests arrive: processes that give each request its time.

Where the rate changes with time, unit-rate Poisson times are mapped through the inverse of the
expected count, which is exact: nothing is thinned or binned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.env.specs import Kind

Times = npt.NDArray[np.float64]


class ArrivalProcess(Protocol):
    """Where arrival times come from."""

    def draw(self, rng: np.random.Generator, count: int) -> Times:
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

    def draw(self, rng: np.random.Generator, count: int) -> Times:
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

    def draw(self, rng: np.random.Generator, count: int) -> Times:
        """The running sum of the gaps."""
        return np.cumsum(rng.exponential(self._mean_gap_seconds, count))


@dataclass(frozen=True)
class GammaParameters(Parameters):
    """How many arrive, and how unevenly."""

    rate: float = parameter(above=0, help="requests per second, on average")
    cv: float = parameter(
        2.0, above=0, help="spread of the gaps over their mean; 1 is Poisson, more is bursty"
    )


class GammaArrivals:
    """Bursts: independent Gamma gaps of mean 1 / rate and coefficient of variation `cv`.

    Formula: shape 1 / cv^2, scale cv^2 / rate.
    """

    def __init__(self, params: GammaParameters) -> None:
        """Turns mean and spread into shape and scale."""
        self._shape = params.cv**-2
        self._scale_seconds = params.cv**2 / params.rate

    def draw(self, rng: np.random.Generator, count: int) -> Times:
        """The running sum of the gaps."""
        return np.cumsum(rng.gamma(self._shape, self._scale_seconds, count))


@dataclass(frozen=True)
class OnOffParameters(Parameters):
    """Two rates, each for its time, in turns."""

    on_rate: float = parameter(above=0, help="requests per second while on")
    off_rate: float = parameter(0.0, minimum=0, help="requests per second while off")
    on_s: float = parameter(10.0, above=0, help="seconds on")
    off_s: float = parameter(10.0, above=0, help="seconds off")


class OnOffArrivals:
    """A Poisson process whose rate switches between two values at fixed times, on first."""

    def __init__(self, params: OnOffParameters) -> None:
        """Keeps the rates and times."""
        self._params = params

    def draw(self, rng: np.random.Generator, count: int) -> Times:
        """Maps unit-rate times through whole cycles, then through the part of the last one."""
        p = self._params
        counts = np.cumsum(rng.exponential(1.0, count))
        on_count = p.on_rate * p.on_s
        cycles, rest = np.divmod(counts, on_count + p.off_rate * p.off_s)
        in_on = rest < on_count
        if p.off_rate > 0:
            in_off = p.on_s + (rest - on_count) / p.off_rate
        else:  # nothing comes while off, but for what rounding puts on its edge
            in_off = np.full(count, p.on_s)
        within: Times = np.where(in_on, rest / p.on_rate, in_off)
        return cycles * (p.on_s + p.off_s) + within


@dataclass(frozen=True)
class RampParameters(Parameters):
    """From one rate to another."""

    start_rate: float = parameter(minimum=0, help="requests per second at the start")
    end_rate: float = parameter(above=0, help="requests per second from the end of the ramp on")
    ramp_s: float = parameter(60.0, above=0, help="seconds from one to the other")


class RampArrivals:
    """A Poisson process whose rate goes from one value to another in a straight line, and stays.

    Formula: the expected count is r0 t + (r1 - r0) t^2 / (2 T) up to T, and rises by r1 after it.
    """

    def __init__(self, params: RampParameters) -> None:
        """Keeps the rates and the time."""
        self._params = params

    def draw(self, rng: np.random.Generator, count: int) -> Times:
        """Maps unit-rate times through the inverse of the expected count."""
        p = self._params
        counts = np.cumsum(rng.exponential(1.0, count))
        ramp_count = (p.start_rate + p.end_rate) / 2 * p.ramp_s
        inside = np.minimum(counts, ramp_count)
        slope = (p.end_rate - p.start_rate) / p.ramp_s
        # The root of the quadratic in the form that also holds for a slope of 0; rounding can make
        # the square a little negative at the end of a ramp that falls.
        square = np.maximum(p.start_rate**2 + 2 * slope * inside, 0.0)
        ramp: Times = 2 * inside / (p.start_rate + np.sqrt(square))
        after: Times = (counts - inside) / p.end_rate
        return ramp + after


class ShiftedArrivals:
    """One process after another: each holds from its start until the next one's.

    Args:
        starts: Seconds at which each begins, rising, the first 0.
        processes: One for each start; each begins afresh, as if its start were time 0.
    """

    def __init__(self, starts: Sequence[float], processes: Sequence[ArrivalProcess]) -> None:
        """Keeps them."""
        self._starts = tuple(starts)
        self._processes = tuple(processes)

    def draw(self, rng: np.random.Generator, count: int) -> Times:
        """Draws from each what falls in its time, until there are enough."""
        ends = [*self._starts[1:], np.inf]
        parts: list[Times] = []
        left = count
        for start, end, process in zip(self._starts, ends, self._processes, strict=True):
            times = start + process.draw(rng, left)
            parts.append(times[times < end])
            left -= len(parts[-1])
            if left == 0:
                break
        return np.concatenate(parts)


ARRIVALS: dict[str, Kind[ArrivalProcess]] = {
    "saturated": Kind(SaturatedParameters, SaturatedArrivals),
    "poisson": Kind(PoissonParameters, PoissonArrivals),
    "gamma": Kind(GammaParameters, GammaArrivals),
    "on-off": Kind(OnOffParameters, OnOffArrivals),
    "ramp": Kind(RampParameters, RampArrivals),
}
