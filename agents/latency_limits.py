"""Both limits that a latency target leaves, from a step time that is learned online."""

from __future__ import annotations

import math
from typing import NamedTuple

from batchpilot.agents.late_gaps import LateGapBudget
from batchpilot.agents.lengths import LengthEstimator
from batchpilot.agents.limits import EngineSnapshot, StepRecord
from batchpilot.agents.prefix_hits import PrefixHits
from batchpilot.agents.slow_steps import SlowSteps
from batchpilot.agents.step_time import PromptsAhead, StepTimeEstimator

#: The target is aimed at from below by so many standard deviations of the step time's noise, once
#: the late gaps are spent.
NOISE_MARGIN = 2.0
#: Tokens of an answer, until lengths are known.
UNKNOWN_OUTPUT = 64.0
#: The model is trusted once its stated error where it would work, and the mean of its innovations,
#: are below the first, and doubted again once one of them is above the second; and never while the
#: noise is above the third.
TRUSTED_ERROR, DOUBTED_ERROR = 0.1, 0.2
TOO_NOISY = 0.5
#: Steps between two looks at whether the model can be trusted, and at the largest batch; fewer
#: while it is not: the first blocks it learns from are as short.
CHECK_STEPS, UNTRUSTED_CHECK_STEPS = 16, 4

#: A target is given up for so many times the throughput, no less: hardly ever, then, where it is at
#: least twice the step of one sequence.
WORTH_GIVING_UP = 2.0
#: And once the oldest has waited for this share of its target: those behind it still have time.
PRESSING_WAIT = 0.5

FITS = "largest prefill within the target"
LEAST_CHUNK = "the least chunk: the target leaves no more"
WAITS = "prompts wait for a slow step, where many cost less"
SLOW = "a late first token is worth a slow step"
OUT_OF_REACH = "the target is shorter than a step of one sequence: one runs at a time"
GIVEN_UP = "the target would cost first tokens and most of the throughput: given up until none wait"
CATCHES_UP = "most who run had a late first token: the pace is given up until nobody waits too long"


class Prefill(NamedTuple):
    """What the step about to be scheduled may prefill.

    Attributes:
        tokens: Of prompts.
        reason: Why so many.
        admits: Whether requests that wait may be among them.
        is_whole: As in `Decision`: prompts wait for each other, or this is the step they wait for.
    """

    tokens: int
    reason: str
    admits: bool = True
    is_whole: bool = False


class _Load(NamedTuple):
    """What a sequence brings on average, in tokens.

    Attributes:
        context: Of the KV cache, where what sequences share counts once.
        prompt: To compute of its prompt.
        cached: Of its prompt, that need not be computed.
        output: To generate.
    """

    context: float
    prompt: float
    cached: float
    output: float

    @property
    def prompt_share(self) -> float:
        """Prompt tokens computed for each token of output."""
        return self.prompt / self.output

    @property
    def prompts(self) -> PromptsAhead:
        """Whole ones."""
        return PromptsAhead(length=self.prompt + self.cached, cached=self.cached)


