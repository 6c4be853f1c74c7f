"""When prompts are better computed together in a few long steps than a little in every step."""

from __future__ import annotations

from typing import NamedTuple

from batchpilot.agents.pace import MeanPace

#: Slow steps must make prompt tokens so many times as cheap as usual ones, on average over so many
#: looks. None counts for more than `MOST_RATIO`: single ones hang on the model's smallest weights.
WORTH = 1.2
RATIO_LOOKS = 32
MOST_RATIO = 2.0
#: Share of the newest steps that prompts have made as long as the target allows: below it, they
#: keep up without. At 0.5, late gaps come where the target could still be held (RTX 4090, short
#: chats).
BUSY = 0.6
#: Share of the target that the mean pace may reach: the whole of it, evenly spread.
PACE_AIM = 1.0


class StepOption(NamedTuple):
    """A way to make the next step.

    Attributes:
        seconds: It takes.
        prompt_tokens: It computes.
    """

    seconds: float
    prompt_tokens: int


class Bunches:
    """Whether prompts wait for each other, and whether those who wait are due.

    Formula: beside the decodes of now a step takes d seconds without prompts, c with the P prompt
    tokens that the target leaves, s with the Q of a slow one. A prompt token costs those who decode
    (c - d) / P seconds or (s - d) / Q, and where any prompt at all makes the attention of a step
    slower, the second can be half the first. So, from the moment that

        rho > `WORTH`   and   m - d > `BUSY` (c - d),   rho the mean of Q (c - d) / (P (s - d))

    until a usual step takes all who wait, or rho is below 1, nobody is let in but into a slow step,
    and one is made whenever the mean pace m stays inside the target, and for as long as a prompt
    has begun and is not done: it is in every step anyway, and makes each of them slower. The second
    condition, that at least so many of the newest steps were full of prompts, keeps the pace of
    single tokens for as long as prompts keep up with it.

    Regimes: where decoding alone misses the target, no step of any length keeps the mean pace, and
    prompts come in as they do without all this.

    Limitations: once the target leaves no more than the least chunk, nothing is learned and what
    was decided stays.
    """

    def __init__(self, pace: MeanPace, least_chunk: int) -> None:
        """Starts with everybody let in as they come.

        Args:
            pace: Mean pace of decoding; its owner shows it the steps.
            least_chunk: Prompt tokens that a usual step has even where the target leaves fewer.
        """
        self._pace = pace
        self._least_chunk = least_chunk
        self._ratio = 1.0
        self.is_bunching = False

    def end(self) -> None:
        """A usual step takes all who wait, nobody knows what one costs, or none keeps the pace."""
        self.is_bunching = False

    def update(self, decode_seconds: float, usual: StepOption, slow: StepOption) -> None:
        """Begins to bunch where that is worth it, and goes on while it is.

        Args:
            decode_seconds: Of a step without prompts.
            usual: A step as long as the target allows.
            slow: One that is longer.
        """
        usual_delay, slow_delay = usual.seconds - decode_seconds, slow.seconds - decode_seconds
        if usual_delay <= 0:
            self.end()
            return
        if usual.prompt_tokens <= self._least_chunk or slow_delay <= 0:
            return
        ratio = slow.prompt_tokens * usual_delay / (usual.prompt_tokens * slow_delay)
        self._ratio += (min(ratio, MOST_RATIO) - self._ratio) / RATIO_LOOKS
        if self.is_bunching:
            self.is_bunching = self._ratio > 1.0
            return
        is_busy = self._pace.mean_seconds - decode_seconds > BUSY * usual_delay
        self.is_bunching = is_busy and self._ratio > WORTH

    def is_due(self, slow: StepOption) -> bool:
        """Whether the next step may be the slow one."""
        return self._pace.affords(slow.seconds, PACE_AIM)
