"""What an interval was worth: requests inside their targets, and what it cost to serve them so.

Reward of a decision interval, with the parts in `RewardTerms`:

    reward = (inside - slo_weight * late) / expected - preemption_weight * recomputed
             - shield_weight * shielded + (discount * potential - potential before) / expected

- inside, late: requests whose fate became known in the interval; each counts once. Late is who
  waits for its first token beyond the TTFT target, and whose mean time per token since the first
  (its TPOT) is beyond the ITL target at its end, or can no longer come back inside it.
- expected: requests of the workload's mean lengths that this engine can finish in an interval when
  it never waits for requests, so that 1 is all the engine has, whatever the engine.
- recomputed: KV tokens that preemptions threw away, over those plus the tokens computed; 0 to 1.
- shielded: share of the interval's engine steps in which the shield changed the proposal; 0 to 1.
- potential: what the running requests promise: the share of its output each has, counted as 1 where
  it is inside its targets so far and as -slo_weight where not. A request's worth thus comes as its
  tokens do, not only at its end, and by the potential's form (Ng, Harada, Russell 1999) the best
  policy stays the best.

Counting fates, not tokens, keeps the reward aligned with the share of requests inside their targets
where there are more requests than the engine can serve: tokens of a late request are worth nothing,
and a request that waits is counted as late once, not in each interval that it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.limits import EngineFacts
from batchpilot.env.engine import EngineStep
from batchpilot.env.profiles import StepTimeModel
from batchpilot.env.workloads import WorkloadRequest


class RewardTerms(NamedTuple):
    """The parts of a reward, as they enter it.

    Attributes:
        goodput: Requests inside their targets over those expected; mostly 0 to 1.
        slo_penalty: Weight times late requests over those expected.
        preemption_penalty: Weight times the share of work thrown away.
        shield_penalty: Weight times the share of engine steps that the shield changed.
        shaping: What running requests promise now beyond what they promised before.
    """

    goodput: float
    slo_penalty: float
    preemption_penalty: float
    shield_penalty: float
    shaping: float

    @property
    def total(self) -> float:
        """The reward."""
        penalties = self.slo_penalty + self.preemption_penalty + self.shield_penalty
        return self.goodput - penalties + self.shaping


class IntervalService(NamedTuple):
    """How requests were served in an interval.

    Attributes:
        tokens: Output tokens.
        good_tokens: Those inside their targets.
        judged: Requests that gave a token, or were late with their first.
        late: Those of them outside their targets.
        completed: Requests that gave their last token.
        inside: Requests that ended inside their targets.
        missed: Requests that became late for good; each is counted once.
        on_track: Shares of their outputs that running requests have, where they are inside their
            targets so far.
        off_track: The same of those that are not, and could still come back inside.
    """

    tokens: int = 0
    good_tokens: int = 0
    judged: int = 0
    late: int = 0
    completed: int = 0
    inside: int = 0
    missed: int = 0
    on_track: float = 0.0
    off_track: float = 0.0

    @property
    def cost(self) -> float:
        """Share of the judged requests that are outside their targets, 0 to 1."""
        return self.late / self.judged if self.judged else 0.0


@dataclass(slots=True)
class _Served:
    """A request being served; times on the engine's clock, in seconds."""

    arrival: float
    output_tokens: int
    tokens: int = 0
    first: float = 0.0
    on_time: bool = True
    missed: bool = False


