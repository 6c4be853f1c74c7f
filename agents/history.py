"""The newest observations side by side: what a model without memory sees of the past."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

Floats32 = npt.NDArray[np.float32]


class ObservationHistory:
    """Stacks the newest observations, oldest first.

    The first one fills the whole history, so that an agent never sees a past that was not.

    Args:
        length: How many; 1 is the newest alone.
    """

    def __init__(self, length: int) -> None:
        """Starts empty."""
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        self._length = length
        self._kept: deque[Floats32] = deque(maxlen=length)

    def push(self, observation: Floats32) -> Floats32:
        """Takes in an observation, shape (n,); returns the stack, shape (length * n,)."""
        missing = self._length if not self._kept else 1
        self._kept.extend([observation] * missing)
        return np.concatenate(self._kept) if self._length > 1 else observation

    def clear(self) -> None:
        """Forgets everything: another episode begins."""
        self._kept.clear()
