"""Latency rules: Algorithm 2, a noisy binary search on the batch size, as published and guarded.

Source: Pang, Li, Wang, "Optimizing LLM Inference Throughput via Memory-aware and SLA-constrained
Dynamic Batching", arXiv:2503.05248, Algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    Decision,
    EngineSnapshot,
    Source,
    StepRecord,
)
from batchpilot.agents.parameters import ConfigError, Parameters, parameter

ABOVE, BELOW = "above the latency target", "below the latency target"
AT = "at the latency target"
NOT_BINDING = "latency met, the limit does not bind"


@dataclass(frozen=True)
class SlaParameters(Parameters):
    """Parameters of `sla` and `sla-guarded`."""

    itl_slo_ms: float = parameter(above=0, help="D_SLA, the inter-token latency target")
    alpha: int = parameter(16, minimum=2, help="least width of the interval, in sequences")
    delta: int = parameter(4, minimum=1, help="corrective step of the other end, in sequences")
    tolerance: float = parameter(
        0.1, above=0, below=1, help="eps_D as a share of the target: within it the target is met"
    )
    window_steps: int = parameter(20, minimum=1, help="decode steps averaged for one move")
    min_num_seqs: int = parameter(1, minimum=1, help="B_min, the interval's lower end")

    def __post_init__(self) -> None:
        """Checks the values against each other too."""
        super().__post_init__()
        if self.delta >= self.alpha:
            raise ConfigError(f"delta={self.delta} must be less than alpha={self.alpha}")


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the search believes the best batch size lies: low <= b <= high."""

    low: int
    high: int

    @property
    def middle(self) -> int:
        """The limit it stands for."""
        return (self.low + self.high) // 2


@dataclass(frozen=True, slots=True)
class SearchRange:
    """What does not change during a search: B_min, B_max and the two widths."""

    min_num_seqs: int
    max_num_seqs: int
    alpha: int
    delta: int

    def slower(self, interval: Interval, batch: int) -> Interval:
        """The target is missed: the batch that missed it becomes the upper end.

        b_high <- max(b, b_low + alpha), b_low <- max(b_low - delta, B_min)
        """
        return self._wide(
            max(interval.low - self.delta, self.min_num_seqs),
            max(batch, interval.low + self.alpha),
        )

    def faster(self, interval: Interval, batch: int) -> Interval:
        """There is slack: the batch that had it becomes the lower end.

        b_low <- min(b, b_high - alpha), b_high <- min(b_high + delta, B_max)
        """
        return self._wide(
            min(batch, interval.high - self.alpha),
            min(interval.high + self.delta, self.max_num_seqs),
        )

    def on_target(self, interval: Interval, batch: int) -> Interval:
        """The target is met: close in on the batch that met it.

        b_high <- min(b + floor(alpha/2), B_max), b_low <- max(b - floor(alpha/2), B_min)
        """
        del interval
        half = self.alpha // 2
        return self._wide(
            max(batch - half, self.min_num_seqs), min(batch + half, self.max_num_seqs)
        )

    def _wide(self, low: int, high: int) -> Interval:
        """Keeps the interval inside [B_min, B_max] and, where that has room, `alpha` wide."""
        width = min(self.alpha, self.max_num_seqs - self.min_num_seqs)
        low = min(max(low, self.min_num_seqs), self.max_num_seqs - width)
        return Interval(low, min(max(high, low + width), self.max_num_seqs))


