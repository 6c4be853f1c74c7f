"""The class `vllm serve --scheduler-cls batchpilot.scheduler_hook.Scheduler` names."""

from __future__ import annotations

import logging
from typing import Any

from batchpilot.scheduler_hook.hook import Hook
from batchpilot.scheduler_hook.remote_link import EngineIdentity, RemoteLink, remote_link
from batchpilot.scheduler_hook.report import Reporter
from batchpilot.scheduler_hook.settings import HookSettings, read_settings
from batchpilot.scheduler_hook.vllm_adapter import (
    AsyncScheduler,
    SyncScheduler,
    UnsupportedEngineError,
    adapt,
    is_diffusion,
    stock_scheduler,
    vllm_version,
)

logger = logging.getLogger("vllm.batchpilot")


class Scheduler:
    """vLLM's scheduler, steered: asynchronous or plain, as the engine's configuration asks.

    vLLM does not check that scheduler class and configuration agree, so this name picks the base:
    `AsyncScheduler` where `scheduler_config.async_scheduling` is on, the plain one where it is off,
    and in mode `off`, or for a diffusion model, vLLM's own class with nothing added.

    Raises:
        ConfigError: A setting that cannot be used; the server stops at start.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Builds the scheduler that fits the configuration."""
        settings = read_settings(vllm_config.additional_config)
        left_alone = is_diffusion(vllm_config)
        if settings.mode == "off" or left_alone:
            reason = "does not steer diffusion models" if left_alone else "is off"
            logger.info("batchpilot %s: this engine runs vLLM's own scheduler", reason)
            return stock_scheduler(vllm_config)(vllm_config, *args, **kwargs)
        is_async = vllm_config.scheduler_config.async_scheduling
        steered = SteeredAsyncScheduler if is_async else SteeredSyncScheduler
        scheduler = steered(vllm_config, *args, **kwargs)
        scheduler.steer(settings)
        return scheduler


class _Steered:
    """Wraps the five methods that a step goes through; everything else is vLLM's."""

    batchpilot: Hook = Hook(None, None, passthrough_reason="the scheduler is still being built")
    _reporter: Reporter | None = None
    _link: RemoteLink | None = None

    def steer(self, settings: HookSettings) -> None:
        """Attaches the hook, or a passthrough with the reason logged."""
        try:
            adapter = adapt(
                self,
                allow_untested=settings.allow_untested_vllm,
                has_target=settings.itl_slo_ms is not None,
            )
        except UnsupportedEngineError as error:
            self.batchpilot = Hook(None, None, passthrough_reason=str(error))
            logger.warning("batchpilot does not steer this engine: %s", error)
            return
        policy = settings.build_policy()
        if settings.mode == "remote":
            identity = EngineIdentity(
                adapter.facts, adapter.model_name, adapter.engine_index, vllm_version
            )
            self._link = remote_link(settings, identity, policy)
            policy = self._link.policy
        self.batchpilot = Hook(
            adapter,
            settings.with_shadow(policy),
            bounds=settings.bounds,
            applies=settings.mode in ("local", "remote"),
        )
        if self._link is not None:
            self._link.policy.attach(self.batchpilot)
        self._reporter = Reporter(self.batchpilot, adapter, settings, self._link)
        logger.info(
            "batchpilot: mode %s, policy %s, start-up limits max_num_seqs %d and "
            "max_num_batched_tokens %d, %d KV blocks of %d tokens",
            settings.mode,
            settings.policy,
            adapter.facts.startup_limits.max_num_seqs,
            adapter.facts.startup_limits.max_num_batched_tokens,
            adapter.facts.total_blocks,
            adapter.facts.block_size,
        )

    def add_request(self, request: Any) -> None:
        """Counts the arrival, then queues the request."""
        self.batchpilot.arriving(request)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Sets the limits, lets vLLM schedule, and reads what it scheduled."""
        hook = self.batchpilot
        hook.before_schedule()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        hook.after_schedule(output)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Lets vLLM take the result in, then completes the step's record."""
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        self.batchpilot.after_update(scheduler_output)
        return outputs

    def shutdown(self) -> None:
        """Ends the session with the service and the reporter, then stops vLLM's scheduler."""
        try:
            if self._link is not None:
                self._link.client.close()
            if self._reporter is not None:
                self._reporter.close()
        except Exception:
            logger.exception("batchpilot could not end all of its own; vLLM's scheduler stops")
        finally:
            super().shutdown()  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.batchpilot.preempting(request)
        return super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]


class SteeredAsyncScheduler(_Steered, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with the hook around its steps."""


class SteeredSyncScheduler(_Steered, SyncScheduler):  # type: ignore[misc]
    """vLLM's plain scheduler with the hook around its steps."""
