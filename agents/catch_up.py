"""When the queue is caught up with at any pace, since that costs those who run little."""

from __future__ import annotations

import math

from batchpilot.agents.limits import EngineSnapshot
from batchpilot.agents.pace import MeanPace
from batchpilot.agents.prefill_queue import PrefillQueue
from batchpilot.agents.step_time import PromptsAhead, StepTimeEstimator

#: Share of those who run whose first token was late, from which on their pace is worth little.
MOST_LOST = 0.5
#: For their sake it begins where all who wait can be computed within this share of the target,
#: arrivals aside: a queue that takes longer has gained as many by then.
SOON = 1.0
#: And ends once the oldest has waited for no more than this share of it: those behind have time.
IN_TIME = 0.5


class CatchUp:
    """Whether everybody is let in and computed at once, whatever that does to the pace.

    Served first come, first served, a queue that has grown beyond the target makes every first
    token late until it is gone, and at the target's own pace, near capacity, that takes very long.
    Those who run then are mostly those whose first token was late: keeping the pace for them brings
    nobody inside the targets. Or they have come so fast so far that their mean pace stays inside
    the target whatever a few steps take.

    Formula: with each first token the lost share L moves by (late - L) / N, as if any one of the N
    who run had made room. The work of all who wait takes k steps as long as the start-up token
    budget makes them. Once the oldest is too late, and either L >= `MOST_LOST` and those k take no
    more than `SOON` of the target, or the mean pace affords all of them (see `MeanPace`), the pace
    is given up, until nobody has waited for more than `IN_TIME` of the target.

    Limitations: who still was in time and runs beside the others may lose its pace. Where far more
    comes than the engine can take at any pace, the queue is never short enough, nor the mean pace
    ever good enough, and the pace stays.

    Attributes:
        is_on: Whether the pace is given up.
    """

    def __init__(self, queue: PrefillQueue, step_time: StepTimeEstimator, pace: MeanPace) -> None:
        """Starts with nobody lost.

        Args:
            queue: Who waits for a first token; its owner shows it the steps.
            step_time: Learned elsewhere.
            pace: Mean pace of decoding; its owner shows it the steps.
        """
        self._queue = queue
        self._step_time = step_time
        self._pace = pace
        self._lost_share = 0.0
        self._first_tokens = self._late_first_tokens = 0
        self.is_on = False

    def update(self, snapshot: EngineSnapshot) -> None:
        """Takes in the newest first tokens, before each step, and ends it where it is done."""
        given = self._queue.first_tokens - self._first_tokens
        if given:
            late = self._queue.late_first_tokens - self._late_first_tokens
            self._first_tokens += given
            self._late_first_tokens += late
            self._lost_share += (late - given * self._lost_share) / max(snapshot.running, given)
        if self.is_on:
            wait = self._queue.oldest_wait(snapshot.clock_seconds)
            self.is_on = snapshot.waiting > 0 and wait > IN_TIME

    def consider(self, snapshot: EngineSnapshot, prompts: PromptsAhead) -> None:
        """Begins where it is worth it.

        Args:
            snapshot: Before a step, somebody waiting.
            prompts: That the step will meet.
        """
        if self._queue.oldest_wait(snapshot.clock_seconds) < 1.0:
            return
        steps, step_seconds = self._until_gone(snapshot, prompts)
        is_soon = steps * step_seconds <= SOON * self._queue.target_seconds
        is_lost = is_soon and self._lost_share >= MOST_LOST
        self.is_on = is_lost or self._pace.affords(step_seconds, steps=max(steps, 1.0))

    def _until_gone(self, snapshot: EngineSnapshot, prompts: PromptsAhead) -> tuple[float, float]:
        """Longest steps there are until all who wait are computed, if nobody else came; seconds."""
        decodes, engine = snapshot.decode_seqs, snapshot.engine
        kv_tokens = snapshot.used_blocks * engine.block_size
        tokens = engine.startup_limits.max_num_batched_tokens - snapshot.decode_tokens(decodes)
        if tokens < 1:
            return math.inf, 1.0
        attention = self._step_time.attention_tokens
        step_work = tokens + attention * prompts.squares(tokens)
        steps = self._queue.backlog_work(attention) / step_work
        return steps, self._step_time.predict(decodes, tokens, kv_tokens, prompts)
