"""How much of the KV cache a sequence holds: not every layer keeps every token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class KvGrowth(NamedTuple):
    """KV tokens of a sequence, by its context; one is a token in every layer.

    Layers that attend to everything keep every token. Layers with a sliding window, as five of six
    in Gemma 3, keep the newest; Mamba layers keep one state. A sequence of c tokens holds

        share c + (1 - share) min(c, window_tokens)

    Attributes:
        share: Layers that keep every token, as a share of the groups of layers that have blocks of
            their own.
        window_tokens: What the others keep, on average.
    """

    share: float = 1.0
    window_tokens: int = 0

    def held(self, context: Floats) -> Floats:
        """KV tokens of sequences with so many tokens of context; any shape."""
        if self.share == 1.0:
            return context
        return self.share * context + (1 - self.share) * np.minimum(context, self.window_tokens)

    def of_one(self, context: float) -> float:
        """KV tokens of one sequence with so many tokens of context."""
        return float(self.held(np.asarray(context, dtype=np.float64)))

    def per_token(self, context: float) -> float:
        """KV tokens that one token more takes there."""
        return 1.0 if context < self.window_tokens else self.share

    def grown(self, context: Floats, steps: Floats) -> Floats:
        """KV tokens that they hold more so many decode steps later; shapes broadcast."""
        if self.share == 1.0:
            return steps
        return self.held(context + steps) - self.held(context)


EVERY_TOKEN = KvGrowth()
