"""The mean pace of decoding lately: what a request's time per token comes out as."""

from __future__ import annotations

from batchpilot.agents.limits import StepRecord

#: Share of the target that the mean pace may reach: requests live through different stretches.
PACE_AIM = 0.92
#: Steps averaged over before it is known how long outputs are, and the least number ever.
FIRST_LIFE_STEPS, SHORTEST_LIFE_STEPS = 128.0, 32.0


class MeanPace:
    """Whether slow steps still leave the mean time per token inside the target.

    Formula: m <- m + (t - m) / n at every step with a decode, n the tokens of half a mean output. k
    steps of t seconds are affordable while t + (m - t) (1 - 1/n)^k is at most the share of the
    target that their buyer allows. A request is judged by its mean over n steps or so: what quiet
    stretches saved, a burst may spend.

    Limitations: outputs much shorter than the mean live through a burst alone and miss the target.
    """

    def __init__(self, target_seconds: float) -> None:
        """Starts with nothing saved."""
        self._target = target_seconds
        self._mean = target_seconds
        self._gain = 1 / FIRST_LIFE_STEPS

    @property
    def mean_seconds(self) -> float:
        """Mean time of a step with a decode in it, over about a mean output."""
        return self._mean

    def set_life(self, output_tokens: float) -> None:
        """Averages over so many steps from now on."""
        self._gain = 1 / max(output_tokens / 2, SHORTEST_LIFE_STEPS)

    def observe(self, step: StepRecord) -> None:
        """Takes a step in."""
        if step.decode_seqs:
            self._mean += self._gain * (step.seconds - self._mean)

    def affords(self, seconds: float, share: float = PACE_AIM, steps: float = 1.0) -> bool:
        """Whether so many steps that take so long leave the mean at this share of the target."""
        kept: float = (1 - self._gain) ** steps
        return seconds + (self._mean - seconds) * kept <= share * self._target
