"""Who waits for a first token, since when, and behind how many prompt tokens."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from typing import NamedTuple

from batchpilot.agents.limits import EngineSnapshot, StepRecord
from batchpilot.agents.prefix_hits import PrefixHits

#: Requests looked at in one step; further ones are looked at once they are nearer to their turn.
LOOKED_AT = 32


class _Pending:
    """A request without its first token: when it was first seen, and prompt tokens not yet done.

    Its work is kept until it, or what is learned elsewhere and it hangs on, is another.
    """

    __slots__ = ("known_work", "known_work_of", "left", "prompt_tokens", "since")

    def __init__(self, prompt_tokens: int) -> None:
        self.since: float | None = None
        self.prompt_tokens = self.left = prompt_tokens
        self.known_work = 0.0
        self.known_work_of: object = None

    def to_compute(self, cached_share: float) -> int:
        """Tokens it is expected to compute: all that are left, once it has begun."""
        if self.left < self.prompt_tokens:
            return self.left
        return self.left - int(cached_share * self.left)

    def work(self, attention: float, cached_share: float) -> float:
        """Those tokens, and what they attend to in as many tokens as take as long."""
        left = self.to_compute(cached_share)
        begun = self.prompt_tokens - left
        return left * (1 + attention * (left + 2 * begun))


class PaceNeeded(NamedTuple):
    """How fast prompts must be computed, for first tokens to be in time.

    Attributes:
        pace: Prompt tokens a second at which everybody is who can be, with part of the target in
            reserve; 0 where nobody can.
        last_work: Of all up to the last request who can be in time only without that reserve, and
            at the fastest pace; 0 where there is none.
    """

    pace: float
    last_work: float


class PrefillQueue:
    """Follows the requests that have no token yet, in order of arrival, from counts alone.

    What an engine shows each step is how many wait and how many prefill. Served first come, first
    served, those are the newest ones that arrived; prompt tokens computed are the oldest's. The
    last tokens of a prompt may be scheduled, and the prompt done, before their step is told of.

    An engine takes requests in between two steps, and tells of them with the step that follows:
    each is taken to have come when that step began, which is late by half a step on average.

    Limitations: a prompt that has not begun is expected to be cached as far as others were. A
    priority queue is taken to be in order of arrival, which makes it expect a first token later
    than it comes. A preempted request counts as one that never had a token, if it is known at all.
    Of those who leave without one nobody says which they were: the oldest are taken to have gone.
    Where hits of the prefix cache are not told of, they are taken for tokens under way, and those
    of the next step are nobody's.

    Attributes:
        target_seconds: For the time to the first token.
        first_tokens: Requests that have had theirs.
        late_first_tokens: Those of them that had it after the target.
    """

    def __init__(self, target_seconds: float, hits: PrefixHits | None = None) -> None:
        """Starts empty.

        Args:
            target_seconds: For the time to the first token.
            hits: Of the prefix cache; its owner shows it the steps. None: nothing is ever cached.
        """
        self.target_seconds = target_seconds
        self._hits = hits or PrefixHits()
        self._pending: deque[_Pending] = deque()
        self._step_seconds = 0.0
        self._prompts_done: int | None = None
        self._uncounted = 0.0
        self._learned = (0.0, 0.0)
        self._begun_tokens = self._untouched_tokens = self._in_flight = 0
        self.first_tokens = self.late_first_tokens = 0

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens still to compute."""
        untouched = self._untouched_tokens
        return self._begun_tokens + untouched - int(self._hits.share * untouched)

    def observe(self, step: StepRecord) -> None:
        """Takes in arrivals, and gives the oldest what was computed or found in the cache."""
        self._step_seconds = step.seconds
        for prompt_tokens in step.arrived:
            self._pending.append(_Pending(prompt_tokens))
            self._untouched_tokens += prompt_tokens
        done = max(0, step.prefill_tokens + step.cached_tokens - self._in_flight)
        self._in_flight = 0
        if not done:
            return
        for request in self._pending:
            self._forget(request)
            taken = min(done, request.left)
            request.left -= taken
            request.known_work_of = None
            self._begun_tokens += request.left
            done -= taken
            if not done:
                break

    def _forget(self, request: _Pending) -> None:
        """Takes what is left of a request out of the sums."""
        if request.left < request.prompt_tokens:
            self._begun_tokens -= request.left
        else:
            self._untouched_tokens -= request.left

    def update(self, snapshot: EngineSnapshot) -> None:
        """Forgets those that have had their first token or went, and stamps those that are new."""
        pending, now = self._pending, snapshot.clock_seconds
        earliest = now - self._step_seconds
        self._count_done(snapshot.prompts_done)
        for _ in range(len(pending) - snapshot.waiting - snapshot.prefill_seqs):
            request = pending.popleft()
            self._forget(request)
            if not self._uncounted:
                continue
            self._uncounted -= 1
            self._in_flight += request.left
            self.first_tokens += 1
            if request.since is not None and now - request.since > self.target_seconds:
                self.late_first_tokens += 1
        for request in reversed(pending):
            if request.since is not None:
                break
            request.since = earliest

    def _count_done(self, prompts_done: int | None) -> None:
        """First tokens may be counted up to the prompts done; any number where nobody knows those.

        An arrival is told of once its step is back, but waits at once: until then a prompt that is
        done hides behind it.
        """
        if prompts_done is None:
            self._uncounted = math.inf
        elif self._prompts_done is not None:
            self._uncounted += prompts_done - self._prompts_done
        self._prompts_done = prompts_done

    def whole_prompts(self, most: int) -> int:
        """Tokens of the oldest prompts, as many as fit whole into `most`; `most` if none does."""
        whole, share = 0, self._hits.share
        for request in islice(self._pending, LOOKED_AT):
            tokens = request.to_compute(share)
            if whole + tokens > most:
                break
            whole += tokens
        return whole or most

    def backlog_work(self, attention: float) -> float:
        """Work of all who wait, in tokens; further ones are taken to be like the first.

        Args:
            attention: As in `pace_needed`.
        """
        work, tokens, share = 0.0, 0, self._hits.share
        for request in islice(self._pending, LOOKED_AT):
            work += request.work(attention, share)
            tokens += request.to_compute(share)
        return work * self.backlog_tokens / tokens if tokens else 0.0

    def oldest_wait(self, now: float) -> float:
        """How long the oldest has waited for a first token, as a share of the target."""
        since = self._pending[0].since if self._pending else None
        return 0.0 if since is None else (now - since) / self.target_seconds

    def pace_needed(
        self, now: float, *, share: float, at_most: float, attention: float = 0.0
    ) -> PaceNeeded:
        """The pace that brings everybody a first token in time who can have one.

        Tokens here are work: late ones of a long prompt, which attend to more, count for more.

        Args:
            now: The engine's clock.
            share: Of the target, that is planned with; the rest is in reserve.
            at_most: The fastest pace; who would need more is given up.
            attention: Tokens that take as long as one of the squares of `PromptsAhead`.
        """
        planned, reserve = share * self.target_seconds, (1 - share) * self.target_seconds
        cached_share = self._hits.share
        ahead = needed = last_work = 0.0
        learned = self._learned
        if learned != (attention, cached_share):
            self._learned = learned = (attention, cached_share)
        for request in islice(self._pending, LOOKED_AT):
            if request.known_work_of is not learned:
                request.known_work_of = learned
                request.known_work = request.work(attention, cached_share)
            ahead += request.known_work
            since = request.since
            left = planned if since is None else planned - (now - since)
            if needed * left < ahead:
                if ahead < at_most * left:
                    needed = ahead / left
                elif ahead < at_most * (left + reserve):
                    last_work = ahead
        return PaceNeeded(needed, last_work)
