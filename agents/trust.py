"""Whether a learned step time may decide, and up to which prefill."""

from __future__ import annotations

import math
from typing import NamedTuple

from batchpilot.agents.limits import StepRecord
from batchpilot.agents.step_time import PromptsAhead, StepTimeEstimator

#: The model is trusted once its stated error where it would work, and the mean of its innovations,
#: are below the first, and doubted again once one of them is above the second; and never while the
#: noise is above the third.
TRUSTED_ERROR, DOUBTED_ERROR = 0.1, 0.2
TOO_NOISY = 0.5


class WorkingPoint(NamedTuple):
    """A step as the model would have it.

    Attributes:
        decode_seqs: Sequences that decode in it.
        kv_tokens: Tokens in the KV cache.
        prefill_tokens: Prompt tokens in it, at most.
        prompts: Whose tokens they are.
    """

    decode_seqs: int
    kv_tokens: int
    prefill_tokens: int
    prompts: PromptsAhead


class Trust:
    """Up to which prefill the learned step time decides.

    Criterion: the noise is no more than `TOO_NOISY`, and the mean of the innovations and the stated
    error of a step without prompts, and of one with the largest prefill that it would choose, are
    within `TRUSTED_ERROR` (`DOUBTED_ERROR` once it is trusted).

    Until then prefill starts slowly: from the least chunk it doubles while the target is kept, and
    halves when it is not, which shows the model what it has to know. But where few prompts come at
    a time, since they are short or the batch is full, no step ever shows it, and what it once knew
    is forgotten. So where all but the last holds, and the largest batch is known as well, it is
    trusted with the largest half, quarter or so of that prefill whose error is within the bound.

    Attributes:
        known_prefill: Prompt tokens of a step that it is trusted with: 0 if with none, infinite if
            with any that it would choose.
        kept_so_far: Prompt tokens of a step that has kept the target so far.
    """

    def __init__(
        self, step_time: StepTimeEstimator, itl_slo_seconds: float, least_chunk: int
    ) -> None:
        """Starts in doubt.

        Args:
            step_time: Learned elsewhere.
            itl_slo_seconds: Target between tokens.
            least_chunk: Prompt tokens that a step always has room for.
        """
        self._step_time = step_time
        self._target = itl_slo_seconds
        self._least_chunk = self.kept_so_far = least_chunk
        self.known_prefill = 0.0

    @property
    def is_any(self) -> bool:
        """Whether it decides at all."""
        return self.known_prefill > 0

    @property
    def is_whole(self) -> bool:
        """Whether it decides whatever it would choose."""
        return self.known_prefill == math.inf

    @property
    def most_prefill(self) -> int:
        """Prompt tokens of a step that are known well enough or have kept the target so far."""
        return max(self.kept_so_far, int(self.known_prefill))

    def observe(self, step: StepRecord) -> None:
        """Learns from a step how much keeps the target, while the model does not know."""
        if self.is_whole or not step.regular:
            return
        if step.seconds > self._target:
            self.kept_so_far = max(self._least_chunk, self.kept_so_far // 2)
        elif 2 * step.prefill_tokens >= self.kept_so_far:
            self.kept_so_far *= 2

    def update(self, point: WorkingPoint, largest: WorkingPoint) -> None:
        """Looks again; some tens of microseconds.

        Args:
            point: Of the next step, with the largest prefill that the model would choose.
            largest: Of the largest batch there can be now.
        """
        self.known_prefill = self._find(point, largest)

    def _find(self, point: WorkingPoint, largest: WorkingPoint) -> float:
        model = self._step_time
        bound = DOUBTED_ERROR if self.is_any else TRUSTED_ERROR
        if not model.has_weights or model.noise > TOO_NOISY or abs(model.bias) > bound:
            return 0.0
        if not self._knows(point._replace(prefill_tokens=0), bound):
            return 0.0
        if self._knows(point, bound):
            return math.inf
        if not self._knows(largest, bound):
            return 0.0
        prefill = point.prefill_tokens
        while prefill > self._least_chunk:
            prefill = max(prefill // 2, self._least_chunk)
            if self._knows(point._replace(prefill_tokens=prefill), bound):
                return float(prefill)
        return 0.0

    def _knows(self, point: WorkingPoint, bound: float) -> bool:
        decodes, kv_tokens, prefill, prompts = point
        return self._step_time.relative_error(decodes, prefill, kv_tokens, prompts) <= bound
