"""When a step may be slow for the sake of first tokens that would come too late, and how often."""

from __future__ import annotations

import math

from batchpilot.agents.bunches import Bunches, StepOption
from batchpilot.agents.catch_up import CatchUp
from batchpilot.agents.late_gaps import LateGapBudget
from batchpilot.agents.limits import EngineSnapshot, StepRecord
from batchpilot.agents.pace import MeanPace
from batchpilot.agents.prefill_queue import PaceNeeded, PrefillQueue
from batchpilot.agents.prefix_hits import PrefixHits
from batchpilot.agents.step_time import PromptsAhead, StepTimeEstimator

#: A slow step takes so many times what others aim at. Few long ones make fewer gaps late than many
#: short ones for the same prompt tokens; longer ones yet would be felt by a short answer.
SLOW_STEP = 3.0
#: Share of the time to the first token that is planned with.
TTFT_AIM = 0.9
#: The rest is given to who can be in time only so, if all steps until then may be slow and still
#: leave the mean pace at no more than this share of its target.
HURRY_PACE = 0.7
#: Steps with a queue between two looks at whether prompts should wait for each other.
LOOK_STEPS = 8
#: Within this share of 1 the factor on the whole model is noise, and its weights are those of now.
SETTLED_SPEED = 0.1


class SlowSteps:
    """Buys first tokens with late gaps: as few as it takes, and evenly spread.

    Where long steps make prompt tokens much cheaper, and usual ones hardly keep up, prompts wait
    for each other instead: see `Bunches`.

    Formula: r is the pace, in prompt tokens a second, at which all who can be in time are. A usual
    step of c seconds and P tokens lacks r c - P of it; a slow one, of s = `SLOW_STEP` c seconds and
    Q tokens, brings Q - r s more. Tokens are work here: S of `StepTimeForm` is in them, as tokens
    that take as long. What steps lack adds up, and each time it comes to what a slow
    one brings, one is made, if either the late gaps that a 99th percentile leaves open or the mean
    pace pays for it. So first tokens come just in time, and answers that begin in a burst share
    its slow steps: all at once they would fall on those who are there, however short. r leaves a
    tenth of the target in reserve. Who can be in time only without it, if every step is slow from
    now on, has that where the mean pace pays for all of them and is far from its target.

    Attributes:
        queue: Who waits for a first token.
        catch_up: Whether all who wait are computed at once, and the pace is given up for that.
    """

    def __init__(
        self,
        itl_slo_seconds: float,
        ttft_slo_seconds: float,
        late_gaps: LateGapBudget,
        step_time: StepTimeEstimator,
        hits: PrefixHits,
        least_chunk: int,
    ) -> None:
        """Starts with nobody waiting and nothing to spend.

        Args:
            itl_slo_seconds: Target between tokens.
            ttft_slo_seconds: Target for the first one.
            late_gaps: What may be late; its owner shows it the steps.
            step_time: Learned elsewhere.
            hits: Of the prefix cache, learned elsewhere.
            least_chunk: Prompt tokens that a usual step has even where the target leaves fewer.
        """
        self.queue = PrefillQueue(ttft_slo_seconds, hits)
        self._late_gaps = late_gaps
        self._step_time = step_time
        self._pace = MeanPace(itl_slo_seconds)
        self.catch_up = CatchUp(self.queue, step_time, self._pace)
        self._bunches = Bunches(self._pace, least_chunk)
        self._lacking = 0.0
        self._steps_to_look = 0

    @property
    def keeps_out(self) -> bool:
        """Whether nobody is let in but into a slow step."""
        return self._bunches.is_bunching

    def set_life(self, output_tokens: float) -> None:
        """Takes the mean length of outputs in."""
        self._pace.set_life(output_tokens)

    def observe(self, step: StepRecord, *, keeps_pace: bool) -> None:
        """Takes a step in.

        Args:
            step: The newest.
            keeps_pace: False where the target between tokens was given up: what comes after is not
                to pay for it.
        """
        if keeps_pace:
            self._pace.observe(step)
        self.queue.observe(step)

    def update(self, snapshot: EngineSnapshot) -> None:
        """Takes in who waits now, before each step."""
        self.queue.update(snapshot)
        self.catch_up.update(snapshot)

    def prefill(
        self,
        snapshot: EngineSnapshot,
        usual: int,
        kv_tokens: int,
        aim: float,
        prompts: PromptsAhead,
    ) -> int:
        """Prompt tokens of the step about to be scheduled, if it is to be slow; else 0.

        Args:
            snapshot: Before the step.
            usual: Prompt tokens of a step that takes `aim`.
            kv_tokens: Tokens in the KV cache.
            aim: Seconds a usual step may take.
            prompts: That it will meet.
        """
        tokens = 0
        if self.queue.backlog_tokens > usual:
            tokens = self._tokens(snapshot, StepOption(aim, usual), kv_tokens, prompts)
        else:
            self._bunches.end()
        self._late_gaps.plan(snapshot.decode_seqs if tokens else 0)
        return tokens

    def _tokens(
        self, snapshot: EngineSnapshot, usual: StepOption, kv_tokens: int, prompts: PromptsAhead
    ) -> int:
        self._steps_to_look -= 1
        if self._steps_to_look <= 0:
            self._steps_to_look = LOOK_STEPS
            slow = self._slow_step(snapshot, usual.seconds, kv_tokens, prompts)
            self._look_at_bunches(snapshot.decode_seqs, usual, slow, kv_tokens)
        if not self._bunches.is_bunching:
            return self._tokens_needed(snapshot, usual, kv_tokens, prompts)
        slow = self._slow_step(snapshot, usual.seconds, kv_tokens, prompts)
        # A step with any of a prompt in it costs those who decode most of a slow one already.
        has_begun = snapshot.prompt_computed > 0 and snapshot.prompt_left > 0
        due = has_begun or self._bunches.is_due(slow)
        return self.queue.whole_prompts(slow.prompt_tokens) if due else 0

    def _look_at_bunches(
        self, decode_seqs: int, usual: StepOption, slow: StepOption, kv_tokens: int
    ) -> None:
        if abs(self._step_time.speed - 1) < SETTLED_SPEED:
            decode_seconds = self._step_time.predict(decode_seqs, 0, kv_tokens)
            self._bunches.update(decode_seconds, usual, slow)
        else:
            self._bunches.end()

    def _slow_step(
        self, snapshot: EngineSnapshot, aim: float, kv_tokens: int, prompts: PromptsAhead
    ) -> StepOption:
        """As long as it may be, or as long as the start-up token budget makes it."""
        decodes, startup = snapshot.decode_seqs, snapshot.engine.startup_limits
        seconds = SLOW_STEP * aim
        tokens = self._step_time.largest_prefill(decodes, kv_tokens, seconds, prompts)
        most = startup.max_num_batched_tokens - snapshot.decode_tokens(decodes)
        if tokens > most:
            return StepOption(self._step_time.predict(decodes, most, kv_tokens, prompts), most)
        return StepOption(seconds, tokens)

    def _tokens_needed(
        self, snapshot: EngineSnapshot, usual: StepOption, kv_tokens: int, prompts: PromptsAhead
    ) -> int:
        """Those of a slow step, if what usual ones lacked adds up to one that can be paid for."""
        now, usual_work = snapshot.clock_seconds, self._work(usual, prompts)
        # Mostly usual steps are fast enough even for those who would be given up.
        if self._pace_needed(now, math.inf).pace * usual.seconds <= usual_work:
            self._lacking = 0.0
            return 0
        slow = self._slow_step(snapshot, usual.seconds, kv_tokens, prompts)
        slow_work = self._work(slow, prompts)
        pace, last_work = self._pace_needed(now, slow_work / slow.seconds)
        if last_work and self._pace.affords(slow.seconds, HURRY_PACE, last_work / slow_work):
            self._lacking = 0.0
            return slow.prompt_tokens
        lacking = pace * usual.seconds - usual_work
        if lacking <= 0:
            self._lacking = 0.0
            return 0
        in_budget = self._late_gaps.allows(snapshot.decode_seqs)
        if not (in_budget or self._pace.affords(slow.seconds)):
            return 0
        self._lacking += lacking
        brings = slow_work - pace * slow.seconds
        if self._lacking < brings:
            return 0
        self._lacking -= brings
        return slow.prompt_tokens

    def _work(self, step: StepOption, prompts: PromptsAhead) -> float:
        """Of a step's prompt tokens, in tokens: those that attend to more count for more."""
        attended = prompts.squares(step.prompt_tokens)
        return step.prompt_tokens + self._step_time.attention_tokens * attended

    def _pace_needed(self, now: float, at_most: float) -> PaceNeeded:
        attention = self._step_time.attention_tokens
        return self.queue.pace_needed(now, share=TTFT_AIM, at_most=at_most, attention=attention)
