"""How long a step will take, learned online by recursive least squares with forgetting.

The model is linear in its weights and never falls when work is added (no weight is negative), so
that its answer can be turned round: how many prompt tokens fit into a given time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchpilot.agents.limits import StepRecord

Floats = NDArray[np.float64]

#: Rows summed before the weights are solved for again; the first blocks are shorter.
BLOCK_STEPS = 16
FIRST_BLOCK_STEPS = 4
#: What the times of the first block are relative to, at least, in times of its median: relative to
#: its own, a step that came too soon, its result ready after a pause, would count for hundreds.
LEAST_FIRST_WEIGHT = 2.0
#: Share of what is known that a step forgets: about the last thousand steps count.
FORGETTING = 1e-3
#: Weight of the weights held before, as a share of the information of each feature.
INERTIA = 1e-4
#: Steps whose middle one is the speed of now: two pauses in a row do not move it.
SPEED_WINDOW = 5
SPEED_GAIN = 0.25
#: An innovation is clipped at so many standard deviations, of its noise and the model's error.
CLIP_DEVIATIONS = 3.0
#: A believed step so many times as long as modelled is weighted by its own time.
SURELY_LONGER = 1.5
#: Where this share of the newest steps was beyond that, the model is at fault: nothing is clipped.
MODEL_AT_FAULT = 0.2
SURPRISE_GAIN = 1 / 16
FIRST_NOISE = 0.1
SMALLEST_NOISE = 0.005
#: Information on each weight to begin with, in relative errors; next to nothing.
PRIOR = 1e-6
NOISE_GAIN = 0.05
BIAS_GAIN = 1 / 32
#: What fits where a token costs nothing.
MANY_TOKENS = 2.0**31
#: Mean absolute deviation to standard deviation, for a normal distribution.
MEAN_DEVIATION_TO_SIGMA = math.sqrt(math.pi / 2)


@dataclass(frozen=True, slots=True)
class StepTimeForm:
    """Which terms the step time has.

    With D sequences that decode, P prompt tokens computed, T = D + P, K tokens in the KV cache and
    S, the sum over the prompts computed, from token `start` to token `end`, of end^2 - start^2:

        t = w0 + wd D + wk K + wm [P>0 and D>0] K + we S + sum_j w_j max(0, T - k_j)

    Attributes:
        knees: The k_j, rising. (0,) is a straight line; more of them bend it as the floor of
            reading the weights does, wherever in between its knee lies.
        mixed_kv: Whether there is a wm: attention kernels are slower where prompts share a step.
        prefill_squared: Whether there is a we: attention of the prompts' tokens to those before.
    """

    knees: tuple[int, ...] = (0, 96, 160, 256)
    mixed_kv: bool = True
    prefill_squared: bool = True

    @property
    def size(self) -> int:
        """Number of weights."""
        return 5 + len(self.knees)

    def free(self) -> NDArray[np.bool_]:
        """Which weights the form has; the others stay 0. Shape (size,)."""
        free = np.ones(self.size, dtype=np.bool_)
        free[3], free[4] = self.mixed_kv, self.prefill_squared
        return free


class PromptsAhead(NamedTuple):
    """The prompts that a step will meet: what is left of one, then whole ones of equal length.

    Attributes:
        computed: Tokens of the first that are computed.
        left: Tokens of it still to compute; 0 where none is under way.
        length: Tokens of each that follows.
        cached: Those of them that the prefix cache holds.
    """

    computed: int = 0
    left: int = 0
    length: float = math.inf
    cached: float = 0.0

    def squares(self, tokens: int) -> float:
        """S of `StepTimeForm` for so many of their tokens.

        Those that follow the first share their sum evenly, once there is more than one of them, so
        that it grows with each token.
        """
        first = min(tokens, self.left)
        rest = tokens - first
        attended = min(rest + 2 * self.cached, self.length + self.cached)
        return first * (first + 2 * self.computed) + rest * attended

    def stretches(self) -> tuple[tuple[float, float, bool], ...]:
        """Where `squares` has which form: its tokens, slope at the start, and whether it bends."""
        follow = (
            (self.length - self.cached, 2.0 * self.cached, True),
            (math.inf, self.length + self.cached, False),
        )
        return ((self.left, 2.0 * self.computed, True), *follow) if self.left else follow


#: Prompts of which nothing is known: taken for one, from its beginning.
ONE_PROMPT = PromptsAhead()


#: Tokens, sequences and their squares in these units make all weights of one size.
_UNITS = (1.0, 1e-2, 1e-5, 1e-5, 1e-7)
_TOKEN_UNIT = 1e-3


class StepTimeEstimator:
    """Learns the step time from step records, and says how sure it is.

    Formula: the weights w of `StepTimeForm` minimise the discounted sum of squared relative errors
    sum_i (1 - phi)^(n - i) (1 - w x_i / t_i)^2 under w >= 0, in the information form of recursive
    least squares: A = sum x x', b = sum x t, both weighted, and A w = b solved block by block.
    A share of A's diagonal draws each weight towards its last value, so that what is not excited
    stays where it was while its stated uncertainty grows.

    A factor on the whole model, the median of the newest ratios of measured to modelled time,
    smoothed, follows what changes everything at once, such as a GPU that throttles, within about
    a dozen steps; the weights follow within a thousand.

    Outliers: an innovation beyond three deviations is clipped to that, and the median ignores it;
    unless the model's own error there is as large, or several came lately. One that is far longer
    than modelled counts relative to itself, so that a pause never outweighs a thousand steps.
    Irregular steps (start-up, after an idle gap) are not looked at.

    Attributes:
        steps: Steps it has learned from.
        speed: The factor on the whole model.
        bias: Mean of the newest few dozen innovations, each relative and at most 1: far from 0, the
            model is wrong.
        has_weights: Whether it can predict at all.
        attention_tokens: Prompt tokens that take as long as one more of S; 0 where tokens cost
            nothing.

    Limitations: it knows a step by four numbers; where the fourth, S, is not known, its prompts are
    taken for one that is computed from its beginning.
    """

    def __init__(self, form: StepTimeForm | None = None) -> None:
        """Starts without weights."""
        self.form = form or StepTimeForm()
        size = self.form.size
        self._information = np.zeros((size, size))
        self._moment = np.zeros(size)
        self._weights = [0.0] * size
        self._covariance: NDArray[Any] = np.zeros((size, size))
        self._free = self.form.free()
        self._knees = np.array(self.form.knees, dtype=np.float64)
        self._scales = np.array((*_UNITS, *([_TOKEN_UNIT] * len(self.form.knees))))
        self._rows: list[tuple[float, ...]] = []
        self._block = FIRST_BLOCK_STEPS
        self._ratios = [1.0] * SPEED_WINDOW
        self._noise = FIRST_NOISE
        self._surprises = 0.0
        self.steps = 0
        self.speed = 1.0
        self.bias = 0.0
        self.has_weights = False
        self.attention_tokens = 0.0

    @property
    def noise(self) -> float:
        """Relative standard deviation of its innovations: the GPU's noise and the form's misfit."""
        return self._noise

    @property
    def weights(self) -> tuple[float, ...]:
        """w0, wd, wk, wm, we and the w_j of the form, in seconds per unit, without the speed."""
        return tuple(self._weights)

    def warm_start(self, steps: Iterable[StepRecord]) -> None:
        """Learns from steps that were not measured here, such as a profile's.

        They teach the weights and are then forgotten like any other step; the speed stays free to
        say that this GPU is faster or slower.
        """
        for step in steps:
            self.observe(step)
        self._noise = FIRST_NOISE

    def predict(
        self,
        decode_seqs: int,
        prefill_tokens: int,
        kv_tokens: int,
        prompts: PromptsAhead = ONE_PROMPT,
    ) -> float:
        """Seconds a step will take; 0 before the first weights."""
        squares = prompts.squares(prefill_tokens)
        return self.speed * self._modelled(decode_seqs, prefill_tokens, kv_tokens, squares)

    def expect(self, step: StepRecord) -> float:
        """Seconds it would have predicted for a step that is over."""
        squares = _squares(step)
        return self.speed * self._modelled(
            step.decode_seqs, step.prefill_tokens, step.kv_tokens, squares
        )

    def _modelled(
        self, decode_seqs: int, prefill_tokens: int, kv_tokens: int, squares: float
    ) -> float:
        w = self._weights
        t = w[0] + w[1] * decode_seqs + w[2] * kv_tokens
        if prefill_tokens:
            t += w[4] * squares
            if decode_seqs:
                t += w[3] * kv_tokens
        tokens = decode_seqs + prefill_tokens
        index = 5
        for knee in self.form.knees:
            if tokens <= knee:
                break
            t += w[index] * (tokens - knee)
            index += 1
        return t

    def largest_prefill(
        self,
        decode_seqs: int,
        kv_tokens: int,
        seconds: float,
        prompts: PromptsAhead = ONE_PROMPT,
    ) -> int:
        """Most prompt tokens a step of these decodes has time for; 0 where there is none.

        Args:
            decode_seqs: Sequences that decode in it.
            kv_tokens: Tokens in the KV cache.
            seconds: Time the step may take.
            prompts: Whose tokens they are.

        Returns:
            The largest P with `predict(decode_seqs, P, kv_tokens, prompts) <= seconds`, rounded
            down; a very large number where more tokens cost nothing as far as is known.
        """
        if self.speed <= 0:
            return 0
        left = seconds / self.speed - self._modelled(decode_seqs, 0, kv_tokens, 0.0)
        if decode_seqs:
            left -= self._weights[3] * kv_tokens
        if left < 0:
            return 0
        total, attention = 0.0, self._weights[4]
        for most, attended, bends in prompts.stretches():
            tokens, left = self._fill(
                decode_seqs + total, left, most, attended * attention, attention if bends else 0.0
            )
            total += tokens
            if tokens < most:
                break
        return int(total)

    def _fill(
        self, base: float, left: float, most: float, slope: float, square: float
    ) -> tuple[float, float]:
        """Adds tokens to a step of `base` while time is left.

        Args:
            base: Tokens in it.
            left: Seconds left.
            most: Tokens to add at most.
            slope: Seconds of attention for each token added.
            square: The same for its square.

        Returns:
            Tokens added and seconds left, 0 of them unless it added the most.
        """
        w, knees = self._weights, self.form.knees
        added, index, count = 0.0, 0, len(knees)
        while index < count and knees[index] <= base:
            slope += w[5 + index]
            index += 1
        # On each piece between two knees the cost beyond the left one is slope p + square p^2.
        while added < most:
            piece = min(knees[index] - base if index < count else math.inf, most) - added
            here = slope + 2 * square * added
            fits = _tokens_within(left, here, square)
            if fits < piece:
                return added + fits, 0.0
            left = max(0.0, left - piece * (here + square * piece))
            added += piece
            if index < count and added >= knees[index] - base:
                slope += w[5 + index]
                index += 1
        return added, left

    def relative_error(
        self,
        decode_seqs: int,
        prefill_tokens: int,
        kv_tokens: int,
        prompts: PromptsAhead = ONE_PROMPT,
    ) -> float:
        """Standard error of the mean time of such a step, as a share; infinite before weights.

        It says how well the weights are known there, and grows without bound where nothing like it
        has been seen for long; `noise` is on top of it.
        """
        return self._relative_error(
            (decode_seqs, prefill_tokens, kv_tokens, prompts.squares(prefill_tokens))
        )

    def _relative_error(self, content: tuple[int, int, int, float]) -> float:
        modelled = self._modelled(*content)
        if modelled <= 0:
            return math.inf
        x = self._design(np.array([content], dtype=float))[0]
        return self._noise * math.sqrt(max(0.0, float(x @ self._covariance @ x))) / modelled

    def observe(self, step: StepRecord) -> None:
        """Learns from a step; a few microseconds but for the last of each block."""
        seconds = step.seconds
        if not step.regular or seconds <= 0 or not (step.decode_seqs or step.prefill_tokens):
            return
        content = (step.decode_seqs, step.prefill_tokens, step.kv_tokens, _squares(step))
        self.steps += 1
        weight = seconds
        if self.has_weights:
            modelled = self._modelled(*content)
            if modelled > 0:
                weight = modelled * self.speed
                ratio = seconds / weight
                believed = self._believable(content, ratio)
                seconds = believed * weight
                if believed == ratio and ratio > SURELY_LONGER:
                    weight = seconds
                self._follow_speed(step.seconds / modelled)
        self._rows.append((*content, seconds, weight))
        if len(self._rows) >= self._block:
            self._absorb()

    def _believable(self, content: tuple[int, int, int, float], ratio: float) -> float:
        """Measured over predicted time, clipped; updates the noise and the bias."""
        self.bias += BIAS_GAIN * (min(ratio - 1.0, 1.0) - self.bias)
        deviation = abs(ratio - 1.0)
        bound = CLIP_DEVIATIONS * self._noise
        counted = deviation
        surprising = deviation > bound
        self._surprises += SURPRISE_GAIN * (surprising - self._surprises)
        if surprising:
            if self._surprises < MODEL_AT_FAULT:
                wide = CLIP_DEVIATIONS * math.hypot(self._noise, self._relative_error(content))
                ratio = min(max(ratio, 1 - wide), 1 + wide)
            counted = bound
        noise = self._noise + NOISE_GAIN * (MEAN_DEVIATION_TO_SIGMA * counted - self._noise)
        self._noise = noise if noise > SMALLEST_NOISE else SMALLEST_NOISE
        return ratio

    def _follow_speed(self, ratio: float) -> None:
        ratios = self._ratios
        del ratios[0]
        ratios.append(ratio)
        self.speed += SPEED_GAIN * (sorted(ratios)[SPEED_WINDOW // 2] - self.speed)

    def _design(self, content: Floats) -> Floats:
        """Features of steps, in their units; shape (n, size) from (n, at least 4) of D, P, K, S."""
        decode_seqs, prefill_tokens, kv_tokens = content[:, 0], content[:, 1], content[:, 2]
        tokens = decode_seqs + prefill_tokens
        design = np.empty((len(content), self.form.size))
        design[:, 0] = 1.0
        design[:, 1] = decode_seqs
        design[:, 2] = kv_tokens
        design[:, 3] = kv_tokens * ((decode_seqs > 0) & (prefill_tokens > 0))
        design[:, 4] = content[:, 3]
        np.maximum(tokens[:, None] - self._knees, 0.0, out=design[:, 5:])
        design *= self._scales
        return design

    def _absorb(self) -> None:
        """Adds a block of rows to what is known, and solves for the weights."""
        table = np.array(self._rows, dtype=np.float64)
        self._rows.clear()
        self._block = min(2 * self._block, BLOCK_STEPS)
        keep = (1 - FORGETTING) ** len(table)
        seconds, weight = table[:, 4], table[:, 5]
        if not self.has_weights:
            weight = np.maximum(weight, LEAST_FIRST_WEIGHT * np.median(seconds))
        x = self._design(table) / weight[:, None]
        self._information *= keep
        self._information += x.T @ x
        self._moment *= keep
        self._moment += (seconds / weight) @ x
        diagonal = self._information.diagonal()
        inertia = INERTIA * diagonal + PRIOR / float(weight[-1]) ** 2
        held = np.array(self._weights) / self._scales
        information = self._information + np.diag(inertia)
        self._covariance = np.linalg.inv(information)
        weights = nonnegative_least_squares(
            information, self._moment + inertia * held, self._free & (held > 0), self._free
        )
        self._weights = (weights * self._scales).tolist()
        token = sum(self._weights[5:])
        self.attention_tokens = self._weights[4] / token if token > 0 else 0.0
        self.has_weights = True


def _squares(step: StepRecord) -> float:
    """What its prompts attended to; as if they were one, where nobody knows."""
    return step.prefill_squares or step.prefill_tokens * step.prefill_tokens


def _tokens_within(left: float, slope: float, square: float) -> float:
    """Largest p with slope p + square p^2 <= left."""
    if square > 0:
        return (math.sqrt(slope * slope + 4 * square * left) - slope) / (2 * square)
    return left / slope if slope > 0 else MANY_TOKENS


def nonnegative_least_squares(
    information: Floats,
    moment: Floats,
    start: NDArray[np.bool_],
    allowed: NDArray[np.bool_],
) -> Floats:
    """The w >= 0 that minimises w' A w / 2 - b' w: Lawson and Hanson's active sets.

    Args:
        information: A, positive definite; shape (n, n).
        moment: b; shape (n,).
        start: Weights taken to be above 0 at first: the last solution's make it quick.
        allowed: Weights that may be above 0 at all.
    """
    passive = start.copy()
    weights = np.zeros(len(moment))
    for _ in range(3 * len(moment)):
        index = np.flatnonzero(passive)
        solved = np.linalg.solve(information[np.ix_(index, index)], moment[index])
        if len(index) and solved.min() < 0:
            passive[index[solved < 0]] = False
            continue
        weights[:] = 0.0
        weights[index] = solved
        gain = np.where(allowed & ~passive, moment - information @ weights, 0.0)
        best = int(np.argmax(gain))
        if gain[best] <= 1e-9 * abs(moment[best]):
            break
        passive[best] = True
    return weights
