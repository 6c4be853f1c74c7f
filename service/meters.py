"""Running totals of what the service does; plain numbers, read by the metrics page.

Nothing here locks: the event loop writes, and a reader may see a total a moment late.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter

from batchpilot.agents.shield import Clamp
from batchpilot.service.rates import TokenBucket

#: Upper ends of the latency histogram's buckets, in seconds.
LATENCY_BUCKETS = (25e-6, 50e-6, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 1.0)

#: Refusals that are logged, averaged and at once; the rest are only counted.
LOGGED_PER_SECOND, LOGGED_AT_ONCE = 1.0, 50.0
#: Groups that are counted by name.
MOST_GROUPS = 200


class Histogram:
    """Counts by bucket; the last is what exceeds all."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        """Starts empty."""
        self.counts = [0] * (len(LATENCY_BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.total += seconds


class Meters:
    """Totals of one service.

    Attributes:
        leases: Leases sent, by group.
        latency: Time from a report to its decision, in the service's own code.
        clamps: Decisions that the service's shield changed, by group and reason.
        policy_failures: Policies taken out of use for an engine, by group.
        errors: Calls that ended with an error, by method and status code.
        refusals: What was refused, by reason.
        verdicts: Trials that ended by themselves, by group and verdict.
        canary_problems: Whether a trial under way has nothing to compare, by group.
        reloads: Files read again, by `ok` or `failed`.
        started_at: Seconds since 1970.
    """

    def __init__(self) -> None:
        """Starts at nothing."""
        self.leases: Counter[str] = Counter()
        self.latency = Histogram()
        self.clamps: Counter[tuple[str, str]] = Counter()
        self.policy_failures: Counter[str] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        self.refusals: Counter[str] = Counter()
        self.verdicts: Counter[tuple[str, str]] = Counter()
        self.canary_problems: dict[str, bool] = {}
        self.reloads: Counter[str] = Counter()
        self.started_at = time.time()
        self._groups: set[str] = set()
        self._log_bucket = TokenBucket(LOGGED_PER_SECOND, LOGGED_AT_ONCE, time.monotonic())

    def leased(self, group: str) -> None:
        """Counts a lease."""
        self.leases[self.label(group)] += 1

    def decided(self, group: str, clamp: Clamp, seconds: float) -> None:
        """Counts a decision, whether or not the engine has to hear of it."""
        self.latency.add(seconds)
        if clamp is not Clamp.NONE:
            self.clamps[self.label(group), clamp.value] += 1

    def refused(self, method: str, code: str, reason: str) -> bool:
        """Counts a call that ended with an error; returns whether it is worth a line in the log.

        Nobody can fill the log by being refused.
        """
        self.errors[method, code] += 1
        self.refusals[reason] += 1
        return self._log_bucket.take(time.monotonic())

    def policy_failed(self, group: str) -> None:
        """Counts a policy taken out of use for one engine."""
        self.policy_failures[self.label(group)] += 1

    def label(self, group: str) -> str:
        """The group, or `other` once there are too many: engines choose these names themselves."""
        if group in self._groups:
            return group
        if len(self._groups) >= MOST_GROUPS:
            return "other"
        self._groups.add(group)
        return group
