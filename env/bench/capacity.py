"""The highest arrival rate at which a policy keeps the targets, found by bisection.

The workload's arrival times are scaled, so that every rate serves the same requests in the same
order. A rate is kept when the share of submitted requests inside the targets, over all rounds, is
at least the attainment asked for. Steps:

1. From the workload's own rate, double while it is kept, or halve until it is.
2. Halve the gap on a log scale until its ends are within `TOLERANCE`.

Limitations: this takes for granted that a higher rate is never easier. A finite workload lets a
server fall behind a little and still end in time: ask for requests enough.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

#: How far apart the ends of the last gap may be, as a share.
TOLERANCE = 0.02
#: How often a rate is doubled or halved before the search gives up.
MOST_DOUBLINGS = 14


class Point(NamedTuple):
    """A rate that was tried.

    Attributes:
        rate: Requests per second, or a factor on the workload's own.
        attainment: Share of requests inside the targets, 0 to 1.
    """

    rate: float
    attainment: float


@dataclass(frozen=True)
class Capacity:
    """What a policy can serve.

    Attributes:
        policy: Its label.
        rate_per_s: Highest requests per second that kept the targets; 0 where none did.
        attainment: Share inside the targets there, or at the lowest rate tried.
        arrivals_s: Seconds over which its requests come at that rate; few say little of a lasting
            one.
        points: Every rate tried, in that order.
        is_bounded: False where even the highest rate tried was kept.
    """

    policy: str
    rate_per_s: float
    attainment: float
    arrivals_s: float
    points: tuple[Point, ...]
    is_bounded: bool

    def to_json(self) -> dict[str, Any]:
        """An entry of `capacity` in `results.json`."""
        return {
            "policy": self.policy,
            "rate_per_s": self.rate_per_s,
            "attainment": self.attainment,
            "arrivals_s": self.arrivals_s,
            "is_bounded": self.is_bounded,
            "points": [point._asdict() for point in self.points],
        }


def search(target: float, start: float) -> Generator[float, float, tuple[Point, ...]]:
    """Asks for rates until the highest that is kept lies within `TOLERANCE`.

    Args:
        target: The share that keeps them.
        start: The rate to begin with.

    Yields:
        A rate to try; takes the share that was inside the targets.

    Returns:
        Every rate tried, in that order.
    """
    points = [Point(start, (yield start))]
    rises = points[0].attainment >= target
    for _ in range(MOST_DOUBLINGS):
        rate = points[-1].rate * (2.0 if rises else 0.5)
        points.append(Point(rate, (yield rate)))
        if (points[-1].attainment >= target) != rises:
            break
    else:
        return tuple(points)
    low, high = sorted(point.rate for point in points[-2:])
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        points.append(Point(middle, (yield middle)))
        low, high = (middle, high) if points[-1].attainment >= target else (low, middle)
    return tuple(points)


def best_of(points: Sequence[Point], target: float) -> Point | None:
    """The highest rate below every rate that was not kept; None where there is none."""
    lost = min((p.rate for p in points if p.attainment < target), default=math.inf)
    kept = [p for p in points if p.attainment >= target and p.rate < lost]
    return max(kept, default=None)
