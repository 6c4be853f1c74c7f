"""vLLM's real scheduler and KV-cache manager without a model: made-up tokens, real decisions.

Everything that decides is vLLM's own code, with batchpilot's hook as its scheduler class:
admission, chunking, prefix caching, preemption. Only the model runner is left out: each scheduled
sequence that has its whole prompt in gets the token 0.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.engine import EngineRequest, SchedulerHook

SCHEDULER_CLASS = "batchpilot.scheduler_hook.Scheduler"
#: Configurations kept for engines that are built again with the same one: each takes a second.
_KEPT_CONFIGS = 8
# What a sequence gets of a step. vLLM only reads these lists, so all sequences share them.
_TOKEN = [0]
_NO_TOKEN: list[int] = []


@dataclass(frozen=True)
class SchedulerCoreConfig(Parameters):
    """How the scheduler is set up; names and meanings are vLLM's."""

    max_num_seqs: int = parameter(256, minimum=1, help="start-up limit of running sequences")
    max_num_batched_tokens: int = parameter(2048, minimum=1, help="start-up limit of a step")
    kv_blocks: int = parameter(1024, minimum=2, help="KV blocks, one of which vLLM keeps")
    block_size: int = parameter(16, minimum=1, help="tokens per KV block")
    max_model_len: int = parameter(4096, minimum=2, help="longest prompt and output together")
    async_scheduling: bool = parameter(True, help="schedule a step ahead, as on a GPU")
    enable_prefix_caching: bool = parameter(False, help="reuse KV blocks of equal prefixes")
    enable_chunked_prefill: bool = parameter(True, help="let a prompt span several steps")
    scheduling_policy: str = parameter(
        "fcfs", choices=("fcfs", "priority"), help="which waiting request goes first"
    )
    watermark: float = parameter(0.0, minimum=0, below=1, help="share of blocks kept free")
    mode: str = parameter("local", choices=("off", "observe", "local"), help="the hook's mode")


class StepLoad(NamedTuple):
    """What a scheduled step asks of a GPU.

    Attributes:
        decode_seqs: Sequences that decode in it.
        prefill_tokens: Prompt tokens it computes, recomputed ones included.
        kv_tokens: KV tokens its decodes read: their contexts, each with the token it adds.
        prefill_squares: What the prompts' tokens attend to, as `StepTimeModel.seconds` counts it.
    """

    decode_seqs: int
    prefill_tokens: int
    kv_tokens: int
    prefill_squares: int


class SchedulerCore:
    """One scheduler, fed by hand.

    Args:
        config: How it is set up.
        model: Folder of a model's config.json; weights are never read.

    Raises:
        ConfigError: vLLM refuses the configuration.
    """

    def __init__(self, config: SchedulerCoreConfig, model: Path) -> None:
        """Builds the scheduler: a second, and a few milliseconds the next time."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        self.config = config
        with _quiet():
            self.vllm_config = _vllm_config(config, model)
            scheduler_class = self.vllm_config.scheduler_config.get_scheduler_cls()
        self.scheduler: Any = _scheduler(config, self.vllm_config, scheduler_class)
        self._block_hasher = _block_hasher(config)
        self._prefilling: dict[str, Any] = {}
        self._scheduled: deque[_Scheduled] = deque()
        self._arrivals: Iterator[int] = itertools.count()

    @property
    def hook(self) -> SchedulerHook:
        """The hook inside the scheduler; absent in mode `off`."""
        hook: SchedulerHook = self.scheduler.batchpilot
        return hook

    @property
    def load(self) -> StepLoad:
        """What the newest scheduled step holds.

        Raises:
            IndexError: No step is scheduled.
        """
        return self._scheduled[-1].load

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request that generates exactly `output_tokens` tokens."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.scheduler.add_request(
            Request(
                request_id=request.request_id,
                prompt_token_ids=list(request.prompt_token_ids),
                sampling_params=SamplingParams(max_tokens=request.output_tokens, ignore_eos=True),
                pooling_params=None,
                # Only their order counts, and that must not hang on the time of day.
                arrival_time=float(next(self._arrivals)),
                priority=request.priority,
                block_hasher=self._block_hasher,
            )
        )

    def abort_request(self, request_id: str) -> None:
        """Ends a request early; unknown ids are ignored."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def schedule(self) -> Any:
        """Schedules the next step; returns vLLM's `SchedulerOutput`."""
        output = self.scheduler.schedule()
        self._scheduled.append(self._read(output))
        return output

    def complete(self, output: Any) -> Sequence[Any]:
        """Hands the step's made-up result back.

        Args:
            output: What `schedule` returned; steps complete in the order they were scheduled.

        Returns:
            vLLM's `EngineCoreOutput`s: new tokens and finish reasons by request.
        """
        step = self._scheduled.popleft()
        assert step.output is output, "steps complete in the order they were scheduled"
        outputs = self.scheduler.update_from_output(output, step.result())
        if len(outputs) == 1:
            (group,) = outputs.values()
            return group.outputs  # type: ignore[no-any-return]
        return [item for group in outputs.values() for item in group.outputs]

    def _read(self, output: Any) -> _Scheduled:
        """Reads a step just scheduled, while vLLM's requests still stand as it left them.

        A step scheduled ahead moves them on, so that later it would be too late.
        """
        for request_id in output.finished_req_ids:
            self._prefilling.pop(request_id, None)
        cached = output.scheduled_cached_reqs
        kv_tokens = sum(cached.num_computed_tokens)
        prefill_seqs = prefill_tokens = prefill_squares = 0
        incomplete: list[str] = []
        scheduled = output.num_scheduled_tokens
        if self._note_prefills(output):
            fresh = {item.req_id for item in output.scheduled_new_reqs}
            for request_id, request in list(self._prefilling.items()):
                chunk = scheduled.get(request_id, 0)
                if not chunk:
                    continue
                prefill_seqs += 1
                end = request.num_computed_tokens
                prefill_tokens += chunk
                prefill_squares += chunk * (2 * end - chunk)
                if request_id not in fresh:
                    kv_tokens -= end - chunk
                if request.is_prefill_chunk:
                    incomplete.append(request_id)
                else:
                    del self._prefilling[request_id]
        decode_seqs = len(scheduled) - prefill_seqs
        load = StepLoad(decode_seqs, prefill_tokens, kv_tokens + decode_seqs, prefill_squares)
        return _Scheduled(output, incomplete, load)

    def _note_prefills(self, output: Any) -> bool:
        """Remembers who starts a prompt, again or for the first time; whether anyone prefills."""
        requests = self.scheduler.requests
        for item in output.scheduled_new_reqs:
            self._prefilling[item.req_id] = requests[item.req_id]
        for request_id in output.scheduled_cached_reqs.resumed_req_ids:
            self._prefilling[request_id] = requests[request_id]
        return bool(self._prefilling)