class ServiceLedger:
    """Follows every request of an episode, and sums up interval by interval.

    Args:
        targets: The latency targets.
    """

    def __init__(self, targets: LatencyTargets) -> None:
        """Starts with no request."""
        self._ttft = targets.ttft_slo_seconds
        self._itl = targets.itl_slo_seconds
        self._served: dict[str, _Served] = {}
        # Without a token yet, oldest first.
        self._before_first: dict[str, _Served] = {}
        self.arrived = self.finished = self.inside = self.missed = 0
        self._clear()

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._served)

    @property
    def slo_attainment(self) -> float | None:
        """Share inside their targets of the requests whose fate is known; None before the first.

        A request that waits beyond its TTFT target is late before it has ended.
        """
        known = self.inside + self.missed
        return self.inside / known if known else None

    def submitted(self, request_id: str, arrival_seconds: float, output_tokens: int) -> None:
        """A request arrived; its time on the engine's clock."""
        served = _Served(arrival_seconds, output_tokens)
        self._served[request_id] = self._before_first[request_id] = served
        self.arrived += 1

    def stepped(self, step: EngineStep) -> None:
        """Takes in what a step brought."""
        # Once for each token: what the loop reads is at hand, and nothing is called.
        now, itl, all_served, judged = step.clock_seconds, self._itl, self._served, self._judged
        new_tokens = good_tokens = 0
        for request_id, count in step.new_tokens.items():
            served = all_served[request_id]
            if served.tokens == 0:
                self._first_token(request_id, served, now)
            served.tokens = tokens = served.tokens + count
            new_tokens += count
            in_pace = itl is None or tokens < 2 or now - served.first <= itl * (tokens - 1)
            judged[request_id] = good = served.on_time and in_pace
            if good:
                good_tokens += count
        self._tokens += new_tokens
        self._good_tokens += good_tokens
        for request_id in step.finished:
            self._finish(request_id)

    def close_interval(self, now: float) -> IntervalService:
        """Ends the interval at `now` on the engine's clock, and starts the next."""
        late = sum(not good for good in self._judged.values())
        overdue = self._overdue(now)
        on_track, off_track = self._promises(now)
        service = IntervalService(
            tokens=self._tokens,
            good_tokens=self._good_tokens,
            judged=len(self._judged) + overdue,
            late=late + overdue,
            completed=self._completed,
            inside=self._inside,
            missed=self._missed,
            on_track=on_track,
            off_track=off_track,
        )
        self._clear()
        return service

    def _clear(self) -> None:
        self._tokens = self._good_tokens = self._completed = 0
        self._inside = self._missed = 0
        self._judged: dict[str, bool] = {}

    def _first_token(self, request_id: str, served: _Served, now: float) -> None:
        served.first = now
        served.on_time = self._ttft is None or now - served.arrival <= self._ttft
        if not served.on_time:
            self._miss(served)
        del self._before_first[request_id]

    def _finish(self, request_id: str) -> None:
        served = self._served.pop(request_id)
        self._before_first.pop(request_id, None)
        self.finished += 1
        self._completed += 1
        if served.tokens == served.output_tokens and self._judged.get(request_id, False):
            self.inside += 1
            self._inside += 1
        else:
            self._miss(served)

    def _miss(self, served: _Served) -> None:
        """Its fate is known: late. Only the first time counts."""
        if not served.missed:
            served.missed = True
            self.missed += 1
            self._missed += 1

    def _promises(self, now: float) -> tuple[float, float]:
        """Shares of outputs that running requests have, inside their targets so far or not."""
        on_track = off_track = 0.0
        for served in self._served.values():
            if served.missed or not served.tokens:
                continue
            share = served.tokens / served.output_tokens
            if self._is_lost(served, now):
                self._miss(served)
            elif self._in_pace(served, now):
                on_track += share
            else:
                off_track += share
        return on_track, off_track

    def _in_pace(self, served: _Served, now: float) -> bool:
        """Whether its tokens so far came inside the inter-token target."""
        if self._itl is None or served.tokens < 2:
            return True
        return now - served.first <= self._itl * (served.tokens - 1)

    def _is_lost(self, served: _Served, now: float) -> bool:
        """Whether even all its remaining tokens at once would come too late."""
        if self._itl is None or served.output_tokens < 2:
            return False
        return now - served.first > self._itl * (served.output_tokens - 1)

    def _overdue(self, now: float) -> int:
        """Requests without a token that are past their TTFT target, whose fate is known by that."""
        if self._ttft is None:
            return 0
        count = 0
        for served in self._before_first.values():
            if now - served.arrival <= self._ttft:
                break  # the others arrived later
            self._miss(served)
            count += 1
        return count


class MeanLengths(NamedTuple):
    """Mean lengths of a workload's requests, in tokens."""

    prompt_tokens: float
    output_tokens: float

    @classmethod
    def of(cls, requests: Sequence[WorkloadRequest]) -> MeanLengths:
        """The means of at least one request."""
        return cls(
            sum(request.prompt_tokens for request in requests) / len(requests),
            sum(request.output_tokens for request in requests) / len(requests),
        )


def profile_capacity(step_time: StepTimeModel, engine: EngineFacts, mean: MeanLengths) -> float:
    """Output tokens per second of a steady state at its best number of sequences.

    N sequences decode, each with half its output behind it; as fast as they end, others prefill,
    so that a step also computes N * prompt / output prompt tokens. N is as large as start-up limits
    and KV cache allow, or smaller where that is faster.

    Args:
        step_time: Of the GPU profile.
        engine: The limits and the KV cache.
        mean: Of the workload.
    """
    held_tokens = mean.prompt_tokens + mean.output_tokens / 2
    tokens_per_seq = 1 + mean.prompt_tokens / mean.output_tokens
    most = min(
        engine.startup_limits.max_num_seqs,
        engine.kv_capacity_tokens / held_tokens,
        engine.startup_limits.max_num_batched_tokens / tokens_per_seq,
    )
    best = 0.0
    seqs = max(1, int(most))
    while seqs >= 1:
        prefill_tokens = round(seqs * (tokens_per_seq - 1))
        seconds = step_time.seconds(seqs, prefill_tokens, round(seqs * held_tokens))
        best = max(best, seqs / seconds)
        seqs = seqs * 9 // 10
    return best
