"""vLLM's real scheduler and KV-cache manager without a model: made-up tokens, real decisions.

Everything that decides is vLLM's own code, with batchpilot's hook as its scheduler class:
admission, chunking, prefix caching, preemption. Only the model runner is left out: each scheduled
sequence that has its whole prompt in gets the token 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.engine import EngineRequest, SchedulerHook

SCHEDULER_CLASS = "batchpilot.scheduler_hook.Scheduler"


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


class SchedulerCore:
    """One scheduler, fed by hand.

    Args:
        config: How it is set up.
        model: Folder of a model's config.json; weights are never read.

    Raises:
        ConfigError: vLLM refuses the configuration.
    """

    def __init__(self, config: SchedulerCoreConfig, model: Path) -> None:
        """Builds vLLM's configuration and its scheduler; about a second."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        self.config = config
        self.vllm_config = _vllm_config(config, model)
        self.scheduler: Any = _scheduler(config, self.vllm_config)
        self._block_hasher = _block_hasher(config)

    @property
    def hook(self) -> SchedulerHook:
        """The hook inside the scheduler; absent in mode `off`."""
        hook: SchedulerHook = self.scheduler.batchpilot
        return hook

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
        return self.scheduler.schedule()

    def complete(self, output: Any) -> Sequence[Any]:
        """Hands the step's made-up result back.

        Args:
            output: What `schedule` returned; steps complete in the order they were scheduled.

        Returns:
            vLLM's `EngineCoreOutput`s: new tokens and finish reasons by request.
        """
        outputs = self.scheduler.update_from_output(output, self._sample(output))
        return [item for group in outputs.values() for item in group.outputs]

    def _sample(self, output: Any) -> Any:
        """One token for each sequence whose prompt is complete, as a model runner would."""
        from vllm.v1.outputs import ModelRunnerOutput

        requests = self.scheduler.requests
        request_ids = list(output.num_scheduled_tokens)
        tokens = [
            [] if request_id in requests and requests[request_id].is_prefill_chunk else [0]
            for request_id in request_ids
        ]
        index = {request_id: i for i, request_id in enumerate(request_ids)}
        return ModelRunnerOutput(
            req_ids=request_ids, req_id_to_index=index, sampled_token_ids=tokens
        )


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


def _scheduler(config: SchedulerCoreConfig, vllm_config: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(
        block_size=config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    kv_cache_config = KVCacheConfig(
        num_blocks=config.kv_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return vllm_config.scheduler_config.get_scheduler_cls()(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=config.block_size,
        log_stats=False,
    )


def _block_hasher(config: SchedulerCoreConfig) -> Any:
    """Hashes prompt blocks for prefix caching, as vLLM's engine core does."""
    if not config.enable_prefix_caching:
        return None
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(config.block_size, sha256)
