"""How long outputs will be, learned online without counting only those that have finished.

A mean over finished requests is too low at the start and after every shift, because short ones
finish first. Here running requests count too, as censored at their present age: the output length
is a lifetime, and its distribution is estimated as survival analysis does (`agents/survival.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchpilot.agents.limits import StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.survival import Floats, SurvivalCurve, SurvivalSample

SMALLEST_WINDOW = 64
# Rebuild once this share of the completions is new, or once the running ones have grown by this
# share of the longest age seen (an estimate that extrapolates learns from their growth alone).
_NEW_COMPLETIONS = 1 / 20
_NEW_AGE = 1 / 8
_FEWEST_STEPS = 8
# A shift: ends among the newest requests differ from what was expected by so many deviations.
_SHIFT_DEVIATIONS = 4.0
_SHIFT_SHARE = 1 / 8
# By the time it shows, about a quarter of those newest requests came after it.
_KEPT_PART = 4


@dataclass(frozen=True, slots=True)
class LengthEstimate:
    """What is known of prompt and output lengths at one moment, in tokens.

    Attributes:
        output: Distribution of the output length.
        prompt_mean: Mean prompt length of the requests that arrived.
        prompt_variance: Its variance.
    """

    output: SurvivalCurve
    prompt_mean: float
    prompt_variance: float

    @property
    def mean(self) -> float:
        """Mean output length."""
        return self.output.mean

    @property
    def variance(self) -> float:
        """Variance of the output length."""
        return self.output.variance

    @property
    def num_completed(self) -> int:
        """Completions it rests on."""
        return self.output.num_ended

    @property
    def relative_error(self) -> float:
        """Standard error of `mean` over `mean`: 1 or so at first, towards 0 as requests finish."""
        return self.output.standard_error / self.output.mean

    def mean_remaining(self, age: ArrayLike) -> Floats:
        """Expected tokens a request of `age` output tokens has still to generate; any shape."""
        return self.output.mean_remaining(age)

    def quantile_remaining(self, age: ArrayLike, probability: ArrayLike) -> Floats:
        """Tokens within which a request of `age` output tokens ends with this probability.

        Args:
            age: Output tokens generated so far; any shape.
            probability: In [0, 1); broadcasts against `age`.

        Raises:
            ValueError: A probability outside [0, 1).
        """
        return self.output.quantile_remaining(age, probability)


class LengthEstimator:
    """Learns prompt and output lengths from step records.

    Formula: Kaplan-Meier over age (output tokens) of the newest `window` finished requests and of
    those still running. Aborted and running ones are censored at their age. A sequence that was
    already running when the window begins is left-truncated: it is at risk only from the age it
    had then, its age at exit less the decode steps since. Without that the N running ones would
    bias the mean upwards by about N / window. Prompt lengths count at arrival, so what waits
    counts too.

    When it rebuilds: a twentieth of the window's completions is new, or the running requests have
    grown by an eighth of the longest age seen. Otherwise `estimate` returns the last one.

    Shifts: before a rebuild the newest eighth of the window is held against the last estimate
    (a one-sample log-rank test); four deviations apart, and all but a quarter of it is forgotten.

    Limitations: beyond the longest completion the tail is extrapolated, and `relative_error`
    grows with its share. Ages are taken to grow one token per decode step: preemptions make the
    mean slightly too high, speculative decoding makes it too low once the window is full.
    """

    def __init__(self, window: int = 2048) -> None:
        """Starts without data.

        Args:
            window: Finished requests to remember.

        Raises:
            ConfigError: The window is smaller than `SMALLEST_WINDOW`.
        """
        if window < SMALLEST_WINDOW:
            raise ConfigError(f"window={window} must be at least {SMALLEST_WINDOW}")
        self._finished = _Ring(window, columns=3)
        self._prompts = _Ring(window, columns=1)
        self._arrivals_seen = False
        self._decode_steps = 0
        self._window_start = 0
        self._new_completions = 0
        self._completions_needed = 1
        self._rebuild_at_step = 0
        self._latest: LengthEstimate | None = None

    @property
    def latest(self) -> LengthEstimate | None:
        """The last estimate built, None before the first."""
        return self._latest

    @property
    def is_stale(self) -> bool:
        """Whether `estimate` would build anew: only then are running ages worth reading."""
        return self._new_completions >= self._completions_needed or (
            self._latest is not None and self._decode_steps >= self._rebuild_at_step
        )

    def observe(self, step: StepRecord) -> None:
        """Counts what arrived and what finished; O(1) plus their number."""
        if step.decode_seqs > 0:
            self._decode_steps += 1
        for request in step.finished:
            if request.output_tokens > 0:
                self._remember(request.output_tokens, request.completed)
            if not self._arrivals_seen:  # attached late, or to an engine that cannot tell
                self._prompts.push((request.prompt_tokens,))
        for prompt_tokens in step.arrived:
            self._prompts.push((prompt_tokens,))
            self._arrivals_seen = True

    def _remember(self, output_tokens: int, completed: bool) -> None:
        dropped = self._finished.push((output_tokens, completed, self._decode_steps))
        if dropped is not None:
            self._window_start = int(dropped[2])
        self._new_completions += completed

    def estimate(self, ages: ArrayLike) -> LengthEstimate | None:
        """The distribution of lengths now; None before the first completion.

        Args:
            ages: Output tokens of every unfinished request, preempted ones included; those that
                have generated nothing yet may be left out. Read only when `is_stale`.
        """
        if self.is_stale:
            self._build(np.asarray(ages, dtype=np.float64))
        return self._latest

    def _build(self, ages: Floats) -> None:
        ages = ages[ages > 0]
        self._forget_before_shift(ages)
        sample = self._sample(ages, newest=len(self._finished))
        if not sample.ended.any():
            return
        curve = SurvivalCurve(sample)
        prompts = self._prompts.values()[0]
        self._latest = LengthEstimate(curve, float(prompts.mean()), float(prompts.var()))
        self._new_completions = 0
        self._completions_needed = max(1, int(curve.num_ended * _NEW_COMPLETIONS))
        patience = max(_FEWEST_STEPS, int(sample.exits.max() * _NEW_AGE))
        self._rebuild_at_step = self._decode_steps + patience

    def _sample(self, ages: Floats, newest: int) -> SurvivalSample:
        """Lifetimes seen since the last request before the `newest` ones finished."""
        finished = self._finished.values()
        begin = finished.shape[1] - newest
        start = finished[2, begin - 1] if begin else self._window_start
        exits = np.concatenate((finished[0, begin:], ages))
        ended = np.concatenate((finished[1, begin:] > 0, np.zeros(len(ages), dtype=np.bool_)))
        last_steps = np.concatenate((finished[2, begin:], np.full(len(ages), self._decode_steps)))
        # One more than the decode steps: the first token comes from the prefill.
        grown = last_steps - start + 1
        return SurvivalSample(exits, np.maximum(exits - grown, 0.0), ended)

    def _forget_before_shift(self, ages: Floats) -> None:
        """Drops what is older than a shift of the lengths, if there was one."""
        newest = min(int(self._finished.capacity * _SHIFT_SHARE), len(self._finished) // 2)
        if self._latest is None or newest < SMALLEST_WINDOW // 2:
            return
        recent, past = self._sample(ages, newest), self._latest.output
        # Only where the past was seen: an extrapolation that proves wrong is no shift.
        exits = np.minimum(recent.exits, past.longest_ended)
        entries = np.minimum(recent.entries, past.longest_ended)
        ended = float(np.sum(recent.ended & (recent.exits <= past.longest_ended)))
        hazards = past.cumulative_hazard(exits) - past.cumulative_hazard(entries)
        expected = float(hazards.sum())
        variance = expected * (1 + expected / past.num_ended)
        if (ended - expected) ** 2 > _SHIFT_DEVIATIONS**2 * variance:
            self._window_start = int(self._finished.keep(newest // _KEPT_PART)[2])


class _Ring:
    """The newest rows of a few numbers each: pushed in every step, read as columns now and then.

    The rows lie next to each other in an array twice as long, and move to its front when they come
    to its end, so that nothing is copied to read them.
    """

    def __init__(self, capacity: int, columns: int) -> None:
        self.capacity = capacity
        self._rows = np.empty((2 * capacity, columns))
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def push(self, row: tuple[float, ...]) -> NDArray[np.float64] | None:
        """Adds a row; returns the one it displaced, if any, to be read at once."""
        rows, end = self._rows, self._end
        if end == len(rows):
            end = len(self)
            rows[:end] = rows[self._begin :]
            self._begin = 0
        rows[end] = row
        self._end = end + 1
        if len(self) <= self.capacity:
            return None
        self._begin += 1
        displaced: NDArray[np.float64] = rows[self._begin - 1]
        return displaced

    def values(self) -> NDArray[np.float64]:
        """All rows, oldest first, until the next push; shape (columns, len)."""
        values: NDArray[np.float64] = self._rows[self._begin : self._end].T
        return values

    def keep(self, newest: int) -> NDArray[np.float64]:
        """Forgets all but the newest rows; returns the newest one forgotten."""
        self._begin = self._end - newest
        forgotten: NDArray[np.float64] = self._rows[self._begin - 1]
        return forgotten
