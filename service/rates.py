"""Token buckets: how often one client may do something, averaged, with a burst."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable


class TokenBucket:
    """Fills at `per_second` up to `burst`; full at first."""

    __slots__ = ("_burst", "_filled_at", "_level", "_per_second")

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        """Starts full at `now`, in seconds of any clock."""
        self._per_second = per_second
        self._burst = burst
        self._level = burst
        self._filled_at = now

    def take(self, now: float, cost: float = 1.0) -> bool:
        """Takes `cost` out, if there is so much; takes nothing otherwise."""
        level = self._level + (now - self._filled_at) * self._per_second
        self._filled_at = now
        self._level = min(level, self._burst)
        if self._level < cost:
            return False
        self._level -= cost
        return True


class ClientRates:
    """A bucket per client, for the `most` clients seen last.

    Args:
        per_second: What each may do, averaged.
        burst: What each may do at once.
        most: Clients remembered; forgetting one gives it a full bucket again.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        per_second: float,
        burst: float,
        most: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts knowing no client."""
        self._per_second = per_second
        self._burst = burst
        self._most = most
        self._clock = clock
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def take(self, client: Hashable, cost: float = 1.0) -> bool:
        """Whether the client may do it once more now; an amount above its burst is the burst."""
        now = self._clock()
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = TokenBucket(self._per_second, self._burst, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(client)
        return bucket.take(now, min(cost, self._burst))
