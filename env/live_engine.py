"""A real vLLM in this process, on whatever device vLLM finds, stepped by hand.

The scheduler inside is batchpilot's own (`batchpilot.scheduler_hook.Scheduler`), named by its
class path; everything else is vLLM as it is. What an engine measures here is vLLM itself: its
admission, its preemption, its kernels, its clock.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.engine import EngineRequest, EngineStep
from batchpilot.env.models import ModelSource, resolve_model
from batchpilot.env.process import prepare_process
from batchpilot.env.steered_engine import SteeredEngine, refuse_hook_settings

logger = logging.getLogger(__name__)

SCHEDULER_CLASS = "batchpilot.scheduler_hook.Scheduler"
#: Steps that vLLM may need to forget requests that have ended, before something is wrong.
_MOST_DRAIN_STEPS = 16
_LOGGING_LEVEL = "VLLM_LOGGING_LEVEL"


@dataclass(frozen=True)
class LiveEngineConfig(Parameters):
    """How the engine is started; names and meanings are vLLM's unless said.

    Attributes:
        speculative: vLLM's `speculative_config`, such as
            `{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}`. On a CPU
            vLLM 0.32 starts no other engine in the process once n-gram speculation has run in it.
        extra_engine_args: More of vLLM's `EngineArgs`, by name.

    Raises:
        ConfigError: A value of the wrong type or out of range, or two that do not go together.
    """

    model: str = parameter("smollm2-135m", help="smollm2-135m, tiny, or a model folder")
    max_num_seqs: int = parameter(128, minimum=1, help="start-up limit of running sequences")
    max_num_batched_tokens: int = parameter(2048, minimum=1, help="start-up limit of a step")
    kv_blocks: int | None = parameter(
        None, minimum=2, help="KV blocks, one of which vLLM keeps; None fills the memory it may use"
    )
    block_size: int = parameter(32, minimum=1, help="tokens per KV block")
    max_model_len: int | None = parameter(
        None, minimum=2, help="longest prompt and output together; None takes the model's"
    )
    enable_prefix_caching: bool = parameter(True, help="reuse KV blocks of equal prefixes")
    enable_chunked_prefill: bool = parameter(True, help="let a prompt span several steps")
    async_scheduling: bool | None = parameter(
        None, help="schedule a step ahead; None takes vLLM's choice, which on a CPU is no"
    )
    scheduling_policy: str = parameter(
        "fcfs", choices=("fcfs", "priority"), help="which waiting request goes first"
    )
    enforce_eager: bool = parameter(True, help="no compilation and no graphs: starts in seconds")
    seed: int = parameter(0, minimum=0, help="of vLLM's own random choices")
    speculative: Mapping[str, Any] | None = None
    extra_engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks each value, then what must hold between them."""
        super().__post_init__()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: each running sequence takes a token of a step"
            )


