"""`batchpilot/LiveBatchLimits-v0`: the same environment around a real vLLM in this process.

import gymnasium
import batchpilot.env.registration

env = gymnasium.make("batchpilot/LiveBatchLimits-v0", model="smollm2-135m", workload="chat")
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from batchpilot.agents.parameters import parameter
from batchpilot.env.batch_limits_env import SteeredEngineEnv
from batchpilot.env.engine import Engine, EngineRequest
from batchpilot.env.env_parameters import EnvParameters
from batchpilot.env.episode import OpenedEngine
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig
from batchpilot.env.models import longest_that_fits, resolve_model
from batchpilot.env.request_stream import RequestStream
from batchpilot.env.reward import MeanLengths
from batchpilot.env.workloads import SATURATED, WorkloadSpec


@dataclass(frozen=True)
class LiveEnvParameters(EnvParameters):
    """The parameters of `batchpilot/LiveBatchLimits-v0`: those of `EnvParameters`, and vLLM's."""

    synthetic_arrivals = "poisson:2"

    workload: str = parameter("chat:output_max=400", help="see WorkloadSpec")
    itl_slo_ms: float | None = parameter(100.0, above=0, help="target for a request's TPOT")
    model: str = parameter("smollm2-135m", help="smollm2-135m, tiny, or a model folder")
    max_num_seqs: int = parameter(64, minimum=2, help="start-up limit; that of the action 1")
    max_num_batched_tokens: int = parameter(
        2048, minimum=2, help="start-up limit; that of the action 1"
    )
    kv_blocks: int | None = parameter(128, minimum=2, help="KV blocks; None fills the memory")
    block_size: int = parameter(32, minimum=1, help="tokens per KV block")
    max_model_len: int | None = parameter(
        None, minimum=2, help="longest prompt and output together; None takes what fits"
    )
    enable_prefix_caching: bool = parameter(True, help="reuse KV blocks of equal prefixes")
    capacity_probe_s: float = parameter(
        10.0, above=0, help="seconds of full load that measure the capacity"
    )


class LiveBatchLimitsEnv(SteeredEngineEnv[LiveEnvParameters]):
    """Steers both batch limits of a real vLLM in this process, in real time.

    Spaces, reward and info are those of `BatchLimitsEnv`. Time is real, so that episodes take their
    horizon's time and no two are alike. Unless `capacity_tokens_per_s` is given, the first reset
    measures the engine's capacity under full load.

    One of them at a time in a process: vLLM keeps process-wide state.

    Args:
        render_mode: `"ansi"` for a line of text an interval, or None.
        settings: The fields of `LiveEnvParameters`.

    Raises:
        ConfigError: An unknown setting, or one that does not fit; vLLM's at the first reset.
    """

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        """Checks every setting; vLLM starts at the first reset."""
        params = LiveEnvParameters.from_mapping(settings, where="LiveBatchLimits-v0")
        super().__init__(params, render_mode=render_mode)

    def _open(self, mean: MeanLengths) -> OpenedEngine:
        p = self.params
        longest = longest_that_fits(resolve_model(p.model), p.kv_blocks or 0, p.block_size)
        engine = LiveEngine(
            LiveEngineConfig(
                model=p.model,
                max_num_seqs=p.max_num_seqs,
                max_num_batched_tokens=p.max_num_batched_tokens,
                kv_blocks=p.kv_blocks,
                block_size=p.block_size,
                max_model_len=p.max_model_len or longest,
                enable_prefix_caching=p.enable_prefix_caching,
            )
        )
        try:
            capacity = p.capacity_tokens_per_s or measured_capacity(
                engine, self._saturated(engine), p.capacity_probe_s
            )
        except BaseException:
            engine.close()
            raise
        return OpenedEngine(
            engine, engine.model.vocab_size, engine.max_model_len, capacity, mean.output_tokens
        )

    def _saturated(self, engine: LiveEngine) -> Iterator[EngineRequest]:
        """The workload's requests, without end."""
        spec: WorkloadSpec = self.params.workload_spec
        stream = RequestStream(
            replace(spec, arrivals=SATURATED),
            horizon_seconds=self.params.capacity_probe_s,
            vocab_size=engine.model.vocab_size,
            max_model_len=min(engine.max_model_len, engine.facts.kv_capacity_tokens + 1),
            refill_below=self.params.max_num_seqs,
        )
        while stream.next_seconds is not None:
            yield from (arrival.request for arrival in stream.due(0.0, lambda: 0))


def measured_capacity(engine: Engine, requests: Iterator[EngineRequest], seconds: float) -> float:
    """Output tokens per second of an engine that always has requests waiting.

    The first half of the time fills it and does not count. Afterwards the engine is empty again.

    Args:
        engine: Without requests; runs under its start-up limits.
        requests: As many as it may ask for; fewer end the measurement early.
        seconds: Engine time it takes.
    """
    engine.set_policy(None)
    started_at = engine.clock_seconds
    counted_from, end = started_at + seconds / 2, started_at + seconds
    most = 2 * engine.facts.startup_limits.max_num_seqs
    unfinished: set[str] = set()
    tokens = 0
    while engine.clock_seconds < end:
        for request in requests:
            engine.add_request(request)
            unfinished.add(request.request_id)
            if len(unfinished) >= most:
                break
        if not unfinished:
            break
        step = engine.step()
        unfinished.difference_update(step.finished)
        if step.clock_seconds > counted_from:
            tokens += sum(step.new_tokens.values())
    counted = engine.clock_seconds - counted_from
    for request_id in sorted(unfinished):
        engine.abort_request(request_id)
    engine.reset()
    return tokens / counted if tokens and counted > 0 else 1.0
