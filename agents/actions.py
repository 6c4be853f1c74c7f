"""What an agent's action means: two numbers in [-1, 1] for the two limits, and back.

One place for the environment and for every policy that runs a trained model, so that an action
means in service what it meant in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.agents.parameters import ConfigError

ACTION_SIZE = 2


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
        values = [float(value) for value in action]
        if len(values) != ACTION_SIZE or not all(map(math.isfinite, values)):
            raise ValueError(f"action={values} must be {ACTION_SIZE} finite numbers in [-1, 1]")
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
