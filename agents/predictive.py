"""`predictive`: both limits computed from a step time and lengths that are learned online."""

from __future__ import annotations

from dataclasses import dataclass

from batchpilot.agents.combined import MemorySlaParameters, MemorySlaPolicy
from batchpilot.agents.latency_limits import CATCHES_UP, FITS, OUT_OF_REACH, LatencyLimits
from batchpilot.agents.lengths import LengthEstimator
from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.memory_peak import MemoryPeakParameters, MemoryPeakPolicy
from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.agents.step_time import StepTimeEstimator

#: Until lengths are known: Algorithm 1's own share. A shut door surely costs a first token, or
#: throughput; an overflow may cost one request its pace.
COLD_START_MEMORY_FACTOR = 0.95
#: eps_M, without a target for the first token and with one: the same holds for a shut door later.
OVERFLOW_PROBABILITY, OVERFLOW_PROBABILITY_WITH_TTFT = 0.15, 0.45
COLD = "the step time is not known well enough"
LARGER_BATCH = "predicted step time of a larger batch"
PEAK = "peak of future memory"


@dataclass(frozen=True)
class PredictiveParameters(Parameters):
    """Parameters of `predictive`."""

    itl_slo_ms: float | None = parameter(
        None, above=0, help="inter-token latency target; none: throughput alone counts"
    )
    ttft_slo_ms: float | None = parameter(
        None, above=0, help="time-to-first-token target, beside itl_slo_ms"
    )
    memory_overflow_probability: float | None = parameter(
        None,
        above=0,
        below=0.5,
        help="eps_M: how often the peak to come may overflow, at most; 0.15 if left out, or 0.45 "
        "with ttft_slo_ms",
    )
    min_prefill_chunk: int = parameter(
        64, minimum=1, help="prompt tokens a step always has room for beside its decodes"
    )


