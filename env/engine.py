"""The one face every engine has: live vLLM here, a virtual GPU and a served vLLM elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from batchpilot.agents.limits import BatchLimits, Decision, EngineFacts, EngineSnapshot, StepRecord
from batchpilot.agents.policy import LimitPolicy


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request for an engine.

    Attributes:
        request_id: Unique in its run.
        prompt_token_ids: The prompt.
        output_tokens: How many tokens it generates; end-of-sequence tokens are ignored, so that
            every policy does the same work.
        priority: vLLM's priority, lower first; only with priority scheduling.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    output_tokens: int
    priority: int = 0


@dataclass(frozen=True, slots=True)
class EngineStep:
    """What one call of `Engine.step` brought.

    Attributes:
        clock_seconds: Engine time at which the outputs were there.
        new_tokens: Output tokens by request id; only requests that got some.
        finished: Ids of the requests that ended.
        record: The step's cost; None when the call brought no result (a step was only queued).
    """

    clock_seconds: float
    new_tokens: Mapping[str, int] = field(default_factory=dict)
    finished: tuple[str, ...] = ()
    record: StepRecord | None = None


class Engine(Protocol):
    """An engine that serves requests step by step and whose limits can be steered."""

    @property
    def facts(self) -> EngineFacts:
        """What does not change while it runs."""

    @property
    def clock_seconds(self) -> float:
        """Engine time: real for a live engine, virtual for a simulated one."""

    @property
    def applied_limits(self) -> BatchLimits:
        """The limits of the newest step."""

    @property
    def decision(self) -> Decision | None:
        """The newest decision behind them, None before the first."""

    def snapshot(self) -> EngineSnapshot:
        """What a policy would see now."""

    def set_policy(self, policy: LimitPolicy | None, *, watermark: float = 0.0) -> None:
        """Steers by `policy` from the next step on; None leaves vLLM alone.

        Args:
            policy: Decides before each step.
            watermark: vLLM's own share of KV blocks kept free at admission, 0 to 1.
        """

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
            ValueError: The engine can never serve it (too long, empty, id in use).
        """

    def abort_request(self, request_id: str) -> None:
        """Ends a request early; unknown ids are ignored, as in vLLM."""

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""

    def step(self) -> EngineStep:
        """Runs one engine step."""

    def wait_until(self, clock_seconds: float) -> None:
        """Lets idle time pass: a live engine sleeps, a virtual one moves its clock."""

    def reset(self, seed: int | None = None) -> None:
        """Makes the next run independent of the last: drops the prefix cache and counters.

        Args:
            seed: Of what noise it makes itself from here on; None for what it began with.

        Raises:
            RuntimeError: Requests are still unfinished.
        """

    def close(self) -> None:
        """Frees everything it holds; further calls are errors."""


class HookTotals(Protocol):
    """The hook's running totals."""

    preemptions: int
    recomputed_tokens: int
    hook_seconds: float


class SchedulerHook(Protocol):
    """What an engine uses of the hook inside its scheduler, found at `scheduler.batchpilot`."""

    @property
    def facts(self) -> EngineFacts:
        """What does not change while the engine runs."""

    @property
    def applied_limits(self) -> BatchLimits:
        """The limits of the newest step."""

    @property
    def decision(self) -> Decision | None:
        """The newest decision, None before the first."""

    @property
    def passthrough_reason(self) -> str | None:
        """Why the hook leaves vLLM alone for good; None while it steers."""

    @property
    def stats(self) -> HookTotals:
        """Totals since the engine started."""

    def snapshot(self) -> EngineSnapshot:
        """What the policy would see now."""

    def set_policy(self, policy: LimitPolicy | None) -> None:
        """Steers by `policy` from the next step on; None restores the start-up limits."""

    def set_clock(self, clock: Callable[[], float]) -> None:
        """Replaces the clock that steps are timed by."""

    def set_listener(self, listener: Callable[[StepRecord], None] | None) -> None:
        """Hears every step's record, in order."""
