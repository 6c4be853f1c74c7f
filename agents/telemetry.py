"""What happened in an interval: step records summed into a window, in the hook and elsewhere.

A window holds sums and peaks only, so that windows can be added, sent and stored; its properties
turn them into means and shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from batchpilot.agents.limits import BatchLimits, Binding, EngineSnapshot, StepRecord


@dataclass(frozen=True, slots=True)
class TelemetryWindow:
    """Step records summed over an interval, and the engine at its end.

    Attributes:
        seconds: Engine time it spans, idle time included.
        steps: Engine steps with a result in it.
        busy_seconds: Their time.
        slowest_step_seconds: The longest of them.
        decode_tokens: Tokens its decodes gave: sequences that decoded, summed over steps.
        decode_seconds: Step time, counted once for each sequence that decoded: over
            `decode_tokens` it is the mean inter-token latency.
        slow_decode_tokens: Those of `decode_tokens` whose step took longer than the ITL target.
        prefill_tokens: Prompt tokens computed, recomputed ones included.
        running_seconds: Sequences in RUNNING times step time: over `busy_seconds` their mean.
        kv_token_seconds: KV tokens held times step time.
        peak_running: Most sequences in RUNNING in a step.
        peak_kv_tokens: Most KV tokens held in a step.
        preemptions: Sequences preempted.
        recomputed_tokens: KV tokens those preemptions threw away.
        arrived: Requests that came.
        arrived_prompt_tokens: Their prompts.
        finished: Requests that left, aborted ones included.
        finished_output_tokens: Tokens they had generated.
        kv_bound_steps: Steps in which KV blocks kept the next request out.
        seqs_bound_steps: Steps in which `max_num_seqs` did.
        tokens_bound_steps: Steps in which `max_num_batched_tokens` did.
        running: Sequences in RUNNING at its end.
        waiting: Requests waiting at its end.
        prefill_seqs: Sequences in RUNNING that had not finished their prompt at its end.
        used_blocks: KV blocks in use at its end.
        limits: The limits at its end.
    """

    seconds: float
    steps: int
    busy_seconds: float
    slowest_step_seconds: float
    decode_tokens: int
    decode_seconds: float
    slow_decode_tokens: int
    prefill_tokens: int
    running_seconds: float
    kv_token_seconds: float
    peak_running: int
    peak_kv_tokens: int
    preemptions: int
    recomputed_tokens: int
    arrived: int
    arrived_prompt_tokens: int
    finished: int
    finished_output_tokens: int
    kv_bound_steps: int
    seqs_bound_steps: int
    tokens_bound_steps: int
    running: int
    waiting: int
    prefill_seqs: int
    used_blocks: int
    limits: BatchLimits

    def __add__(self, later: TelemetryWindow) -> TelemetryWindow:
        """This window and the one right after it, as one."""
        return TelemetryWindow(
            **{
                item.name: _JOIN.get(item.name, _sum)(
                    getattr(self, item.name), getattr(later, item.name)
                )
                for item in fields(self)
            }
        )

    @property
    def mean_step_seconds(self) -> float | None:
        """Mean time of a step; None without one."""
        return self.busy_seconds / self.steps if self.steps else None

    @property
    def mean_itl_seconds(self) -> float | None:
        """Mean time between a sequence's tokens; None where nothing decoded."""
        return self.decode_seconds / self.decode_tokens if self.decode_tokens else None

    @property
    def mean_running(self) -> float:
        """Sequences in RUNNING, averaged over the time of the steps."""
        return self.running_seconds / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def mean_kv_tokens(self) -> float:
        """KV tokens held, averaged over the time of the steps."""
        return self.kv_token_seconds / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def computed_tokens(self) -> int:
        """Tokens the steps computed, prompts and outputs."""
        return self.decode_tokens + self.prefill_tokens

    @property
    def recomputed_share(self) -> float:
        """Of the tokens computed and to be computed again, those to be computed again."""
        whole = self.recomputed_tokens + self.computed_tokens
        return self.recomputed_tokens / whole if whole else 0.0


