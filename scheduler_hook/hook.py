"""What happens around each `schedule()`: snapshot, decide, shield, apply, and the step's record.

This is the hot path: O(1), little allocation, no lock, no wait. It never raises into vLLM: the
first exception in our code is logged once, the start-up limits come back, and from then on the
engine runs as stock vLLM.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    Decision,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    StepRecord,
    binding_constraint,
)
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shield import Clamp, SafetyBounds, shield
from batchpilot.scheduler_hook.vllm_adapter import StepContent, VllmAdapter

logger = logging.getLogger("vllm.batchpilot")

#: Steps after start whose time says little: kernels compile, graphs are captured, caches are cold.
WARM_UP_STEPS = 8
#: Nothing in flight for so long is a pause, whoever made it: what passed is no step's time.
PAUSE_SECONDS = 1.0
# Reading a member through its class takes longer than the comparison it is for.
_NO_CLAMP = Clamp.NONE


@dataclass(slots=True)
class HookStats:
    """Running totals; written by the engine's thread, read by the reporter's.

    Attributes:
        steps: Steps scheduled, by what kept the next request out.
        decisions: Decisions, by source.
        clamps: Decisions the shield changed, by reason.
        preemptions: Sequences preempted.
        recomputed_tokens: KV tokens those preemptions threw away.
        failures: Exceptions in our code (each ends the steering of this engine).
        hook_seconds: Time spent in our code.
    """

    steps: Counter[Binding] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    clamps: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    recomputed_tokens: int = 0
    failures: int = 0
    hook_seconds: float = 0.0


class _StepInFlight(NamedTuple):
    """A scheduled step whose result is not back yet."""

    output: object
    content: StepContent
    scheduled_at: float
    after_gap: bool
    binding: Binding


class Hook:
    """Steers one scheduler.

    Args:
        adapter: The scheduler's state and limits; None where it cannot be steered.
        policy: Decides before each step; None leaves the start-up limits.
        bounds: What the shield allows.
        applies: False to decide and report but change nothing (mode `observe`).
        passthrough_reason: Why the scheduler cannot be steered.
        clock: Engine time in seconds, monotonic.
    """

    def __init__(
        self,
        adapter: VllmAdapter | None,
        policy: LimitPolicy | None,
        *,
        bounds: SafetyBounds | None = None,
        applies: bool = True,
        passthrough_reason: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Starts with the start-up limits."""
        self.stats = HookStats()
        self.passthrough_reason = passthrough_reason
        self.decision: Decision | None = None
        self.last_content: StepContent | None = None
        self._adapter = adapter
        self._policy = policy
        self._bounds = bounds or SafetyBounds()
        self._applies = applies
        self._clock = clock
        self._listener: Callable[[StepRecord], None] | None = None
        self._active = adapter is not None
        self._limits = adapter.facts.startup_limits if adapter else BatchLimits(0, 0)
        self._block_size = adapter.facts.block_size if adapter else 0
        self._start_run()

    def _start_run(self) -> None:
        self._binding = Binding.NONE
        self._in_flight: deque[_StepInFlight] = deque()
        self._arrived: list[int] = []
        self._finished: list[FinishedRequest] = []
        self._preemptions = 0
        self._recomputed_tokens = 0
        self._gap = True
        self._returned_at = 0.0
        self._steps_seen = 0

    @property
    def active(self) -> bool:
        """Whether this engine is observed and, unless in mode `observe`, steered."""
        return self._active

    @property
    def policy(self) -> LimitPolicy | None:
        """What decides before each step; None leaves the start-up limits."""
        return self._policy

    @property
    def facts(self) -> EngineFacts:
        """What does not change while the engine runs.

        Raises:
            RuntimeError: The hook is a passthrough and knows nothing of the engine.
        """
        return self._require_adapter().facts

    @property
    def applied_limits(self) -> BatchLimits:
        """The limits of the newest step; the start-up ones unless they are steered."""
        return self._limits

    @property
    def binding(self) -> Binding:
        """What kept the next request out of the newest step."""
        return self._binding

    def snapshot(self) -> EngineSnapshot:
        """What the policy would see now."""
        return self._require_adapter().snapshot(self._clock(), self._binding)

    def set_policy(self, policy: LimitPolicy | None) -> None:
        """Steers by `policy` from the next step on; None restores the start-up limits.

        Call it on an idle engine, from the thread that runs its steps. The new policy hears nothing
        of what came before. Also ends the passthrough that an exception in an earlier policy
        caused.
        """
        adapter = self._require_adapter()
        adapter.restore()
        self._start_run()
        self._limits = adapter.facts.startup_limits
        self._policy = policy
        self.decision = None
        self.passthrough_reason = None
        self._active = True

    def set_listener(self, listener: Callable[[StepRecord], None] | None) -> None:
        """Hears every step's record, in order."""
        self._listener = listener

    def set_clock(self, clock: Callable[[], float]) -> None:
        """Replaces the clock: a simulation has its own time."""
        self._clock = clock
        self._gap = True

    def arriving(self, request: Any) -> None:
        """Before a request is queued."""
        if not self._active:
            return
        try:
            if self._require_adapter().is_new(request):
                self._arrived.append(request.num_prompt_tokens)
        except Exception:
            self._fail("add_request")

    def before_schedule(self) -> None:
        """Decides and applies the limits of the step about to be scheduled."""
        if not self._active:
            return
        started = time.perf_counter()
        try:
            self._steer()
        except Exception:
            self._fail("schedule")
        self.stats.hook_seconds += time.perf_counter() - started

    def preempting(self, request: Any) -> None:
        """Before a request is preempted."""
        if not self._active:
            return
        try:
            self._preemptions += 1
            self._recomputed_tokens += self._require_adapter().preempting(request)
        except Exception:
            self._fail("_preempt_request")

    def after_schedule(self, output: object) -> None:
        """Reads what the step holds."""
        if not self._active:
            return
        started = time.perf_counter()
        try:
            self._note_scheduled(output)
        except Exception:
            self._fail("schedule")
        self.stats.hook_seconds += time.perf_counter() - started

    def after_update(self, output: object) -> None:
        """Once a step's result is back: completes its record and shows it to the policy."""
        if not self._active:
            return
        started = time.perf_counter()
        try:
            self._note_returned(output)
        except Exception:
            self._fail("update_from_output")
        self.stats.hook_seconds += time.perf_counter() - started

    def _steer(self) -> None:
        adapter = self._require_adapter()
        adapter.before_schedule()
        policy = self._policy
        if policy is None:
            return
        snapshot = adapter.snapshot(self._clock(), self._binding)
        self.decision = decision = policy.decide(snapshot)
        limits, clamp = shield(decision.limits, snapshot, self._bounds)
        self.stats.decisions[decision.source] += 1
        if clamp is not _NO_CLAMP:
            self.stats.clamps[clamp] += 1
        if self._applies:
            self._limits = limits
            adapter.apply(limits)

    def _note_scheduled(self, output: object) -> None:
        content = self._require_adapter().after_schedule(output)
        self.last_content = content
        if content.finished:
            self._finished.extend(content.finished)
        if content.scheduled_tokens == 0:
            self._gap = True
            return
        limits = self._limits
        self._binding = binding = binding_constraint(
            running=content.running,
            waiting=content.waiting,
            max_num_seqs=self._most_running(limits.max_num_seqs, content.reserved_seqs),
            scheduled_tokens=content.scheduled_tokens,
            token_budget=limits.max_num_batched_tokens,
        )
        self.stats.steps[binding] += 1
        now = self._clock()
        after_gap = self._gap or (not self._in_flight and now - self._returned_at > PAUSE_SECONDS)
        self._in_flight.append(_StepInFlight(output, content, now, after_gap, binding))
        self._gap = False

    def _most_running(self, limit: int, reserved: int) -> int:
        """A limit, or what the start-up one leaves beside the places held outside RUNNING."""
        if not reserved:
            return limit
        return min(limit, self.facts.startup_limits.max_num_seqs - reserved)

    def _note_returned(self, output: object) -> None:
        step = self._take_in_flight(output)
        if step is None:
            return
        now = self._clock()
        record = self._record(step, now)
        self._returned_at = now
        if self._require_adapter().is_idle():
            self._gap = True
        if self._policy is not None:
            self._policy.observe(record)
        if self._listener is not None:
            self._listener(record)

    def _take_in_flight(self, output: object) -> _StepInFlight | None:
        """The step that `output` was scheduled as; drops older ones that never came back."""
        in_flight = self._in_flight
        if in_flight and in_flight[0].output is output:
            return in_flight.popleft()
        if not any(step.output is output for step in in_flight):
            return None  # a step without tokens, which is not kept: younger ones are still to come
        while in_flight[0].output is not output:
            in_flight.popleft()
        return in_flight.popleft()

    def _record(self, step: _StepInFlight, now: float) -> StepRecord:
        """The record of a step, with all that happened since the previous one."""
        content = step.content
        self._steps_seen += 1
        record = StepRecord(
            seconds=now - (step.scheduled_at if step.after_gap else self._returned_at),
            running=content.running,
            decode_seqs=content.decode_seqs,
            prefill_tokens=content.prefill_tokens,
            kv_tokens=content.used_blocks * self._block_size,
            preemptions=self._preemptions,
            recomputed_tokens=self._recomputed_tokens,
            finished=tuple(self._finished),
            arrived=tuple(self._arrived),
            binding=step.binding,
            regular=not step.after_gap and self._steps_seen > WARM_UP_STEPS,
            prefill_squares=content.prefill_squares,
            cached_tokens=content.cached_tokens,
        )
        self._forget_recorded()
        return record

    def _forget_recorded(self) -> None:
        """Starts counting for the next record."""
        if self._preemptions:
            self.stats.preemptions += self._preemptions
            self.stats.recomputed_tokens += self._recomputed_tokens
            self._preemptions = self._recomputed_tokens = 0
        if self._finished:
            self._finished.clear()
        if self._arrived:
            self._arrived.clear()

    def _require_adapter(self) -> VllmAdapter:
        if self._adapter is None:
            raise RuntimeError(f"batchpilot does not steer this engine: {self.passthrough_reason}")
        return self._adapter

    def _fail(self, where: str) -> None:
        """Ends the steering: logs the exception once and restores the start-up limits."""
        self._active = False
        self.stats.failures += 1
        self.passthrough_reason = f"an exception in batchpilot's code around {where}()"
        self.decision = None
        logger.exception(
            "batchpilot stops steering this engine after %s; the start-up limits come back and "
            "vLLM goes on by itself",
            self.passthrough_reason,
        )
        adapter = self._adapter
        if adapter is not None:
            try:
                adapter.restore()
                self._limits = adapter.facts.startup_limits
            except Exception:
                logger.exception("batchpilot could not restore the start-up limits")
        self._start_run()
