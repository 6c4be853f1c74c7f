"""What an agent's action means: two numbers in [-1, 1] for the two limits, and back.

One place for the environment and for every policy that runs a trained model, so that an action
means in service what it meant in training. Three designs, with b the limit that a base policy
decides in the same step and a the action for that limit:

    absolute   low (high / low)^((a + 1) / 2)    from the least allowed to the start-up value
    residual   b span^a                          from b / span to b * span; 0 is the base itself
    grid       b f                               one pair of factors out of a few, by its number

For tokens, the b of the last two is the base's room for prompts: its `max_num_batched_tokens`
beyond the decodes of now. For sequences they say how many are let in, not whom to throw out: no
action goes below what runs, nor opens a door where nobody knows how far beyond its limit the base
is (`Decision.wanted_seqs`). And what the base decides as part of a plan over several steps stays as
it is (`Decision.is_whole`): half of a plan is worse than either.

A trained policy records `ACTION_VERSION`; any change of a mapping is a new version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from batchpilot.agents.limits import BatchLimits, Decision, EngineFacts, EngineSnapshot
from batchpilot.agents.parameters import ConfigError

ACTION_SIZE = 2
ACTION_VERSION = 3

Design = Literal["absolute", "residual", "grid"]
#: Two numbers in [-1, 1], or the number of a pair of factors.
Action = tuple[float, float] | int


@dataclass(frozen=True, slots=True)
class ActionScale:
    """Maps actions to limits and back on a log scale.

    Formula, for each limit: limit = low (high / low)^((a + 1) / 2), rounded to a whole number;
    -1 is the lowest, 0 the geometric mean, 1 the highest. Doubling a limit is the same move of the
    action wherever it starts.

    Attributes:
        lowest: Limits of the action (-1, -1).
        highest: Limits of the action (1, 1).

    Raises:
        ConfigError: A lowest limit below 1 or not below its highest.
    """

    lowest: BatchLimits
    highest: BatchLimits

    def __post_init__(self) -> None:
        """Checks that there is something to choose."""
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            low, high = getattr(self.lowest, name), getattr(self.highest, name)
            if not 1 <= low < high:
                raise ConfigError(
                    f"{name}: the lowest, {low}, must be at least 1 and less than the highest, "
                    f"{high}"
                )

    @classmethod
    def of(
        cls, engine: EngineFacts, *, min_num_seqs: int, min_num_batched_tokens: int
    ) -> ActionScale:
        """From the least that is allowed to what the engine was started with."""
        return cls(BatchLimits(min_num_seqs, min_num_batched_tokens), engine.startup_limits)

    def to_limits(self, action: Sequence[float]) -> BatchLimits:
        """The limits an action asks for; actions beyond [-1, 1] are taken as the nearest inside.

        Raises:
            ValueError: Not two finite numbers.
        """
        values = checked_action(action)
        low, high = self.lowest, self.highest
        return BatchLimits(
            _scaled(values[0], low.max_num_seqs, high.max_num_seqs),
            _scaled(values[1], low.max_num_batched_tokens, high.max_num_batched_tokens),
        )

    def to_action(self, limits: BatchLimits) -> tuple[float, float]:
        """The action that asks for these limits; the nearest where they are out of bounds."""
        low, high = self.lowest, self.highest
        return (
            log_position(limits.max_num_seqs, low.max_num_seqs, high.max_num_seqs),
            log_position(
                limits.max_num_batched_tokens,
                low.max_num_batched_tokens,
                high.max_num_batched_tokens,
            ),
        )


def log_position(value: float, low: float, high: float) -> float:
    """Where a value lies between two others on a log scale: -1 at or below low, 1 from high on."""
    if value <= low:
        return -1.0
    if value >= high:
        return 1.0
    return 2.0 * math.log(value / low) / math.log(high / low) - 1.0


def _scaled(action: float, low: int, high: int) -> int:
    share = (min(max(action, -1.0), 1.0) + 1.0) / 2.0
    return min(max(round(low * math.pow(high / low, share)), low), high)


@dataclass(frozen=True, slots=True)
class ResidualScale:
    """Shifts a base policy's limits on a log scale.

    Formula: max_num_seqs = base span^a, not below what runs. The base here is what it wanted, where
    it decided on what runs: else each step would let in a share more again;
    max_num_batched_tokens = D + (base - D) span^a, with D the tokens of the decodes of now. Rounded
    to whole numbers, and kept between `lowest` and the start-up value. An action of 0 is the base's
    own limit, exactly and whatever it is; so is any action where the base's decision is whole.

    Attributes:
        seqs_span: What a = 1 multiplies `max_num_seqs` by, and a = -1 divides it by.
        tokens_span: The same of the room for prompts in `max_num_batched_tokens`.
        lowest: Fewest sequences, and prompt tokens beside the decodes, an action may lead to.

    Raises:
        ConfigError: A span that is not a finite number above 1.
    """

    seqs_span: float
    tokens_span: float
    lowest: BatchLimits = BatchLimits(1, 1)

    def __post_init__(self) -> None:
        """Checks that there is something to choose."""
        for name in ("seqs_span", "tokens_span"):
            span = getattr(self, name)
            if not (math.isfinite(span) and span > 1):
                raise ConfigError(f"{name}={span!r} must be a finite number above 1")

    def to_limits(
        self, action: Sequence[float], base: Decision, snapshot: EngineSnapshot
    ) -> BatchLimits:
        """The limits an action asks for; actions beyond [-1, 1] are taken as the nearest inside.

        Raises:
            ValueError: Not two finite numbers.
        """
        seqs, tokens = checked_action(action)
        factors = (math.pow(self.seqs_span, seqs), math.pow(self.tokens_span, tokens))
        return _shifted(base, factors, self.lowest, snapshot)

    def to_action(
        self, limits: BatchLimits, base: BatchLimits, decoded: int
    ) -> tuple[float, float]:
        """The action that makes these limits of the base's; the nearest where none does.

        Args:
            limits: Asked for.
            base: What the base policy decided.
            decoded: Tokens of the decodes of that moment.
        """
        room, base_room = (each.max_num_batched_tokens - decoded for each in (limits, base))
        return (
            _log_ratio(limits.max_num_seqs, base.max_num_seqs, self.seqs_span),
            _log_ratio(room, base_room, self.tokens_span),
        )


@dataclass(frozen=True, slots=True)
class ResidualGrid:
    """A few pairs of factors for a base policy's limits: the discrete form of `ResidualScale`.

    Number i stands for the pair (seqs_factors[i // n], tokens_factors[i % n]), n the number of
    token factors.

    Attributes:
        seqs_factors: Factors of `max_num_seqs`.
        tokens_factors: Factors of the room for prompts in `max_num_batched_tokens`.
        lowest: Fewest sequences, and prompt tokens beside the decodes, an action may lead to.

    Raises:
        ConfigError: A factor that is not a finite number above 0, one given twice, or no pair
            (1, 1), which is the base itself.
    """

    seqs_factors: tuple[float, ...]
    tokens_factors: tuple[float, ...]
    lowest: BatchLimits = BatchLimits(1, 1)

    def __post_init__(self) -> None:
        """Checks every factor."""
        for name in ("seqs_factors", "tokens_factors"):
            factors = getattr(self, name)
            if not all(math.isfinite(factor) and factor > 0 for factor in factors):
                raise ConfigError(f"{name}={factors!r} must be finite numbers above 0")
            if len(set(factors)) != len(factors) or 1.0 not in factors:
                raise ConfigError(f"{name}={factors!r} must differ, with 1 among them")

    @property
    def size(self) -> int:
        """How many actions there are."""
        return len(self.seqs_factors) * len(self.tokens_factors)

    @property
    def neutral(self) -> int:
        """The action that leaves the base as it is."""
        seqs = self.seqs_factors.index(1.0) * len(self.tokens_factors)
        return seqs + self.tokens_factors.index(1.0)

    def factors(self, action: int) -> tuple[float, float]:
        """The pair behind a number.

        Raises:
            ValueError: There is none.
        """
        if not 0 <= action < self.size:
            raise ValueError(f"action={action} must be a whole number from 0 to {self.size - 1}")
        seqs, tokens = divmod(int(action), len(self.tokens_factors))
        return self.seqs_factors[seqs], self.tokens_factors[tokens]

    def to_limits(self, action: int, base: Decision, snapshot: EngineSnapshot) -> BatchLimits:
        """The limits an action asks for.

        Raises:
            ValueError: There is no such action.
        """
        return _shifted(base, self.factors(action), self.lowest, snapshot)


@dataclass(frozen=True)
class ActionDesign:
    """Which of the three mappings an agent was trained with, and its numbers.

    Attributes:
        design: `absolute`, `residual` or `grid`.
        min_num_seqs: Least `max_num_seqs` an action may lead to.
        min_num_batched_tokens: Least `max_num_batched_tokens` an action may lead to; relative to a
            base, least room for prompts in it.
        seqs_span: Of `ResidualScale`.
        tokens_span: Of `ResidualScale`.
        seqs_factors: Of `ResidualGrid`.
        tokens_factors: Of `ResidualGrid`.

    Raises:
        ConfigError: An unknown design, or numbers that do not fit it.
    """

    design: Design = "residual"
    min_num_seqs: int = 1
    min_num_batched_tokens: int = 64
    seqs_span: float = 2.0
    tokens_span: float = 8.0
    seqs_factors: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
    tokens_factors: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        """Checks every number, also those that this design does not use."""
        if self.design not in get_args(Design):
            known = ", ".join(get_args(Design))
            raise ConfigError(f"action design {self.design!r} is not one of: {known}")
        for name in ("min_num_seqs", "min_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        ResidualScale(self.seqs_span, self.tokens_span)
        ResidualGrid(self.seqs_factors, self.tokens_factors)

    @cached_property
    def lowest(self) -> BatchLimits:
        """Least limits an action may lead to."""
        return BatchLimits(self.min_num_seqs, self.min_num_batched_tokens)

    @cached_property
    def residual(self) -> ResidualScale:
        """The mapping of `residual`."""
        return ResidualScale(self.seqs_span, self.tokens_span, self.lowest)

    @cached_property
    def grid(self) -> ResidualGrid:
        """The mapping of `grid`."""
        return ResidualGrid(self.seqs_factors, self.tokens_factors, self.lowest)

    @property
    def output_size(self) -> int:
        """Numbers a model gives: two, or one a pair of factors, of which the greatest is meant."""
        return self.grid.size if self.design == "grid" else ACTION_SIZE

    @property
    def neutral(self) -> Action | None:
        """The action that is the base policy itself; None where there is none."""
        if self.design == "absolute":
            return None
        return self.grid.neutral if self.design == "grid" else (0.0, 0.0)

    def chosen(self, output: Sequence[float]) -> Action:
        """The action that a model's output stands for.

        Raises:
            ValueError: Another number of values than `output_size`, or one that is not finite.
        """
        if self.design != "grid":
            return checked_action(output)
        values = [float(value) for value in output]
        if len(values) != self.output_size or not all(map(math.isfinite, values)):
            raise ValueError(f"a model's output must be {self.output_size} finite numbers")
        return values.index(max(values))

    def to_limits(self, action: Action, base: Decision, snapshot: EngineSnapshot) -> BatchLimits:
        """The limits that an action asks for.

        Args:
            action: As `chosen` gives it.
            base: What the base policy decides in this step; `absolute` does not look at it.
            snapshot: Before the step.

        Raises:
            ValueError: No action of this design.
        """
        if isinstance(action, int):
            return self.grid.to_limits(action, base, snapshot)
        if self.design == "residual":
            return self.residual.to_limits(action, base, snapshot)
        return self._absolute(action, snapshot.engine)

    def wanted_seqs(self, action: Action, base: Decision, engine: EngineFacts) -> int | None:
        """What `to_limits` would make of `max_num_seqs` if nothing ran: `Decision.wanted_seqs`.

        Args:
            action: As for `to_limits`.
            base: As for `to_limits`.
            engine: The snapshot's.
        """
        if isinstance(action, int):
            factor = self.grid.factors(action)[0]
        elif self.design == "residual":
            factor = math.pow(self.seqs_span, checked_action(action)[0])
        else:
            return None
        return _shifted_seqs(base, factor, self.min_num_seqs, engine.startup_limits.max_num_seqs)

    def _absolute(self, action: Sequence[float], engine: EngineFacts) -> BatchLimits:
        """`ActionScale`, also for an engine whose start-up value leaves nothing to choose."""
        highest, values = engine.startup_limits, checked_action(action)
        seqs, tokens = highest.max_num_seqs, highest.max_num_batched_tokens
        return BatchLimits(
            _scaled(values[0], min(self.min_num_seqs, seqs), seqs),
            _scaled(values[1], min(self.min_num_batched_tokens, tokens), tokens),
        )


def checked_action(action: Sequence[float]) -> tuple[float, float]:
    """Two finite numbers, each the nearest in [-1, 1].

    Raises:
        ValueError: Not two finite numbers.
    """
    values = [float(value) for value in action]
    if len(values) != ACTION_SIZE or not all(map(math.isfinite, values)):
        raise ValueError(f"action={values} must be {ACTION_SIZE} finite numbers in [-1, 1]")
    return min(max(values[0], -1.0), 1.0), min(max(values[1], -1.0), 1.0)


def _shifted(
    base: Decision, factors: tuple[float, float], lowest: BatchLimits, snapshot: EngineSnapshot
) -> BatchLimits:
    """The base's limits shifted by the factors; a factor of 1 leaves a limit untouched.

    A base that shuts the door decides on what runs. A share more than that would let in as many
    again in each step, so what counts is what it wanted; where that is not known the door stays
    shut.
    """
    if base.is_whole:
        return base.limits
    highest = snapshot.engine.startup_limits
    seqs = base.limits.max_num_seqs
    if factors[0] != 1.0:
        wanted = _shifted_seqs(base, factors[0], lowest.max_num_seqs, highest.max_num_seqs)
        if wanted:
            seqs = max(wanted, min(snapshot.running, highest.max_num_seqs))
    tokens = base.limits.max_num_batched_tokens
    decoded = snapshot.decode_tokens(snapshot.decode_seqs)
    if tokens > decoded:
        most = highest.max_num_batched_tokens - decoded
        room = _multiplied(tokens - decoded, factors[1], lowest.max_num_batched_tokens, most)
        tokens = decoded + room
    return BatchLimits(seqs, tokens)


def _shifted_seqs(base: Decision, factor: float, lowest: int, highest: int) -> int:
    """What a factor makes of the sequences that the base wanted; 0 where nobody knows those."""
    wanted = base.limits.max_num_seqs if base.wanted_seqs is None else base.wanted_seqs
    return wanted if base.is_whole or not wanted else _multiplied(wanted, factor, lowest, highest)


def _log_ratio(value: int, base: int, span: float) -> float:
    """The a in [-1, 1] that makes value of base, as base span^a, where both are at least 1."""
    return min(max(math.log(max(value, 1) / max(base, 1)) / math.log(span), -1.0), 1.0)


def _multiplied(value: int, factor: float, low: int, high: int) -> int:
    if factor == 1.0:
        return value
    return min(max(round(value * factor), low), high)
