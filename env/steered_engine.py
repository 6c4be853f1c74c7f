"""What every engine with a scheduler of its own shares: vLLM's scheduler and our hook inside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

from batchpilot.agents.limits import BatchLimits, Decision, EngineFacts, EngineSnapshot, StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.policy import LimitPolicy
from batchpilot.env.engine import EngineRequest, SchedulerHook

#: Settings of the hook that, set for the whole process, would change what is measured here.
_DISTURBING = (
    "BATCHPILOT_MODE",
    "BATCHPILOT_MIN_NUM_SEQS",
    "BATCHPILOT_MAX_NUM_SEQS",
    "BATCHPILOT_MIN_PREFILL_CHUNK",
)


def refuse_hook_settings() -> None:
    """Stops before an engine is built whose hook the environment would set up differently.

    Raises:
        ConfigError: A variable that the hook inside our own engines must not hear.
    """
    for name in _DISTURBING:
        value = os.environ.get(name)
        if value is not None and (name, value) != ("BATCHPILOT_MODE", "local"):
            raise ConfigError(
                f"{name}={value} is set in the environment and would change the hook inside this "
                "engine; unset it"
            )


class SteeredEngine:
    """The part of `batchpilot.env.engine.Engine` that does not depend on what runs the steps.

    Args:
        scheduler: vLLM's, built by `batchpilot.scheduler_hook.Scheduler`.
        max_model_len: Longest prompt and output together.
        clock: Engine time in seconds.

    Raises:
        RuntimeError: The scheduler of this vLLM cannot be steered.
    """

    def __init__(self, scheduler: Any, max_model_len: int, clock: Callable[[], float]) -> None:
        """Takes the hook over: no policy, this engine's clock, and every record is heard."""
        self.max_model_len = max_model_len
        self._scheduler: Any = scheduler  # None once closed
        self._hook: SchedulerHook = scheduler.batchpilot
        self._policy: LimitPolicy | None = None
        self._record: StepRecord | None = None
        self._unfinished: dict[str, EngineRequest] = {}
        self._check_steered()
        self._hook.set_clock(clock)
        self._hook.set_policy(None)
        self._hook.set_listener(self._hear)

    @property
    def facts(self) -> EngineFacts:
        """What does not change while it runs."""
        return self._open_hook().facts

    @property
    def applied_limits(self) -> BatchLimits:
        """The limits of the newest step."""
        return self._open_hook().applied_limits

    @property
    def decision(self) -> Decision | None:
        """The newest decision behind them, None before the first."""
        return self._open_hook().decision

    def snapshot(self) -> EngineSnapshot:
        """What a policy would see now, in this engine's clock."""
        return self._open_hook().snapshot()

    def set_policy(self, policy: LimitPolicy | None, *, watermark: float = 0.0) -> None:
        """Steers by `policy` from the next step on; None leaves vLLM alone.

        Args:
            policy: Decides before each step.
            watermark: vLLM's own share of KV blocks kept free at admission, from 0 to below 1.

        Raises:
            ValueError: A watermark out of range.
        """
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark={watermark} must be at least 0 and below 1")
        self._open_hook().set_policy(policy)
        self._policy = policy
        # As vLLM computes it at start, from its own count of blocks.
        blocks = int(watermark * self._scheduler.kv_cache_config.num_blocks)
        self._scheduler.kv_cache_manager.watermark_blocks = blocks

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._unfinished)

    def close(self) -> None:
        """Frees what it holds; a second call does nothing."""
        if self._scheduler is None:
            return
        self._scheduler = None
        self._hook.set_listener(None)
        self._unfinished.clear()

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes it."""
        self.close()

    def _hear(self, record: StepRecord) -> None:
        self._record = record

    def _open_hook(self) -> SchedulerHook:
        self._check_open()
        return self._hook

    def _check_open(self) -> None:
        if self._scheduler is None:
            raise RuntimeError("this engine is closed")

    def _check_steered(self) -> None:
        reason = self._hook.passthrough_reason
        if reason is not None:
            raise RuntimeError(f"batchpilot does not steer this engine: {reason}")

    def _check_request(self, request: EngineRequest) -> None:
        """Raises for what vLLM would refuse, or would keep waiting for ever."""
        name, prompt = request.request_id, len(request.prompt_token_ids)
        if name in self._unfinished:
            raise ValueError(f"request id {name!r} is in use")
        if not prompt:
            raise ValueError(f"request {name!r}: the prompt is empty")
        if request.output_tokens < 1:
            raise ValueError(f"request {name!r}: output_tokens={request.output_tokens} is below 1")
        # The last token is never written to the cache: nothing is generated from it.
        capacity = self._hook.facts.kv_capacity_tokens + 1
        longest = min(self.max_model_len, capacity)
        if prompt + request.output_tokens > longest:
            raise ValueError(
                f"request {name!r}: {prompt} prompt + {request.output_tokens} output tokens are "
                f"more than {longest} (max_model_len {self.max_model_len}, "
                f"KV cache {capacity - 1} tokens)"
            )

    def _check_idle(self) -> None:
        """Raises where a reset would lose requests."""
        if self._unfinished:
            raise RuntimeError(
                f"cannot reset with {len(self._unfinished)} unfinished requests; "
                "step until they finish, or abort_all()"
            )

    def _drop_prefix_cache(self) -> None:
        if not self._scheduler.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: blocks are still in use")
