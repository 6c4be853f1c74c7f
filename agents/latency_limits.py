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
from batchpilot.agents.trust import Trust, WorkingPoint

#: The target is aimed at from below by so many standard deviations of the step time's noise, once
#: the late gaps are spent.
NOISE_MARGIN = 2.0
#: Tokens of an answer, until lengths are known.
UNKNOWN_OUTPUT = 64.0
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
LARGEST_KNOWN = "largest prefill whose step time is known well enough"
WAITS = "prompts wait for a slow step, where many cost less"
SLOW = "a late first token is worth a slow step"
OUT_OF_REACH = "the target is shorter than a step of one sequence: one runs at a time"
GIVEN_UP = "the target would cost first tokens and most of the throughput: given up until none wait"
CATCHES_UP = "first tokens are late, and the pace is lost or can be spent: given up until few wait"


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

    The model decides as far as it is trusted: see `Trust`. Where that is not with any prefill that
    the target leaves, no step is slow on purpose, and the target is not given up.

    Attributes:
        step_time: Learned from the steps.
        trust: Up to which prefill it decides.
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
        self._chunk = min_prefill_chunk
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
        self.trust = Trust(self.step_time, itl_slo_seconds, min_prefill_chunk)
        self.given_up: str | None = None
        self.largest_batch = 1
        self.is_out_of_reach = False
        self._prompt_tokens = math.inf

    def observe(self, step: StepRecord) -> None:
        """Learns the step's time, and what it spent."""
        self.step_time.observe(step)
        self._hits.observe(step)
        keeps_pace = self.given_up is None
        if keeps_pace:
            self._late_gaps.observe(step)
        if self._slow_steps is not None:
            self._slow_steps.observe(step, keeps_pace=keeps_pace)
        self.trust.observe(step)

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
        load = self._load(snapshot)
        batch = self._largest_batch(snapshot, load)
        self._update_trust(snapshot, load, batch)
        self._steps_to_check = CHECK_STEPS if self.trust.is_any else UNTRUSTED_CHECK_STEPS
        if self.trust.is_any:
            self.largest_batch = batch
            self.is_out_of_reach = batch == 1 and self._batch_seconds(1, load) > self._target
        if self.trust.is_whole and snapshot.waiting and self.given_up is None:
            self._consider_giving_up(snapshot, load)

    def _update_trust(self, snapshot: EngineSnapshot, load: _Load, batch: int) -> None:
        decodes, engine = snapshot.decode_seqs, snapshot.engine
        kv_tokens = snapshot.used_blocks * engine.block_size
        prompts = self._prompts(snapshot)
        prefill = self.step_time.largest_prefill(decodes, kv_tokens, self._aim(), prompts)
        prefill = min(max(prefill, self._chunk), engine.startup_limits.max_num_batched_tokens)
        batch = min(batch, snapshot.running + snapshot.waiting)
        balanced = self._balanced_prefill(batch, load)
        self.trust.update(
            WorkingPoint(decodes, kv_tokens, prefill, prompts),
            WorkingPoint(batch, int(batch * load.context), balanced, PromptsAhead()),
        )

    def prefill(self, snapshot: EngineSnapshot) -> Prefill:
        """Prompt tokens that the step about to be scheduled has time for, beside its decodes."""
        decodes = snapshot.decode_seqs
        kv_tokens = snapshot.used_blocks * snapshot.engine.block_size
        aim, prompts = self._aim(), self._prompts(snapshot)
        tokens, reason = self.step_time.largest_prefill(decodes, kv_tokens, aim, prompts), FITS
        if tokens < self._chunk:
            tokens, reason = self._chunk, LEAST_CHUNK
        if not self.trust.is_whole:
            most = self.trust.most_prefill
            return Prefill(tokens, reason) if tokens <= most else Prefill(most, LARGEST_KNOWN)
        if self._slow_steps is not None:
            more = self._slow_steps.prefill(snapshot, tokens, kv_tokens, aim, prompts)
            bunches = self._slow_steps.keeps_out
            if more:
                return Prefill(more, SLOW, is_whole=bunches)
            if bunches:
                return Prefill(tokens, WAITS, admits=False, is_whole=True)
        return Prefill(tokens, reason)

    def _consider_giving_up(self, snapshot: EngineSnapshot, load: _Load) -> None:
        """Looks whether first tokens, if they have a target, are worth the pace of who runs."""
        slow_steps = self._slow_steps
        if slow_steps is None:
            return
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
        prefill = self._balanced_prefill(batch, load)
        return self.step_time.predict(batch, prefill, int(batch * load.context))

    def _balanced_prefill(self, batch: int, load: _Load) -> int:
        """Prompt tokens of a step of so many sequences, each prompt spread over its output."""
        return int(min(self._chunk, batch * load.prompt_share))

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