class SlaPolicy:
    """Algorithm 2 as published: a noisy binary search on b for the latency target.

    Formula, over each window of decode steps with mean time tau and mean batch b, from the values
    before the update (`SearchRange` has each line):

        tau > D_SLA + eps_D:  b_high <- max(b, b_low + alpha),  b_low  <- max(b_low - delta, B_min)
        tau < D_SLA - eps_D:  b_low  <- min(b, b_high - alpha), b_high <- min(b_high + delta, B_max)
        else:                 b_high <- min(b + alpha/2, B_max), b_low <- max(b - alpha/2, B_min)

    and the limit is min(max(floor((b_low + b_high) / 2), N_decode), B_max).

    Regimes: from [B_min, B_max] it halves towards the target, then hovers within alpha of it.

    Limitations: it must miss the target to learn where it is. It drifts where the limit is not what
    binds: at light load b is small, the interval closes in on it, and a burst finds the door half
    shut; `sla-guarded` mends that. Prefills in a step lengthen it whatever the batch: the token
    budget, which this rule does not move, is the cure.
    """

    def __init__(self, params: SlaParameters) -> None:
        """Starts with no interval: it needs the engine's B_max."""
        self._params = params
        self._target_seconds = params.itl_slo_ms / 1000
        self._range: SearchRange | None = None
        self._interval = Interval(0, 0)
        self._decision: Decision | None = None
        self._reason = "first window"
        self._start_window()

    @property
    def interval(self) -> Interval:
        """Where the search is; (0, 0) before the first decision."""
        return self._interval

    def observe(self, step: StepRecord) -> None:
        """Averages decode steps; moves the interval when a window is full."""
        if self._range is None or not self._counts(step):
            return
        self._steps += 1
        self._seconds += step.seconds
        self._decodes += step.decode_seqs
        self._bound_steps += self._binds(step)
        if self._steps == self._params.window_steps:
            self._move(self._range)
            self._start_window()

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The middle of the interval, never below the decoding sequences nor above B_max."""
        if self._range is None:
            self._begin(snapshot.engine.startup_limits)
        startup = snapshot.engine.startup_limits
        found = self._found()
        limit = min(max(found, snapshot.decode_seqs), startup.max_num_seqs)
        wanted = found if found < limit else None
        held = self._decision
        if (
            held is None
            or held.limits.max_num_seqs != limit
            or held.reason != self._reason
            or held.wanted_seqs != wanted
        ):
            limits = BatchLimits(limit, startup.max_num_batched_tokens)
            self._decision = held = Decision(limits, Source.SLA, self._reason, wanted_seqs=wanted)
        return held

    def _begin(self, startup: BatchLimits) -> None:
        params, most = self._params, startup.max_num_seqs
        least = min(params.min_num_seqs, most)
        self._range = SearchRange(least, most, params.alpha, params.delta)
        self._interval = Interval(least, most)

    def _start_window(self) -> None:
        self._steps = self._decodes = self._bound_steps = 0
        self._seconds = 0.0

    def _counts(self, step: StepRecord) -> bool:
        """Whether a step says anything of decode latency."""
        return step.regular and step.decode_seqs > 0

    def _move(self, search: SearchRange) -> None:
        tau = self._seconds / self._steps
        batch = round(self._decodes / self._steps)
        tolerance = self._params.tolerance * self._target_seconds
        if tau > self._target_seconds + tolerance:
            self._interval = search.slower(self._interval, batch)
            self._reason = ABOVE
        elif not self._may_rise():
            self._reason = NOT_BINDING
        elif tau < self._target_seconds - tolerance:
            self._interval = search.faster(self._interval, batch)
            self._reason = BELOW
        else:
            self._interval = search.on_target(self._interval, batch)
            self._reason = AT

    def _binds(self, step: StepRecord) -> bool:
        """Whether this rule's limit kept a request out, and not a lower one of somebody else."""
        return step.binding is Binding.MAX_NUM_SEQS and step.running >= self._found()

    def _may_rise(self) -> bool:
        """Whether a window that met the target may move the interval; as published, always."""
        return True

    def _found(self) -> int:
        """The limit that the interval stands for."""
        return self._interval.middle


class SlaGuardedPolicy(SlaPolicy):
    """Algorithm 2, guarded: it learns from a met target only while its own limit binds.

    Formula: `sla`'s. A window that meets the target moves the interval only if the sequence limit
    kept a request out in at least half of its steps. A window that misses the target always does:
    the batch was too large, whatever let it grow. Once the interval cannot rise any further and
    there still is slack, the limit is B_max and not the middle, which leaves `alpha` / 2 places of
    any engine empty for ever.

    Regimes: at light load it stands still, so that a burst finds the door where the last burst left
    it; under load it is `sla`.

    Limitations: it still has to miss the target to learn where it is, and steps lengthened by
    prefills shrink the batch although the batch is not at fault.
    """

    def __init__(self, params: SlaParameters) -> None:
        """Starts as `sla` does."""
        super().__init__(params)
        self._is_open = False

    def _move(self, search: SearchRange) -> None:
        super()._move(search)
        if self._reason is BELOW:
            self._is_open = self._interval == search.faster(self._interval, search.max_num_seqs)
        elif self._reason is not NOT_BINDING:
            self._is_open = False

    def _may_rise(self) -> bool:
        return 2 * self._bound_steps >= self._steps

    def _found(self) -> int:
        return self._interval.high if self._is_open else super()._found()