class PredictivePolicy:
    """Computes both limits, where others search for them.

    Formula: max_num_seqs is the lesser of `memory-peak`'s and `LatencyLimits.largest_batch`;
    max_num_batched_tokens is D plus `LatencyLimits.prefill`. See there.

    Regimes: without a latency target it is `memory-peak` with the start-up token budget. With one,
    `memory+sla` decides the sequence limit until the step time can be trusted, and again when its
    innovations or its own stated error say that it cannot; `Decision.source` and the reason tell.
    Under more load than the target allows, running sequences keep their pace and others wait; with
    a target for the first token too, only while that costs little, and not while a queue makes
    everybody late that could be gone soon: see `LatencyLimits` and `CatchUp`. And with both,
    prompts are computed together in long steps where usual ones hardly keep up and pay far more for
    each: see `Bunches`.

    Limitations: where even the least chunk beside the running decodes misses the target, the limits
    only keep more sequences out: nobody is thrown out of the batch. Noise in the step time costs
    capacity, since it is aimed at from below. Without a target for the first token, one between
    tokens that the hardware keeps for one or two sequences only is kept for them, while all others
    wait: give it one that a batch can keep.
    """

    def __init__(self, params: PredictiveParameters) -> None:
        """Starts without a model."""
        lengths = LengthEstimator()
        memory = MemoryPeakParameters(memory_overflow_probability=_overflow_probability(params))
        self._memory = MemoryPeakPolicy(memory, lengths, COLD_START_MEMORY_FACTOR)
        self._latency: LatencyLimits | None = None
        if params.itl_slo_ms is not None:
            ttft_seconds = None if params.ttft_slo_ms is None else params.ttft_slo_ms / 1e3
            self._latency = LatencyLimits(
                params.itl_slo_ms / 1e3, ttft_seconds, params.min_prefill_chunk, lengths
            )
            self._guard = MemorySlaPolicy(MemorySlaParameters(itl_slo_ms=params.itl_slo_ms))
        self._decision: Decision | None = None

    @property
    def step_time(self) -> StepTimeEstimator | None:
        """The learned step time; None without a latency target."""
        return None if self._latency is None else self._latency.step_time

    @property
    def is_trusted(self) -> bool:
        """Whether the learned step time decides."""
        return self._latency is not None and self._latency.trust.is_any

    def observe(self, step: StepRecord) -> None:
        """Learns the step's time and the lengths of what arrived and finished."""
        self._memory.observe(step)
        if self._latency is not None:
            self._latency.observe(step)
            if not self._latency.trust.is_any:
                self._guard.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Both limits of the step about to be scheduled."""
        memory, latency = self._memory.decide(snapshot), self._latency
        seqs, tokens = memory.limits.max_num_seqs, memory.limits.max_num_batched_tokens
        wanted = memory.wanted_seqs
        if latency is None:
            return self._decided(seqs, tokens, memory.reason, wanted_seqs=wanted)
        latency.check(snapshot, self._memory.held_share)
        given_up = latency.given_up
        if given_up is not None:
            is_whole = given_up is CATCHES_UP
            return self._decided(seqs, tokens, given_up, is_whole=is_whole, wanted_seqs=wanted)
        if not latency.trust.is_any:
            return self._guarded(snapshot, latency.trust.kept_so_far)
        reason, is_whole = PEAK, False
        if latency.largest_batch < seqs:
            wanted = min(wanted or latency.largest_batch, latency.largest_batch)
            seqs = max(latency.largest_batch, snapshot.running)
            reason = OUT_OF_REACH if latency.is_out_of_reach else LARGER_BATCH
        decodes = snapshot.decode_seqs
        if decodes:
            prefill = latency.prefill(snapshot)
            is_whole = prefill.is_whole
            tokens = min(tokens, snapshot.decode_tokens(decodes) + prefill.tokens)
            if not prefill.admits:
                seqs = snapshot.running
            if prefill.reason is not FITS and reason is not OUT_OF_REACH:
                reason = prefill.reason
        return self._decided(seqs, tokens, reason, is_whole=is_whole, wanted_seqs=wanted)

    def _guarded(self, snapshot: EngineSnapshot, prefill: int) -> Decision:
        """The guard's sequence limit, and a token budget that has kept the target so far."""
        guarded = self._guard.decide(snapshot)
        limits, wanted = guarded.limits, guarded.wanted_seqs
        seqs = max(limits.max_num_seqs, snapshot.running, 1)
        tokens, decodes = limits.max_num_batched_tokens, snapshot.decode_seqs
        if decodes:
            tokens = min(tokens, snapshot.decode_tokens(decodes) + prefill)
        if wanted is None and limits.max_num_seqs < seqs:
            wanted = limits.max_num_seqs
        return self._decided(seqs, tokens, COLD, Source.MEMORY_SLA, wanted_seqs=wanted)

    def _decided(
        self,
        seqs: int,
        tokens: int,
        reason: str,
        source: Source = Source.PREDICTIVE,
        *,
        is_whole: bool = False,
        wanted_seqs: int | None = None,
    ) -> Decision:
        """The decision held, where it is the same."""
        held = self._decision
        if (
            held is None
            or held.limits.max_num_seqs != seqs
            or held.limits.max_num_batched_tokens != tokens
            or held.reason is not reason
            or held.source is not source
            or held.is_whole is not is_whole
            or held.wanted_seqs != wanted_seqs
        ):
            limits = BatchLimits(seqs, tokens)
            self._decision = held = Decision(
                limits, source, reason, is_whole=is_whole, wanted_seqs=wanted_seqs
            )
        return held


def _overflow_probability(params: PredictiveParameters) -> float:
    """What is asked for, else what suits the targets."""
    if params.memory_overflow_probability is not None:
        return params.memory_overflow_probability
    return OVERFLOW_PROBABILITY if params.ttft_slo_ms is None else OVERFLOW_PROBABILITY_WITH_TTFT
