"""Canary: a new policy for a share of the engines, and back by itself if they fare worse.

Pure decisions: no clock, no I/O. Whoever holds the engines (the tuning service) asks which side an
engine is on, shows each side's windows as they come, and acts on the verdict.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from enum import StrEnum

from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.agents.telemetry import TelemetryWindow


class CanaryVerdict(StrEnum):
    """What is to be done."""

    WAIT = "wait"
    ROLL_BACK = "roll_back"
    PROMOTE = "promote"


@dataclass(frozen=True)
class CanaryParameters(Parameters):
    """How a canary is run."""

    share: float = parameter(0.1, above=0, below=1, help="of the engines that get the new policy")
    min_windows: int = parameter(
        60, minimum=2, help="busy windows on each side before anything is judged"
    )
    windows: int = parameter(
        600, minimum=2, help="busy windows of the canary after which it is promoted"
    )
    median_busy_seconds: float = parameter(
        300.0, minimum=0, help="busy seconds of its median engine before it is promoted"
    )
    confidence: float = parameter(
        0.99, above=0.5, below=1, help="that the canary is worse, before it is rolled back"
    )
    most_loss: float = parameter(
        0.02, minimum=0, below=1, help="share by which the canary may be worse"
    )
    most_errors: int = parameter(
        0, minimum=0, help="failed decisions of the canary that are forgiven"
    )

    def __post_init__(self) -> None:
        """Checks the values against each other too."""
        super().__post_init__()
        if self.windows < self.min_windows:
            object.__setattr__(self, "windows", self.min_windows)


def is_canary(engine: str, *, share: float, salt: str) -> bool:
    """Whether an engine gets the new policy: always the same answer for the same names.

    Args:
        engine: The engine's own name, its data-parallel rank included.
        share: Of all engines, 0 to 1. A larger share keeps the engines of a smaller one.
        salt: Names the trial, so that not always the same engines go first.
    """
    digest = hashlib.sha256(f"{salt}\0{engine}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(slots=True)
class _Mean:
    """Mean and variance of values that come one by one (Welford's algorithm)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Takes in a value."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    @property
    def error(self) -> float:
        """Standard error of the mean, squared."""
        return self.squares / (self.count - 1) / self.count if self.count > 1 else math.inf


@dataclass(slots=True)
class Side:
    """One side's windows, in numbers per window.

    Attributes:
        late: Share of the tokens that were late.
        good: Tokens in time per second of a running or waiting sequence; see `window_scores`.
        recomputed: Share of the computed tokens that preemptions threw away.
        errors: Decisions that failed.
        busy_seconds: Time of the steps of each engine and rank.
    """

    late: _Mean = field(default_factory=_Mean)
    good: _Mean = field(default_factory=_Mean)
    recomputed: _Mean = field(default_factory=_Mean)
    errors: int = 0
    busy_seconds: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def windows(self) -> int:
        """Busy windows so far."""
        return self.good.count

    @property
    def median_busy_seconds(self) -> float:
        """How long an engine of this side has worked: half of them have longer."""
        return statistics.median(self.busy_seconds.values()) if self.busy_seconds else 0.0


class Canary:
    """Compares the engines that have the new policy with those that have the old one.

    Formula: over busy windows, each side's means of tokens in time per second of a running or
    waiting sequence, of the share of late tokens, and of the share of work thrown away. The canary
    is rolled back as soon as one of them is worse by more than `most_loss` with `confidence`, by
    Welch's test with the normal distribution:

        z = (difference - most_loss) / sqrt(se_canary^2 + se_control^2)  >  PhiInv(confidence)

    or where more than `most_errors` of its decisions failed. Without that it is promoted after
    `windows` windows, all engines together, once half of its engines have worked for
    `median_busy_seconds` each: a large fleet has many windows before any engine's policy, which
    starts cold, has learned anything.

    Limitations: the test is asked again with every window, so that over a long trial a false alarm
    is likelier than 1 - confidence; a rollback costs little. Windows of one engine follow each
    other and are no independent draws. Engines must be alike on both sides: give each model and GPU
    a group of its own.

    Args:
        params: How it is run.
        salt: Names the trial.
    """

    def __init__(self, params: CanaryParameters, salt: str) -> None:
        """Starts without a window."""
        self.params = params
        self.canary = Side()
        self.control = Side()
        self.reason = "too few windows"
        self._salt = salt

    def is_canary(self, engine: str) -> bool:
        """Whether an engine is to have the new policy."""
        return is_canary(engine, share=self.params.share, salt=self._salt)

    def observe(self, engine: str, window: TelemetryWindow, rank: int = 0) -> None:
        """Takes in a window of an engine's rank; idle ones say nothing."""
        scores = window_scores(window)
        if scores is None:
            return
        side = self.canary if self.is_canary(engine) else self.control
        worked = side.busy_seconds.get((engine, rank), 0.0)
        side.busy_seconds[engine, rank] = worked + window.busy_seconds
        for mean, value in zip((side.good, side.late, side.recomputed), scores, strict=True):
            mean.add(value)

    def forget_all_but(self, here: Set[tuple[str, int]]) -> None:
        """Forgets how long engines and ranks worked that are gone: one that comes back is cold."""
        for side in (self.canary, self.control):
            for gone in side.busy_seconds.keys() - here:
                del side.busy_seconds[gone]

    def failed(self, engine: str) -> None:
        """A decision for an engine failed, or gave nothing that can be used."""
        side = self.canary if self.is_canary(engine) else self.control
        side.errors += 1

    def verdict(self) -> CanaryVerdict:
        """What is to be done now; `reason` says why."""
        params, canary, control = self.params, self.canary, self.control
        if canary.errors > params.most_errors:
            self.reason = f"{canary.errors} decisions of the canary failed"
            return CanaryVerdict.ROLL_BACK
        if min(canary.windows, control.windows) < params.min_windows:
            self.reason = f"too few windows: {canary.windows} with it, {control.windows} without"
            return CanaryVerdict.WAIT
        worse = next(iter(self._regressions()), None)
        if worse is not None:
            self.reason = worse
            return CanaryVerdict.ROLL_BACK
        seconds = canary.median_busy_seconds
        self.reason = f"no worse in {canary.windows} windows, {seconds:.0f} s of the median engine"
        if canary.windows >= params.windows and seconds >= params.median_busy_seconds:
            return CanaryVerdict.PROMOTE
        return CanaryVerdict.WAIT

    def _regressions(self) -> Iterable[str]:
        """What is worse on the canary's side, in words."""
        new, old = self.canary, self.control
        allowed = self.params.most_loss
        if self._is_above(old.good, new.good, allowed * old.good.mean):
            loss = 1.0 - new.good.mean / old.good.mean
            yield f"tokens in time per running sequence fell by {loss:.1%}"
        if self._is_above(new.late, old.late, allowed):
            yield f"late tokens rose from {old.late.mean:.1%} to {new.late.mean:.1%}"
        if self._is_above(new.recomputed, old.recomputed, allowed):
            yield (
                f"work thrown away rose from {old.recomputed.mean:.1%} to {new.recomputed.mean:.1%}"
            )

    def _is_above(self, greater: _Mean, lesser: _Mean, by: float) -> bool:
        excess = greater.mean - lesser.mean - by
        if excess <= 0:
            return False
        error = math.sqrt(greater.error + lesser.error)
        return error == 0.0 or 0.5 * math.erfc(-excess / error / math.sqrt(2)) > (
            self.params.confidence
        )


def window_scores(window: TelemetryWindow) -> tuple[float, float, float] | None:
    """What a window says of how well its engine is steered; None where it did next to nothing.

    Returns:
        Tokens in time per second of a running or waiting sequence; share of the decoded tokens that
        were late; share of the computed tokens that were thrown away.
    """
    if not window.decode_tokens or not window.busy_seconds:
        return None
    late = window.slow_decode_tokens / window.decode_tokens
    demand = window.mean_running + window.waiting
    in_time = window.decode_tokens - window.slow_decode_tokens
    if demand <= 0:
        return None
    return in_time / (window.busy_seconds * demand), late, window.recomputed_share
