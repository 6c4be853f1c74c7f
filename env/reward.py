"""What an interval was worth: goodput, broken targets, work thrown away by preemption.

Reward of a decision interval, with the parts in `RewardTerms`:

    reward = goodput_per_s / capacity_per_s - slo_weight * cost - preemption_weight * recomputed

- goodput: output tokens whose request was inside its targets when they came: its first token no
  later than the TTFT target after its arrival, and the mean time per token since then (its TPOT so
  far) within the ITL target. All tokens without targets.
- capacity: output tokens per second that this engine can give on this workload's mean lengths when
  it never waits for requests, so that 1 is all the engine has, whatever the engine.
- cost: share of the requests that gave a token, or were late with their first, in the interval,
  whose newest token was outside the targets; 0 to 1. The cost signal of constrained learning.
- recomputed: KV tokens that preemptions threw away, over those plus the tokens computed; 0 to 1.
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
        goodput: Goodput per second over the engine's capacity; mostly 0 to 1.
        slo_penalty: Weight times the share of late requests.
        preemption_penalty: Weight times the share of work thrown away.
    """

    goodput: float
    slo_penalty: float
    preemption_penalty: float

    @property
    def total(self) -> float:
        """The reward."""
        return self.goodput - self.slo_penalty - self.preemption_penalty


class IntervalService(NamedTuple):
    """How requests were served in an interval.

    Attributes:
        tokens: Output tokens.
        good_tokens: Those inside their targets.
        judged: Requests that gave a token, or were late with their first.
        late: Those of them outside their targets.
        completed: Requests that gave their last token.
        completed_inside: Those of them inside their targets.
    """

    tokens: int = 0
    good_tokens: int = 0
    judged: int = 0
    late: int = 0
    completed: int = 0
    completed_inside: int = 0

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
        self.arrived = self.finished = self.inside = 0
        self._clear()

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._served)

    @property
    def slo_attainment(self) -> float | None:
        """Share of the requests finished so far that were inside their targets; None before."""
        return self.inside / self.finished if self.finished else None

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
        service = IntervalService(
            tokens=self._tokens,
            good_tokens=self._good_tokens,
            judged=len(self._judged) + overdue,
            late=late + overdue,
            completed=self._completed,
            completed_inside=self._completed_inside,
        )
        self._clear()
        return service

    def _clear(self) -> None:
        self._tokens = self._good_tokens = self._completed = self._completed_inside = 0
        self._judged: dict[str, bool] = {}

    def _first_token(self, request_id: str, served: _Served, now: float) -> None:
        served.first = now
        served.on_time = self._ttft is None or now - served.arrival <= self._ttft
        del self._before_first[request_id]

    def _finish(self, request_id: str) -> None:
        served = self._served.pop(request_id)
        self._before_first.pop(request_id, None)
        self.finished += 1
        self._completed += 1
        if served.tokens == served.output_tokens and self._judged.get(request_id, False):
            self.inside += 1
            self._completed_inside += 1

    def _overdue(self, now: float) -> int:
        """Requests without a token that are past their TTFT target."""
        if self._ttft is None:
            return 0
        count = 0
        for served in self._before_first.values():
            if now - served.arrival <= self._ttft:
                break  # the others arrived later
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