class LiveEngine(SteeredEngine):
    """vLLM in this process, stepped by `step`; implements `batchpilot.env.engine.Engine`.

    One engine at a time: vLLM keeps process-wide state. It is a context manager that closes itself.

    Args:
        config: How it is started.

    Raises:
        ConfigError: vLLM refuses the configuration, or the model cannot be found.
        RuntimeError: The scheduler of this vLLM cannot be steered.
    """

    def __init__(self, config: LiveEngineConfig) -> None:
        """Loads the model, which takes seconds."""
        refuse_hook_settings()
        self.config = config
        _set_environment()
        self.model = resolve_model(config.model)
        started = time.perf_counter()
        with _quiet_start():
            self._llm: Any = _start(_vllm_config(config, self.model))
        logger.info("vLLM is ready after %.1f s", time.perf_counter() - started)
        self._started_at = time.perf_counter()
        super().__init__(
            self._llm.engine_core.engine_core.scheduler,
            self._llm.model_config.max_model_len,
            lambda: self.clock_seconds,
        )

    @property
    def clock_seconds(self) -> float:
        """Seconds since the engine was ready."""
        return time.perf_counter() - self._started_at

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request; it generates exactly `output_tokens` tokens.

        Raises:
            ValueError: The engine can never serve it: empty, too long, a token id that the model
                does not have, or an id in use.
        """
        llm = self._open_llm()
        self._check_request(request)
        # The type marks a prompt that has been through vLLM's renderer, which tokens need not.
        prompt = {"type": "token", "prompt_token_ids": list(request.prompt_token_ids)}
        params = _sampling_params(request.output_tokens)
        llm.add_request(request.request_id, prompt, params, priority=request.priority)
        self._unfinished[request.request_id] = request

    def abort_request(self, request_id: str) -> None:
        """Ends a request early; unknown ids are ignored."""
        self._open_llm().abort_request([request_id])
        self._unfinished.pop(request_id, None)

    def abort_all(self) -> int:
        """Ends every unfinished request, as after Ctrl-C.

        Returns:
            How many there were.
        """
        request_ids = list(self._unfinished)
        self._open_llm().abort_request(request_ids)
        self._unfinished.clear()
        return len(request_ids)

    def step(self) -> EngineStep:
        """Runs one step; with asynchronous scheduling the first call only queues one.

        Raises:
            RuntimeError: The policy failed and vLLM now runs by itself: what was measured from
                here on would not be the policy.
        """
        llm = self._open_llm()
        # vLLM updates its scheduler at most once a call, so at most one record is heard in it.
        self._record = None
        outputs = llm.step()
        clock = self.clock_seconds
        if self._policy is not None:
            self._check_steered()
        new_tokens = {o.request_id: len(o.outputs[0].token_ids) for o in outputs}
        finished = tuple(output.request_id for output in outputs if output.finished)
        for request_id in finished:
            self._unfinished.pop(request_id, None)
        return EngineStep(
            clock_seconds=clock,
            new_tokens={name: count for name, count in new_tokens.items() if count},
            finished=finished,
            record=self._record,
        )

    def wait_until(self, clock_seconds: float) -> None:
        """Sleeps until the engine's clock is there; returns at once when it is past."""
        self._open_llm()
        time.sleep(max(0.0, clock_seconds - self.clock_seconds))

    def reset(self, seed: int | None = None) -> None:
        """Makes the next run independent of the last: drops the prefix cache.

        Args:
            seed: Of no use here: a real machine's noise is its own.

        Raises:
            RuntimeError: Requests are still unfinished, or vLLM still holds their blocks.
        """
        del seed
        self._check_open()
        self._check_idle()
        self._drain()
        self._drop_prefix_cache()

    def close(self) -> None:
        """Shuts vLLM down and frees its memory; a second call does nothing."""
        if self._llm is None:
            return
        super().close()
        llm, self._llm = self._llm, None
        llm.engine_core.shutdown()
        del llm
        gc.collect()

    def _open_llm(self) -> Any:
        self._check_open()
        return self._llm

    def _check_request(self, request: EngineRequest) -> None:
        super()._check_request(request)
        least, most = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if least < 0 or most >= self.model.vocab_size:
            raise ValueError(
                f"request {request.request_id!r}: token ids {least} to {most} are not all in "
                f"0 to {self.model.vocab_size - 1}"
            )

    def _drain(self) -> None:
        """Steps until vLLM has forgotten every request that ended, also one scheduled ahead."""
        core = self._llm.engine_core.engine_core
        for _ in range(_MOST_DRAIN_STEPS):
            if not (core.scheduler.has_requests() or core.batch_queue):
                return
            self._llm.step()
        raise RuntimeError(f"vLLM still holds requests {_MOST_DRAIN_STEPS} steps after the last")


def _set_environment() -> None:
    """Sets what vLLM reads from the environment, before it is imported.

    The user's own choices win, but for the first: the scheduler must be in this process.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prepare_process()


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Holds back the many warnings of every start on a CPU, unless the user chose a level.

    vLLM sets its logger up more than once while it starts, so that only a switch above all loggers
    holds. What really goes wrong is raised.
    """
    if _LOGGING_LEVEL in os.environ:
        yield
        return
    os.environ[_LOGGING_LEVEL] = "WARNING"  # what vLLM keeps to once it runs
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(disabled)
        del os.environ[_LOGGING_LEVEL]


def _engine_args(config: LiveEngineConfig, model: ModelSource) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs`."""
    args: dict[str, Any] = {
        "model": str(model.path),
        "load_format": model.load_format,
        "skip_tokenizer_init": model.skip_tokenizer_init,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "num_gpu_blocks_override": config.kv_blocks,
        "block_size": config.block_size,
        "max_model_len": config.max_model_len,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enable_chunked_prefill": config.enable_chunked_prefill,
        "async_scheduling": config.async_scheduling,
        "scheduling_policy": config.scheduling_policy,
        "speculative_config": dict(config.speculative) if config.speculative else None,
        "enforce_eager": config.enforce_eager,
        "seed": config.seed,
        "disable_log_stats": True,
        "scheduler_cls": SCHEDULER_CLASS,
        "additional_config": {"batchpilot": {"mode": "local", "policy": "static"}},
    }
    clash = sorted(set(args) & set(config.extra_engine_args))
    if clash:
        raise ConfigError(f"extra_engine_args: {clash[0]} is set by this engine; use its own field")
    return {**args, **config.extra_engine_args}


def _sampling_params(output_tokens: int) -> Any:
    """Greedy, exactly so many tokens, told of as they come."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=output_tokens,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _vllm_config(config: LiveEngineConfig, model: ModelSource) -> Any:
    """Has vLLM check the configuration and complete it."""
    arguments = _engine_args(config, model)
    from vllm import EngineArgs

    try:
        vllm_config = EngineArgs(**arguments).create_engine_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses this configuration: {error}") from error
    if config.async_scheduling is not None:
        # vLLM's CPU platform turns it off unasked, though its engine core runs it.
        vllm_config.scheduler_config.async_scheduling = config.async_scheduling
    return vllm_config


def _start(vllm_config: Any) -> Any:
    """Builds the engine with its core in this process."""
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    return LLMEngine(
        vllm_config,
        executor_class=Executor.get_class(vllm_config),
        log_stats=False,
        multiprocess_mode=False,
    )