class _Scheduled(NamedTuple):
    """A step whose result is not handed back yet.

    Attributes:
        output: vLLM's `SchedulerOutput`.
        incomplete: Requests whose prompt it leaves unfinished: they get no token.
        load: What it asks of a GPU.
    """

    output: Any
    incomplete: list[str]
    load: StepLoad

    def result(self) -> Any:
        """One token for each sequence whose prompt is complete, as a model runner would."""
        from vllm.v1.outputs import ModelRunnerOutput

        request_ids = list(self.output.num_scheduled_tokens)
        index = dict(zip(request_ids, range(len(request_ids)), strict=True))
        tokens = [_TOKEN] * len(request_ids)
        for request_id in self.incomplete:
            tokens[index[request_id]] = _NO_TOKEN
        return ModelRunnerOutput(
            req_ids=request_ids, req_id_to_index=index, sampled_token_ids=tokens
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back vLLM's warnings of what a CPU lacks to run a model: none is run here."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(disabled)


@lru_cache(maxsize=_KEPT_CONFIGS)
def _vllm_config(config: SchedulerCoreConfig, model: Path) -> Any:
    from vllm import EngineArgs

    arguments = EngineArgs(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        scheduling_policy=config.scheduling_policy,
        watermark=config.watermark,
        scheduler_cls=SCHEDULER_CLASS,
        additional_config={"batchpilot": {"mode": config.mode, "policy": "static"}},
    )
    try:
        vllm_config = arguments.create_engine_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses this configuration: {error}") from error
    # The CPU platform turns it off for its own model runner, which is not used here.
    vllm_config.scheduler_config.async_scheduling = config.async_scheduling
    vllm_config.cache_config.num_gpu_blocks = config.kv_blocks
    return vllm_config


def _scheduler(config: SchedulerCoreConfig, vllm_config: Any, scheduler_class: Any) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.structured_output import StructuredOutputManager

    kv_cache_config = KVCacheConfig(
        num_blocks=config.kv_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=_kv_cache_groups(config),
    )
    return scheduler_class(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=config.block_size,
        log_stats=False,
    )


def _kv_cache_groups(config: SchedulerCoreConfig) -> list[Any]:
    """One group of layers that attend to everything."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

    spec = FullAttentionSpec(
        block_size=config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    return [KVCacheGroupSpec(["layer"], spec)]


def _block_hasher(config: SchedulerCoreConfig) -> Any:
    """Hashes prompt blocks for prefix caching, as vLLM's engine core does."""
    if not config.enable_prefix_caching:
        return None
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(config.block_size, sha256)