class LatencyLimits:
    """What a target leaves, and whether the model behind it can be trusted.

    Formula, with target tau, noise sigma, u <= 1 the share of the permitted late gaps that is used,
    D decodes about to run and K tokens in the cache:

        prefill = max(chunk, largest P with t(D, P, K, S) <= tau / (1 + 2 u sigma))
        largest batch = largest b with t(b, min(chunk, b p / E[out]), b kappa)
            <= tau / (1 + 2 u sigma / sqrt(E[out]))

    since the batch decides on the mean gap of an answer, out of which noise averages, and prefill
    on single gaps;
    where S follows from P, from where the oldest prompt stands, and from E[in]: later chunks of a
    long prompt attend to more, and take longer;
    where p is what of the mean prompt E[in] must be computed, the rest being cached, and b p /
    E[out] is the prefill of a step in balance, each prompt spread over its output;
    and kappa = h (E[in] + E[out^2] / (2 E[out])) is the context a sequence holds on average over
    its life, h <= 1 being the KV tokens held for each token of context: sequences share prefixes.
    While prompts wait for each other, most steps have none in them, and the largest batch is
    that whose mean step, given below, is within its time. While nobody decodes, nobody waits for a
    token, and prefill is not limited.

    With a target for the first token, some steps may be slow: see `SlowSteps`; and the pace may be
    given up for a moment, so that a queue that makes everybody late goes away: see `CatchUp`. And
    with one, the target between tokens is given up where it keeps others out until they are too
    late, and costs much throughput: once the oldest has waited for `PRESSING_WAIT` of what it may,
    and all who are here together would give `WORTH_GIVING_UP` times the tokens a second that steps
    in time can. It holds again once nobody waits and no more run than it allows. In balance, b
    sequences give

        b / ((1 - m) t(b, 0, b kappa) + m t(b, P, b kappa))

    tokens a second, with P the greater of p and b p / E[out], and m = min(1, b / E[out])
    the share of steps that have a prompt in them.

    Before the model is trusted, prefill starts slowly: from the least chunk it doubles while the
    target is kept, and halves when it is not. That also shows the model what it has to know.

    Attributes:
        step_time: Learned from the steps.
        is_trusted: Whether it decides.
        given_up: Why the target between tokens is given up for now; None while it holds.
        largest_batch: As of the newest look.
        is_out_of_reach: Whether not even one sequence keeps the target.
    """

    def __init__(
        self,
        itl_slo_seconds: float,
        ttft_slo_seconds: float | None,
        min_prefill_chunk: int,
        lengths: LengthEstimator,
    ) -> None:
        """Starts without a model."""
        self._target = itl_slo_seconds
        self._chunk = self._slow_start = min_prefill_chunk
        self._lengths = lengths
        self._late_gaps = LateGapBudget(itl_slo_seconds)
        self._steps_to_check = 0
        self.step_time = StepTimeEstimator()
        self._hits = PrefixHits()
        self._held_share = 1.0
        self._slow_steps: SlowSteps | None = None
        if ttft_slo_seconds is not None:
            self._slow_steps = SlowSteps(
                itl_slo_seconds,
                ttft_slo_seconds,
                self._late_gaps,
                self.step_time,
                self._hits,
                min_prefill_chunk,
            )
        self.is_trusted = False
        self.given_up: str | None = None
        self.largest_batch = 1
        self.is_out_of_reach = False
        self._prompt_tokens = math.inf

    @property
    def slow_start_tokens(self) -> int:
        """Prompt tokens of a step that has kept the target so far, while nothing is known."""
        return self._slow_start

    def observe(self, step: StepRecord) -> None:
        """Learns the step's time, and what it spent."""
        self.step_time.observe(step)
        self._hits.observe(step)
        keeps_pace = self.given_up is None
        if keeps_pace:
            self._late_gaps.observe(step)
        if self._slow_steps is not None:
            self._slow_steps.observe(step, keeps_pace=keeps_pace)
        if not self.is_trusted and step.regular:
            self._start_slowly(step)

    def check(self, snapshot: EngineSnapshot, held_share: float = 1.0) -> None:
        """Now and then: whether the model can be trusted, and how large a batch it allows.

        Call it before each step: it also keeps up with who still waits for a first token.

        Args:
            snapshot: Before the step.
            held_share: KV tokens held for each token of context, at most 1.
        """
        self._held_share = held_share
        if self._slow_steps is not None:
            self._slow_steps.update(snapshot)
            if self.given_up is not None and self._holds_again(snapshot, self._slow_steps):
                self.given_up = None
        self._steps_to_check -= 1
        if self._steps_to_check > 0 or snapshot.decode_seqs < 1:
            return
        self.is_trusted = self._deserves_trust(snapshot)
        self._steps_to_check = CHECK_STEPS if self.is_trusted else UNTRUSTED_CHECK_STEPS
        if self.is_trusted:
            load = self._load(snapshot)
            self.largest_batch = self._largest_batch(snapshot, load)
            self.is_out_of_reach = (
                self.largest_batch == 1 and self._batch_seconds(1, load) > self._target
            )
            if snapshot.waiting and self.given_up is None and self._slow_steps is not None:
                self._consider_giving_up(snapshot, load, self._slow_steps)

    def prefill(self, snapshot: EngineSnapshot) -> Prefill:
        """Prompt tokens that the step about to be scheduled has time for, beside its decodes."""
        decodes = snapshot.decode_seqs
        kv_tokens = snapshot.used_blocks * snapshot.engine.block_size
        aim, prompts = self._aim(), self._prompts(snapshot)
        tokens, reason = self.step_time.largest_prefill(decodes, kv_tokens, aim, prompts), FITS
        if tokens < self._chunk:
            tokens, reason = self._chunk, LEAST_CHUNK
        if self._slow_steps is not None:
            more = self._slow_steps.prefill(snapshot, tokens, kv_tokens, aim, prompts)
            bunches = self._slow_steps.keeps_out
            if more:
                return Prefill(more, SLOW, is_whole=bunches)
            if bunches:
                return Prefill(tokens, WAITS, admits=False, is_whole=True)
        return Prefill(tokens, reason)

    def _consider_giving_up(
        self, snapshot: EngineSnapshot, load: _Load, slow_steps: SlowSteps
    ) -> None:
        """Looks whether first tokens are worth the pace of all who run."""
        wait = slow_steps.queue.oldest_wait(snapshot.clock_seconds)
        if wait >= PRESSING_WAIT and self._costs_much(snapshot, load):
            self.given_up = GIVEN_UP
            return
        slow_steps.catch_up.consider(snapshot, self._prompts(snapshot))
        if slow_steps.catch_up.is_on:
            self.given_up = CATCHES_UP

    def _holds_again(self, snapshot: EngineSnapshot, slow_steps: SlowSteps) -> bool:
        if self.given_up is CATCHES_UP:
            return not slow_steps.catch_up.is_on
        return snapshot.waiting == 0 and snapshot.running <= self.largest_batch

    def _prompts(self, snapshot: EngineSnapshot) -> PromptsAhead:
        """Those of the next step: what is left of the oldest, then some of mean length."""
        length = self._prompt_tokens
        cached = self._hits.share * length if length < math.inf else 0.0
        return PromptsAhead(snapshot.prompt_computed, snapshot.prompt_left, length, cached)

    def _margin(self) -> float:
        """How far below the target to aim: further, the more gaps were late lately."""
        used = self._late_gaps.used
        return NOISE_MARGIN * (used if used < 1.0 else 1.0) * self.step_time.noise

    def _aim(self) -> float:
        """The time a step may take."""
        return self._target / (1 + self._margin())

    def _start_slowly(self, step: StepRecord) -> None:
        if step.seconds > self._target:
            self._slow_start = max(self._chunk, self._slow_start // 2)
        elif 2 * step.prefill_tokens >= self._slow_start:
            self._slow_start *= 2

    def _deserves_trust(self, snapshot: EngineSnapshot) -> bool:
        """Holds the model's stated error at its working point, and its innovations, to a bound."""
        model = self.step_time
        bound = DOUBTED_ERROR if self.is_trusted else TRUSTED_ERROR
        if not model.has_weights or model.noise > TOO_NOISY or abs(model.bias) > bound:
            return False
        decodes = snapshot.decode_seqs
        kv_tokens = snapshot.used_blocks * snapshot.engine.block_size
        most = snapshot.engine.startup_limits.max_num_batched_tokens
        prompts = self._prompts(snapshot)
        prefill = model.largest_prefill(decodes, kv_tokens, self._aim(), prompts)
        prefill = min(max(prefill, self._chunk), most)
        return (
            model.relative_error(decodes, prefill, kv_tokens, prompts) <= bound
            and model.relative_error(decodes, 0, kv_tokens) <= bound
        )

    def _load(self, snapshot: EngineSnapshot) -> _Load:
        """Of the sequences that run, or of a whole life where that is more."""
        context = snapshot.used_blocks * snapshot.engine.block_size / snapshot.running
        lengths = self._lengths.latest
        if lengths is None:
            return _Load(context, math.inf, 0.0, UNKNOWN_OUTPUT)
        self._prompt_tokens = lengths.prompt_mean
        if self._slow_steps is not None:
            self._slow_steps.set_life(lengths.mean)
        grown = (lengths.variance + lengths.mean**2) / (2 * lengths.mean)
        whole_life = self._held_share * (lengths.prompt_mean + grown)
        cached = self._hits.share * lengths.prompt_mean
        return _Load(max(context, whole_life), lengths.prompt_mean - cached, cached, lengths.mean)

    def _largest_batch(self, snapshot: EngineSnapshot, load: _Load) -> int:
        """The largest b whose step, with the prefill that b sequences bring, is within the time."""
        aim = self._target / (1 + self._margin() / math.sqrt(load.output))
        fits, too_many = 1, snapshot.engine.startup_limits.max_num_seqs + 1
        while too_many - fits > 1:
            tried = (fits + too_many) // 2
            if self._batch_seconds(tried, load) <= aim:
                fits = tried
            else:
                too_many = tried
        return fits

    def _batch_seconds(self, batch: int, load: _Load) -> float:
        """A step of a batch in balance: the mean of few with whole prompts, or any with a share."""
        if self._slow_steps is not None and self._slow_steps.keeps_out and load.prompt < math.inf:
            return self._mean_seconds(batch, load)
        prefill = int(min(self._chunk, batch * load.prompt_share))
        return self.step_time.predict(batch, prefill, int(batch * load.context))

    def _costs_much(self, snapshot: EngineSnapshot, load: _Load) -> bool:
        """Whether all who are here would give far more tokens a second than the largest batch."""
        if math.isinf(load.prompt):
            return False
        most = snapshot.engine.startup_limits.max_num_seqs
        everybody, held = min(snapshot.running + snapshot.waiting, most), self.largest_batch
        gained = everybody * self._mean_seconds(held, load)
        return gained >= WORTH_GIVING_UP * held * self._mean_seconds(everybody, load)

    def _mean_seconds(self, batch: int, load: _Load) -> float:
        """A step of a batch in balance, its prompts whole: in one now and then, or in every one."""
        prefill = int(max(load.prompt, batch * load.prompt_share))
        kv_tokens = int(batch * load.context)
        mixed = min(batch / load.output, 1.0)
        seconds = mixed * self.step_time.predict(batch, prefill, kv_tokens, load.prompts)
        return seconds + (1 - mixed) * self.step_time.predict(batch, 0, kv_tokens)
