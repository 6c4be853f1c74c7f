"""Memory rules: how many sequences fit the KV cache.

`memory` is Algorithm 1 as its authors run it, `memory-clt` its chance constraint. Both are from
Pang, Li, Wang, "Optimizing LLM Inference Throughput via Memory-aware and SLA-constrained Dynamic
Batching", arXiv:2503.05248.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from batchpilot.agents.lengths import LengthEstimate, LengthEstimator
from batchpilot.agents.limits import (
    BatchLimits,
    Decision,
    EngineSnapshot,
    Source,
    StepRecord,
)
from batchpilot.agents.parameters import Parameters, parameter


def startup_decision(snapshot: EngineSnapshot, reason: str) -> Decision:
    """The start-up limits, by a memory rule that has nothing better to say."""
    return Decision(snapshot.engine.startup_limits, Source.MEMORY, reason)


def memory_decision(
    snapshot: EngineSnapshot, max_num_seqs: int, reason: str, held: Decision | None = None
) -> Decision:
    """A memory rule's sequence limit, with N <= limit <= B_max and the start-up token budget.

    Args:
        snapshot: Before the step.
        max_num_seqs: What the rule wants; 0: nobody more, however many that is.
        reason: Why.
        held: An earlier decision; it is the result where it has these limits for this wish.
    """
    startup = snapshot.engine.startup_limits
    limit = min(max(max_num_seqs, snapshot.running, 1), startup.max_num_seqs)
    wanted = max_num_seqs if max_num_seqs < limit else None
    if held is not None and held.limits.max_num_seqs == limit and held.wanted_seqs == wanted:
        return held
    limits = BatchLimits(limit, startup.max_num_batched_tokens)
    return Decision(limits, Source.MEMORY, reason, wanted_seqs=wanted)


@dataclass(frozen=True)
class MemoryParameters(Parameters):
    """Parameters of `memory`."""

    memory_factor: float = parameter(
        0.95, above=0, maximum=1, help="share of the KV blocks to fill"
    )


class MemoryPolicy:
    """Algorithm 1 in its authors' runnable form: size by what a sequence holds now.

    Formula, whenever requests run:

        blocks_per_seq = used_blocks / N
        b = floor(total_blocks * memory_factor / blocks_per_seq),  N <= b <= B_max

    and the last b until then. Blocks held outside RUNNING are taken from both counts. No length has
    to be known or guessed. Its authors size only while requests wait, too; but who is told in
    advance, as an engine by a service, must know by then.

    Regimes: young sequences hold little, so b starts high and falls as they grow; in steady state
    it hovers where the cache is `memory_factor` full.

    Limitations: it sizes for what sequences hold now and not for what they will hold, so a burst of
    admissions is let in too readily and preempted later. Prefix-cache sharing is counted rightly,
    since blocks are counted and not tokens.
    """

    def __init__(self, params: MemoryParameters) -> None:
        """Starts without a limit of its own."""
        self._factor = params.memory_factor
        self._decision: Decision | None = None

    def observe(self, step: StepRecord) -> None:
        """Learns nothing: the snapshot says all it needs."""

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Sizes the batch by the blocks a running sequence holds on average."""
        if snapshot.running and snapshot.blocks_of_running > 0:
            reason = "blocks held per sequence now"
            self._decision = memory_decision(
                snapshot, self._limit(snapshot), reason, self._decision
            )
        if self._decision is None:
            self._decision = startup_decision(snapshot, "nothing has run yet")
        return self._decision

    def _limit(self, snapshot: EngineSnapshot) -> int:
        """The b of a snapshot with running sequences that hold blocks, before its bounds."""
        fillable = snapshot.blocks_for_running * self._factor
        return int(fillable * snapshot.running / snapshot.blocks_of_running)


def chance_constrained_limit(
    mean_tokens: float,
    variance_tokens: float,
    capacity_tokens: float,
    overflow_probability: float,
) -> float:
    """The largest b (not rounded) with P(sum of b lengths > capacity) <= overflow_probability.

    The sum is taken as Normal(b mu, b sigma^2), so with theta = PhiInv(1 - eps)

        b mu + theta sigma sqrt(b) = eta
        sqrt(b) = (-theta sigma + sqrt(theta^2 sigma^2 + 4 mu eta)) / (2 mu)

    Source: arXiv:2503.05248, section on memory-aware batching, solved as a quadratic in sqrt(b).

    Args:
        mean_tokens: mu = E[prompt + output] of a request.
        variance_tokens: sigma^2 of the same.
        capacity_tokens: eta, what the KV cache holds.
        overflow_probability: eps_M, between 0 and 1/2.
    """
    spread = NormalDist().inv_cdf(1 - overflow_probability) * math.sqrt(variance_tokens)
    root = (-spread + math.sqrt(spread**2 + 4 * mean_tokens * capacity_tokens)) / (2 * mean_tokens)
    return root**2


@dataclass(frozen=True)
class MemoryCltParameters(Parameters):
    """Parameters of `memory-clt`."""

    memory_overflow_probability: float = parameter(
        0.05, above=0, below=0.5, help="eps_M: how often b full-length sequences may overflow"
    )


class MemoryCltPolicy:
    """Algorithm 1's chance constraint: b full-length sequences overflow with probability eps_M.

    Formula: see `chance_constrained_limit`, with mu and sigma^2 of prompt plus output. Prompts are
    counted at arrival, outputs by an estimator that counts running sequences as censored. The
    paper's linear form b = floor((eta - L_0) / mu) agrees when L_0 = theta sigma sqrt(b) is taken
    at that b.

    Regimes: before a request has finished there is no length to size by, and the start-up limit
    stands; then b moves only with the length distribution.

    Limitations: it has every sequence at its full length at once, which is too strict in steady
    state, where they are spread over all ages.
    """

    def __init__(self, params: MemoryCltParameters) -> None:
        """Starts without lengths."""
        self._epsilon = params.memory_overflow_probability
        self._lengths = LengthEstimator()
        self._limit: int | None = None
        self._decision: Decision | None = None

    def observe(self, step: StepRecord) -> None:
        """Counts arrivals and completions."""
        self._lengths.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Sizes the batch by the length distribution, when it has moved."""
        if snapshot.waiting and self._lengths.is_stale:
            ages = [sequence.output_tokens for sequence in snapshot.read_running()]
            self._limit = self._size(self._lengths.estimate(ages), snapshot)
        if self._limit is not None:
            reason = "full-length sequences at overflow odds"
            self._decision = memory_decision(snapshot, self._limit, reason, self._decision)
        elif self._decision is None:
            self._decision = startup_decision(
                snapshot, "no lengths known: nothing has finished while requests waited"
            )
        return self._decision

    def _size(self, lengths: LengthEstimate | None, snapshot: EngineSnapshot) -> int | None:
        """The b of a length distribution, before its bounds; None while there is none."""
        if lengths is None:
            return None
        growth, mean = snapshot.engine.kv_growth, lengths.prompt_mean + lengths.mean
        limit = chance_constrained_limit(
            growth.of_one(mean),
            (lengths.prompt_variance + lengths.variance) * growth.per_token(mean) ** 2,
            snapshot.engine.kv_capacity_tokens,
            self._epsilon,
        )
        return int(limit)