def _sum(earlier: Any, later: Any) -> Any:
    return earlier + later


def _later(earlier: Any, later: Any) -> Any:
    del earlier
    return later


_JOIN: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("slowest_step_seconds", "peak_running", "peak_kv_tokens"), max),
    **dict.fromkeys(("running", "waiting", "prefill_seqs", "used_blocks", "limits"), _later),
}


@dataclass(slots=True)
class _Sums:
    """A window in the making: what `TelemetryWindow` sums, under the same names."""

    steps: int = 0
    busy_seconds: float = 0.0
    slowest_step_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    slow_decode_tokens: int = 0
    prefill_tokens: int = 0
    running_seconds: float = 0.0
    kv_token_seconds: float = 0.0
    peak_running: int = 0
    peak_kv_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    arrived: int = 0
    arrived_prompt_tokens: int = 0
    finished: int = 0
    finished_output_tokens: int = 0
    kv_bound_steps: int = 0
    seqs_bound_steps: int = 0
    tokens_bound_steps: int = 0


class WindowBuilder:
    """Sums step records, O(1) each, and closes one window after another.

    Args:
        itl_slo_seconds: Steps longer than this are slow; None: none is.
    """

    def __init__(self, itl_slo_seconds: float | None = None) -> None:
        """Starts an empty window."""
        self._slow_seconds = math.inf if itl_slo_seconds is None else itl_slo_seconds
        self._sums = _Sums()

    @property
    def steps(self) -> int:
        """Steps in the window so far."""
        return self._sums.steps

    def add(self, step: StepRecord) -> None:
        """Takes in a step."""
        sums, seconds, decode_seqs = self._sums, step.seconds, step.decode_seqs
        sums.steps += 1
        sums.busy_seconds += seconds
        sums.slowest_step_seconds = max(sums.slowest_step_seconds, seconds)
        sums.decode_tokens += decode_seqs
        sums.decode_seconds += decode_seqs * seconds
        if seconds > self._slow_seconds:
            sums.slow_decode_tokens += decode_seqs
        sums.prefill_tokens += step.prefill_tokens
        sums.running_seconds += step.running * seconds
        sums.kv_token_seconds += step.kv_tokens * seconds
        sums.peak_running = max(sums.peak_running, step.running)
        sums.peak_kv_tokens = max(sums.peak_kv_tokens, step.kv_tokens)
        sums.preemptions += step.preemptions
        sums.recomputed_tokens += step.recomputed_tokens
        self._count_binding(step.binding)
        if step.arrived or step.finished:
            self._count_requests(step)

    def close(
        self, snapshot: EngineSnapshot, *, seconds: float, limits: BatchLimits
    ) -> TelemetryWindow:
        """Ends the window and starts the next.

        Args:
            snapshot: The engine now.
            seconds: Engine time since the window was started.
            limits: The limits in force.
        """
        sums, self._sums = self._sums, _Sums()
        return TelemetryWindow(
            seconds=seconds,
            running=snapshot.running,
            waiting=snapshot.waiting,
            prefill_seqs=snapshot.prefill_seqs,
            used_blocks=snapshot.used_blocks,
            limits=limits,
            **asdict(sums),
        )

    def _count_binding(self, binding: Binding) -> None:
        sums = self._sums
        if binding is Binding.KV_CACHE:
            sums.kv_bound_steps += 1
        elif binding is Binding.MAX_NUM_SEQS:
            sums.seqs_bound_steps += 1
        elif binding is Binding.TOKEN_BUDGET:
            sums.tokens_bound_steps += 1

    def _count_requests(self, step: StepRecord) -> None:
        sums = self._sums
        sums.arrived += len(step.arrived)
        sums.arrived_prompt_tokens += sum(step.arrived)
        sums.finished += len(step.finished)
        sums.finished_output_tokens += sum(request.output_tokens for request in step.finished)
