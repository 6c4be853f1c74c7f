"""`aimd` and `gradient2`: concurrency limits of network services, on the sequences of a batch.

Source: Netflix's concurrency-limits library, `AIMDLimit` and `Gradient2Limit`. There a sample is
the round trip of a request; here it is the mean step time over a window of decode steps, which is
what a token of a running request waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.parameters import Parameters, parameter


@dataclass(frozen=True)
class ConcurrencyParameters(Parameters):
    """What both limits share."""

    window_steps: int = parameter(20, minimum=1, help="decode steps averaged for one sample")
    initial_num_seqs: int = parameter(20, minimum=1, help="the first limit")
    min_num_seqs: int = parameter(20, minimum=1, help="the least limit")


@dataclass(frozen=True)
class AimdParameters(ConcurrencyParameters):
    """Parameters of `aimd`."""

    itl_slo_ms: float | None = parameter(
        None, above=0, help="a longer step counts as a drop; without it only preemptions do"
    )
    backoff_ratio: float = parameter(0.9, minimum=0.5, below=1, help="factor after a drop")


@dataclass(frozen=True)
class Gradient2Parameters(ConcurrencyParameters):
    """Parameters of `gradient2`."""

    queue_size: int = parameter(4, minimum=0, help="sequences the limit may grow by")
    smoothing: float = parameter(0.2, above=0, maximum=1, help="weight of a new limit")
    tolerance: float = parameter(
        1.5, minimum=1, help="how much slower than usual a step may be without backing off"
    )
    long_window: int = parameter(600, minimum=1, help="samples of the long average")


@dataclass(frozen=True, slots=True)
class LatencySample:
    """A window of decode steps.

    Attributes:
        seconds: Mean step time.
        running: Mean number of sequences in RUNNING: what is in flight.
        preempted: Whether a sequence was preempted in it.
    """

    seconds: float
    running: float
    preempted: bool


class LimitRule(Protocol):
    """How a limit follows samples."""

    def update(self, limit: float, sample: LatencySample, most: float) -> float:
        """The next limit.

        Args:
            limit: The present one.
            sample: The window that has ended under it.
            most: The greatest allowed.
        """


class AimdRule:
    """Additive increase, multiplicative decrease; `AimdPolicy` has the formula."""

    def __init__(self, params: AimdParameters) -> None:
        """Keeps the parameters."""
        self._params = params

    def update(self, limit: float, sample: LatencySample, most: float) -> float:
        """One sequence more, or a tenth less."""
        params, target = self._params, self._params.itl_slo_ms
        slow = target is not None and sample.seconds > target / 1000
        if slow or sample.preempted:
            limit = int(limit * params.backoff_ratio)
        elif 2 * sample.running >= limit:
            limit += 1
        return min(max(limit, params.min_num_seqs), most)


class Gradient2Rule:
    """The ratio of usual to present latency; `Gradient2Policy` has the formula."""

    WARM_UP_SAMPLES = 10

    def __init__(self, params: Gradient2Parameters) -> None:
        """Starts without a long average."""
        self._params = params
        self._samples = 0
        self.long_seconds = 0.0

    def update(self, limit: float, sample: LatencySample, most: float) -> float:
        """Follows the gradient where the limit is in use."""
        params = self._params
        usual = self._average(sample.seconds)
        if usual > 2 * sample.seconds:
            self.long_seconds *= 0.95
        if sample.running < limit / 2:
            return limit
        gradient = max(0.5, min(1.0, params.tolerance * usual / sample.seconds))
        wanted = limit * gradient + params.queue_size
        limit += params.smoothing * (wanted - limit)
        return min(max(limit, params.min_num_seqs), most)

    def _average(self, seconds: float) -> float:
        """The long average with this sample: plain at first, then exponential."""
        if self._samples < self.WARM_UP_SAMPLES:
            self._samples += 1
            weight = 1 / self._samples
        else:
            weight = 2 / (self._params.long_window + 1)
        self.long_seconds += weight * (seconds - self.long_seconds)
        return self.long_seconds


class _ConcurrencyPolicy:
    """Gathers windows of decode steps and lets a rule move the sequence limit."""

    def __init__(self, params: ConcurrencyParameters, rule: LimitRule) -> None:
        self._params = params
        self._rule = rule
        self._limit = 0.0
        self._most = 0
        self._decision: Decision | None = None
        self._start_window()

    def observe(self, step: StepRecord) -> None:
        """Averages decode steps; moves the limit when a window is full."""
        if step.preemptions:
            self._preempted = True
        if not self._most or not step.regular or step.decode_seqs == 0:
            return
        self._steps += 1
        self._seconds += step.seconds
        self._running += step.running
        if self._steps == self._params.window_steps:
            count = self._steps
            sample = LatencySample(self._seconds / count, self._running / count, self._preempted)
            self._limit = self._rule.update(self._limit, sample, self._most)
            self._start_window()

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The rule's limit, and the start-up token budget."""
        startup = snapshot.engine.startup_limits
        if not self._most:
            self._most = startup.max_num_seqs
            self._limit = float(min(self._params.initial_num_seqs, self._most))
        limit = int(self._limit)
        if self._decision is None or self._decision.limits.max_num_seqs != limit:
            limits = BatchLimits(limit, startup.max_num_batched_tokens)
            self._decision = Decision(limits, Source.SLA, "concurrency by latency")
        return self._decision

    def _start_window(self) -> None:
        self._steps = 0
        self._seconds = self._running = 0.0
        self._preempted = False


class AimdPolicy(_ConcurrencyPolicy):
    """Netflix's AIMD: one sequence more while all is well, a tenth less after a drop.

    Formula, after each window of decode steps with mean time tau and mean batch N:

        tau > D_SLA or a preemption:  b <- floor(backoff_ratio * b)
        else, where 2 N >= b:         b <- b + 1

    with min_num_seqs <= b <= B_max.

    Regimes: a saw-tooth around the batch at which steps reach the target.

    Limitations: it climbs by one a window, so a burst after a quiet spell waits long; it must miss
    the target to learn where it is; a slow step may be a prefill's fault and not the batch's.
    """

    def __init__(self, params: AimdParameters) -> None:
        """Starts at `initial_num_seqs`."""
        super().__init__(params, AimdRule(params))


class Gradient2Policy(_ConcurrencyPolicy):
    """Netflix's Gradient2: backs off while steps take longer than they usually do.

    Formula, after each window of decode steps with mean time tau and mean batch N, T the average
    of tau over the last `long_window` windows (exponential; plain for the first ten):

        where 2 N >= b:  g = clip(tolerance * T / tau, 0.5, 1)
                         b <- (1 - smoothing) b + smoothing (g b + queue_size)
        T > 2 tau:       T <- 0.95 T

    with min_num_seqs <= b <= B_max.

    Regimes: while steps are as long as usual b grows by smoothing * queue_size a window; where they
    become `tolerance` times longer than usual it falls. It has no target and needs none.

    Limitations: a decode batch gets slower with its size by nature, and the long average follows,
    so that it drifts to B_max where load lasts. What is usual says nothing of what was promised.
    """

    def __init__(self, params: Gradient2Parameters) -> None:
        """Starts at `initial_num_seqs`."""
        super().__init__(params, Gradient2Rule(params))
