"""`predictive`: both limits computed from a step time and lengths that are learned online."""

from __future__ import annotations

from dataclasses import dataclass

from batchpilot.agents.combined import MemorySlaParameters, MemorySlaPolicy
from batchpilot.agents.late_gaps import LateGapBudget
from batchpilot.agents.lengths import LengthEstimator
from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.memory_peak import MemoryPeakParameters, MemoryPeakPolicy
from batchpilot.agents.pace import MeanPace
from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.agents.prefill_queue import PrefillQueue
from batchpilot.agents.step_time import StepTimeEstimator

#: The target is aimed at from below by so many standard deviations of the step time's noise.
NOISE_MARGIN = 2.0
#: The model decides once its stated error where it would work is below the first, and gives way
#: once the error or the noise of its innovations is above the second.
TRUSTED_ERROR = 0.1
DOUBTED_ERROR = 0.2
#: A step that may be late takes at most so many times what others aim at: longer ones compute
#: hardly more tokens a second, and a short answer would feel them.
LATE_STEP = 2.0
#: Share of the time to the first token that is planned with.
TTFT_AIM = 0.9
#: Steps between two looks at whether the model can be trusted, and at the latency's batch size.
CHECK_STEPS = 16


@dataclass(frozen=True)
class PredictiveParameters(Parameters):
    """Parameters of `predictive`."""

    itl_slo_ms: float | None = parameter(
        None, above=0, help="inter-token latency target; none: throughput alone counts"
    )
    ttft_slo_ms: float | None = parameter(None, above=0, help="time-to-first-token target")
    memory_overflow_probability: float = parameter(
        0.2, above=0, below=0.5, help="eps_M: how often the peak to come may overflow"
    )
    min_prefill_chunk: int = parameter(
        64, minimum=1, help="prompt tokens a step always has room for beside its decodes"
    )


