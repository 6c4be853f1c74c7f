"""When a step may be slow for the sake of first tokens that would come too late, and how often."""

from __future__ import annotations

from batchpilot.agents.late_gaps import LateGapBudget
from batchpilot.agents.limits import EngineSnapshot, StepRecord
from batchpilot.agents.pace import MeanPace
from batchpilot.agents.prefill_queue import PrefillQueue
from batchpilot.agents.step_time import StepTimeEstimator

#: A slow step takes so many times what others aim at. Few long ones make fewer gaps late than many
#: short ones for the same prompt tokens; longer ones yet would be felt by a short answer.
SLOW_STEP = 3.0
#: Share of the time to the first token that is planned with.
TTFT_AIM = 0.9


class SlowSteps:
    """Buys first tokens with late gaps: as few as it takes, and evenly spread.

    Formula: r is the pace, in prompt tokens a second, at which all who can be in time are. A usual
    step of c seconds and P tokens lacks r c - P of it; a slow one, of s = `SLOW_STEP` c seconds and
    Q tokens, brings Q - r s more. What steps lack adds up, and each time it comes to what a slow
    one brings, one is made, if either the late gaps that a 99th percentile leaves open or the mean
    pace pays for it. So first tokens come just in time, and answers that begin in a burst share
    its slow steps: all at once they would fall on those who are there, however short.

    Attributes:
        queue: Who waits for a first token.
    """

    def __init__(
        self,
        itl_slo_seconds: float,
        ttft_slo_seconds: float,
        late_gaps: LateGapBudget,
        step_time: StepTimeEstimator,
    ) -> None:
        """Starts with nobody waiting and nothing to spend.

        Args:
            itl_slo_seconds: Target between tokens.
            ttft_slo_seconds: Target for the first one.
            late_gaps: What may be late; its owner shows it the steps.
            step_time: Learned elsewhere.
        """
        self.queue = PrefillQueue(ttft_slo_seconds)
        self._late_gaps = late_gaps
        self._step_time = step_time
        self._pace = MeanPace(itl_slo_seconds)
        self._lacking = 0.0

    def set_life(self, output_tokens: float) -> None:
        """Takes the mean length of outputs in."""
        self._pace.set_life(output_tokens)

    def observe(self, step: StepRecord) -> None:
        """Takes a step in."""
        self._pace.observe(step)
        self.queue.observe(step)

    def update(self, snapshot: EngineSnapshot) -> None:
        """Takes in who waits now, before each step."""
        self.queue.update(snapshot)

    def prefill(self, snapshot: EngineSnapshot, usual: int, kv_tokens: int, aim: float) -> int:
        """Prompt tokens of the step about to be scheduled, if it is to be slow; else 0.

        Args:
            snapshot: Before the step.
            usual: Prompt tokens of a step that takes `aim`.
            kv_tokens: Tokens in the KV cache.
            aim: Seconds a usual step may take.
        """
        tokens = 0
        if self.queue.backlog_tokens > usual:
            tokens = self._due(snapshot, usual, kv_tokens, aim)
        self._late_gaps.plan(snapshot.decode_seqs if tokens else 0)
        return tokens

    def _due(self, snapshot: EngineSnapshot, usual: int, kv_tokens: int, aim: float) -> int:
        decodes, engine = snapshot.decode_seqs, snapshot.engine
        slow = SLOW_STEP * aim
        many = self._step_time.largest_prefill(decodes, kv_tokens, slow)
        most = engine.startup_limits.max_num_batched_tokens - decodes * engine.tokens_per_decode
        if many > most:
            many, slow = most, self._step_time.predict(decodes, most, kv_tokens)
        now = snapshot.clock_seconds
        needed = self.queue.pace_needed(now, share=TTFT_AIM, at_most=many / slow)
        lacking = needed * aim - usual
        if lacking <= 0:
            self._lacking = 0.0
            return 0
        if not (self._late_gaps.allows(decodes) or self._pace.affords(slow)):
            return 0
        self._lacking += lacking
        brings = many - needed * slow
        if self._lacking < brings:
            return 0
        self._lacking -= brings
        return many
