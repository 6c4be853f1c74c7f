"""Limits on lease: what a tuning service says, checked, and in force only for its time.

No I/O and no clock: whoever talks to the service brings both. The engine's thread reads one
attribute, `LeaseHolder.current`, which is replaced as a whole and never changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from batchpilot.agents.limits import BatchLimits, Decision, Source

#: Of the service's words, so many characters are kept.
LONGEST_REASON = 160
#: Reports whose answers are still awaited; a session with more is as good as dead.
_MOST_UNANSWERED = 1024


class Refusal(StrEnum):
    """Why an answer was not taken."""

    NO_LIMITS = "no_limits"
    OUT_OF_RANGE = "out_of_range"
    NO_LEASE = "no_lease"
    UNKNOWN_REPORT = "unknown_report"
    STALE = "stale"
    LATE = "late"


class LeaseOffer(NamedTuple):
    """What an answer said, before anything of it is believed.

    Attributes:
        sequence: The report it says it answers.
        limits: What to apply; None where it named none.
        lease_seconds: For how long, from the moment that report was sent.
        reason: Who decided, and why.
    """

    sequence: int
    limits: BatchLimits | None
    lease_seconds: float
    reason: str = ""


class Lease(NamedTuple):
    """Limits that may be applied, until a time.

    Attributes:
        decision: What to apply; the same object for the whole lease.
        sent_at: When the report it answers was sent, on the engine's monotonic clock.
        expires_at: When it is over, on the same clock.
    """

    decision: Decision
    sent_at: float
    expires_at: float


@dataclass(slots=True)
class LeaseHolder:
    """The newest lease of an engine.

    Attributes:
        startup_limits: The limits the engine was started with: none above them can be meant.
        longest_seconds: No lease runs longer, whatever the service says.
        current: The newest lease, over or not; None before the first.
    """

    startup_limits: BatchLimits
    longest_seconds: float
    current: Lease | None = None

    def open_session(self) -> LeaseSession:
        """Starts counting reports from 1. What is in force stays so until it is over."""
        return LeaseSession(self)


class LeaseSession:
    """Matches the answers of one stream with the reports they answer.

    One thread sends and one receives; they may be two.

    Args:
        holder: Gets every lease that is accepted.
    """

    def __init__(self, holder: LeaseHolder) -> None:
        """Starts with nothing sent."""
        self._holder = holder
        self._sent_at: dict[int, float] = {}
        self._last_sent = 0
        self._newest_answered = 0
        self._owed: dict[int, float] = {}
        self._lease_seconds = 0.0

    def sending(self, now: float) -> int:
        """Notes that a report goes out now; returns its number."""
        self._last_sent += 1
        self._sent_at[self._last_sent] = now
        if not self._may_go_unanswered(now):
            self._owed[self._last_sent] = now
        if len(self._sent_at) > _MOST_UNANSWERED:
            oldest = next(iter(self._sent_at))
            self._sent_at.pop(oldest)
            self._owed.pop(oldest, None)
        return self._last_sent

    def unanswered_since(self) -> float | None:
        """When the oldest report was sent that an answer is still owed to; None without any."""
        return next(iter(list(self._owed.values())), None)

    def _may_go_unanswered(self, now: float) -> bool:
        """Whether a lease of this stream runs for half its time or longer: see `Tune`."""
        lease = self._holder.current
        return (
            self._lease_seconds > 0.0
            and lease is not None
            and lease.expires_at - now >= self._lease_seconds / 2
        )

    def accept(self, offer: LeaseOffer, now: float) -> Refusal | None:
        """Puts an answer in force, or says why not.

        A refused answer leaves the lease in force as it is: it ends by itself.
        """
        refusal, sent_at = self._match(offer.sequence)
        if refusal is not None:
            return refusal
        refusal = self._check(offer)
        if refusal is not None:
            return refusal
        assert offer.limits is not None
        expires_at = sent_at + min(offer.lease_seconds, self._holder.longest_seconds)
        if expires_at <= now:
            return Refusal.LATE
        self._lease_seconds = offer.lease_seconds
        decision = Decision(offer.limits, Source.REMOTE, printable(offer.reason))
        self._holder.current = Lease(decision, sent_at, expires_at)
        return None

    def _match(self, sequence: int) -> tuple[Refusal | None, float]:
        """When the report was sent that an answer names; older ones expect no answer any more."""
        if not 1 <= sequence <= self._last_sent:
            return Refusal.UNKNOWN_REPORT, 0.0
        if sequence <= self._newest_answered:
            return Refusal.STALE, 0.0
        sent_at = self._sent_at.get(sequence)
        self._newest_answered = sequence
        for number in [n for n in list(self._sent_at) if n <= sequence]:
            self._sent_at.pop(number, None)
            self._owed.pop(number, None)
        return (Refusal.STALE, 0.0) if sent_at is None else (None, sent_at)

    def _check(self, offer: LeaseOffer) -> Refusal | None:
        limits, most = offer.limits, self._holder.startup_limits
        if limits is None:
            return Refusal.NO_LIMITS
        if not (
            1 <= limits.max_num_seqs <= most.max_num_seqs
            and 1 <= limits.max_num_batched_tokens <= most.max_num_batched_tokens
        ):
            return Refusal.OUT_OF_RANGE
        return None if offer.lease_seconds > 0 else Refusal.NO_LEASE


def printable(text: str) -> str:
    """A stranger's words, fit for one line of a log."""
    kept = text[:LONGEST_REASON]
    return kept if kept.isprintable() else "".join(c if c.isprintable() else "?" for c in kept)