class PredictivePolicy:
    """Computes both limits from the learned step time t(D, P, K) and the learned lengths.

    Formula, with target tau, noise sigma of the step time, c = tau / (1 + 2 sigma), D decodes about
    to run and K tokens in the KV cache:

        max_num_batched_tokens = D + max(chunk, largest P with t(D, P, K) <= c)
        max_num_seqs = min(b_memory, largest b with t(b, chunk, b kappa) <= c)

    b_memory is `memory-peak`'s; kappa = E[in] + E[out^2] / (2 E[out]) is the context a sequence
    holds on average over its life.

    Regimes: without a target it is `memory-peak` with the start-up token budget. With one, until
    the model's stated error at its own working point is below `TRUSTED_ERROR`, and again when its
    error or its noise passes `DOUBTED_ERROR`, `memory+sla` decides.

    Limitations: where even the least chunk beside the running decodes misses the target, the limits
    only keep more sequences out: nobody is thrown out of the batch.
    """

    def __init__(self, params: PredictiveParameters) -> None:
        """Starts without a model."""
        self._chunk = params.min_prefill_chunk
        self._target = None if params.itl_slo_ms is None else params.itl_slo_ms / 1e3
        self._lengths = LengthEstimator()
        memory = MemoryPeakParameters(
            memory_overflow_probability=params.memory_overflow_probability
        )
        self._memory = MemoryPeakPolicy(memory, self._lengths)
        self._guard = (
            None
            if params.itl_slo_ms is None
            else MemorySlaPolicy(MemorySlaParameters(itl_slo_ms=params.itl_slo_ms))
        )
        self._ttft_target = (
            None if params.ttft_slo_ms is None else TTFT_AIM * params.ttft_slo_ms / 1e3
        )
        self._late_gaps = None if self._target is None else LateGapBudget(self._target)
        self._pace = None if self._target is None else MeanPace(self._target)
        self._queue = PrefillQueue()
        self.step_time = StepTimeEstimator()
        self._trusted = False
        self._slow_start = self._chunk
        self._latency_limit = 1
        self._steps_to_check = 0
        self._decision: Decision | None = None

    def observe(self, step: StepRecord) -> None:
        """Learns the step's time and the lengths of what arrived and finished."""
        self._memory.observe(step)
        if self._guard is not None:
            self.step_time.observe(step)
            self._queue.observe(step)
        if self._late_gaps is not None:
            self._late_gaps.observe(step)
        if self._pace is not None:
            self._pace.observe(step)
            if not self._trusted and step.regular and self._target is not None:
                self._start_slowly(step, self._target)
        if self._guard is not None:
            self._guard.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Both limits of the step about to be scheduled."""
        memory = self._memory.decide(snapshot)
        if self._target is None or self._guard is None:
            return self._decided(
                memory.limits.max_num_seqs,
                memory.limits.max_num_batched_tokens,
                Source.PREDICTIVE,
                memory.reason,
            )
        guard = self._guard.decide(snapshot)
        self._steps_to_check -= 1
        if self._steps_to_check <= 0:
            self._check(snapshot, self._target)
        if not self._trusted:
            return self._cautious(snapshot, guard)
        return self._predict(snapshot, memory, self._target)

    def _cautious(self, snapshot: EngineSnapshot, guard: Decision) -> Decision:
        """The guard's sequence limit; a token budget that has kept the target so far."""
        tokens = guard.limits.max_num_batched_tokens
        if snapshot.decode_seqs:
            decode_tokens = snapshot.decode_seqs * snapshot.engine.tokens_per_decode
            tokens = min(tokens, decode_tokens + self._slow_start)
        reason = "the step time is not known well enough"
        return self._decided(guard.limits.max_num_seqs, tokens, Source.MEMORY_SLA, reason)

    def _start_slowly(self, step: StepRecord, target: float) -> None:
        """Doubles the prompt tokens of a step while they keep the target, else halves them."""
        if step.seconds > target:
            self._slow_start = max(self._chunk, self._slow_start // 2)
        elif 2 * step.prefill_tokens >= self._slow_start:
            self._slow_start *= 2

    def _aim(self, target: float) -> float:
        """The time a step may take: further below the target, the more gaps were late lately."""
        late = min(self._late_gaps.used, 1.0) if self._late_gaps is not None else 1.0
        return target / (1 + NOISE_MARGIN * late * self.step_time.noise)

    def _kv_tokens(self, snapshot: EngineSnapshot) -> int:
        return snapshot.used_blocks * snapshot.engine.block_size

    def _predict(self, snapshot: EngineSnapshot, memory: Decision, target: float) -> Decision:
        startup = snapshot.engine.startup_limits
        decodes = snapshot.decode_seqs
        seqs, reason = memory.limits.max_num_seqs, "peak of future memory"
        if self._latency_limit < seqs:
            seqs, reason = self._latency_limit, "predicted step time of a larger batch"
        if seqs < snapshot.running:
            seqs = max(1, snapshot.running)
        tokens = startup.max_num_batched_tokens
        if decodes:
            kv_tokens, aim = self._kv_tokens(snapshot), self._aim(target)
            prefill = self.step_time.largest_prefill(decodes, kv_tokens, aim)
            if prefill < self._chunk:
                prefill, reason = self._chunk, "the least chunk: the target leaves no more"
            many = self._worth_a_slow_step(snapshot, prefill, aim)
            if many:
                prefill, reason = many, "a late first token is worth a slow step"
            tokens = min(decodes * snapshot.engine.tokens_per_decode + prefill, tokens)
        return self._decided(seqs, tokens, Source.PREDICTIVE, reason)

    def _worth_a_slow_step(self, snapshot: EngineSnapshot, prefill: int, aim: float) -> int:
        """Prompt tokens of a step that is late so that a first token need not be; 0 for none."""
        queue, budget, pace = self._queue, self._late_gaps, self._pace
        if self._ttft_target is None or budget is None or pace is None:
            return 0
        queue.update(snapshot)
        decodes, slow, many = snapshot.decode_seqs, LATE_STEP * aim, 0
        if queue.backlog_tokens > prefill and (budget.allows(decodes) or pace.affords(slow)):
            many = self.step_time.largest_prefill(decodes, self._kv_tokens(snapshot), slow)
            if not queue.can_be_saved(
                snapshot.clock_seconds,
                self._ttft_target,
                tokens_per_second=prefill / aim,
                at_most=max(many, 1) / slow,
            ):
                many = 0
        budget.plan(decodes if many else 0)
        return many

    def _check(self, snapshot: EngineSnapshot, target: float) -> None:
        """Whether the model can be trusted at its working point, and how large a batch may be."""
        model = self.step_time
        if not snapshot.decode_seqs:
            return
        self._steps_to_check = CHECK_STEPS if self._trusted else 1
        kv_tokens = self._kv_tokens(snapshot)
        aim = self._aim(target)
        prefill = model.largest_prefill(snapshot.decode_seqs, kv_tokens, aim)
        prefill = min(
            max(prefill, self._chunk), snapshot.engine.startup_limits.max_num_batched_tokens
        )
        error = max(
            model.relative_error(snapshot.decode_seqs, prefill, kv_tokens),
            model.relative_error(snapshot.decode_seqs, 0, kv_tokens),
        )
        bound = DOUBTED_ERROR if self._trusted else TRUSTED_ERROR
        self._trusted = model.has_weights and error <= bound and model.noise <= bound
        if self._trusted:
            self._latency_limit = self._largest_batch(snapshot, aim)

    def _largest_batch(self, snapshot: EngineSnapshot, aim: float) -> int:
        """The largest b whose decode step, with the least chunk, is within the time."""
        context = self._kv_tokens(snapshot) / snapshot.running
        lengths = self._lengths.latest
        if lengths is not None:
            if self._pace is not None:
                self._pace.set_life(lengths.mean)
            grown = (lengths.variance + lengths.mean**2) / (2 * lengths.mean)
            context = max(context, lengths.prompt_mean + grown)
        fits, too_many = 1, snapshot.engine.startup_limits.max_num_seqs + 1
        while too_many - fits > 1:
            tried = (fits + too_many) // 2
            if self.step_time.predict(tried, self._chunk, int(tried * context)) <= aim:
                fits = tried
            else:
                too_many = tried
        return fits

    def _decided(self, seqs: int, tokens: int, source: Source, reason: str) -> Decision:
        held = self._decision
        if (
            held is None
            or held.limits.max_num_seqs != seqs
            or held.limits.max_num_batched_tokens != tokens
            or held.reason is not reason
            or held.source is not source
        ):
            held = Decision(BatchLimits(seqs, tokens), source, reason)
            self._decision = held
        return held
