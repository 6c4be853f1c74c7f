"""Everything a bench needs, made and checked before its engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.contestants import Contestant, parse_contestants
from batchpilot.env.bench.measure import Distribution
from batchpilot.env.bench.results import check_writable
from batchpilot.env.bench.runner import Round, TimedRequest
from batchpilot.env.bench.settings import BenchSettings
from batchpilot.env.engine import Engine
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig
from batchpilot.env.models import ModelSource, resolve_model
from batchpilot.env.workloads import TRACE_ARRIVALS, Workload, build_workload, engine_requests


@dataclass(frozen=True)
class BenchPlan:
    """What will run.

    Attributes:
        settings: As asked for.
        contestants: The policies, in order.
        model: The model, found and ready.
        max_model_len: Longest prompt and output together that model and KV cache can hold.
        workloads: One per round.
        rounds: The requests made from them.
    """

    settings: BenchSettings
    contestants: tuple[Contestant, ...]
    model: ModelSource
    max_model_len: int
    workloads: tuple[Workload, ...]
    rounds: tuple[Round, ...]

    def workload_to_json(self) -> dict[str, Any]:
        """What was served, from the first round."""
        first = self.workloads[0]
        return {
            "name": first.name,
            "arrivals": self.settings.arrivals or _usual_arrivals(first),
            "rate_scale": self.settings.rate_scale,
            "num_requests": len(first.requests),
            "last_arrival_s": first.requests[-1].arrival_seconds,
            "prompt_tokens": _lengths([r.prompt_tokens for r in first.requests]),
            "output_tokens": _lengths([r.output_tokens for r in first.requests]),
        }


def prepare(settings: BenchSettings) -> BenchPlan:
    """Makes everything ready and tries what can be tried without an engine.

    The output files come last: their folders are made only when all the rest is right.

    Raises:
        ConfigError: Anything that cannot be used.
    """
    slo = settings.slo
    defaults = {"itl_slo_ms": slo.itl_slo_ms, "ttft_slo_ms": slo.ttft_slo_ms}
    contestants = parse_contestants(settings.policies, defaults)
    workloads = [_build_workload(settings, index) for index in range(settings.rounds)]
    model = resolve_model(settings.model)
    max_model_len = _max_model_len(settings, model)
    for workload in workloads:
        workload.check_fits(max_model_len)
    rounds = [
        _make_round(settings, model, workload, index) for index, workload in enumerate(workloads)
    ]
    for path in settings.output_files:
        check_writable(path)
    return BenchPlan(settings, contestants, model, max_model_len, tuple(workloads), tuple(rounds))


def open_engine(plan: BenchPlan) -> Engine:
    """Starts the engine that the settings ask for.

    Raises:
        ConfigError: It cannot be started so.
    """
    settings = plan.settings
    config = LiveEngineConfig(
        model=settings.model,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_blocks=settings.kv_blocks or None,
        block_size=settings.block_size,
        max_model_len=plan.max_model_len,
        seed=settings.seed,
    )
    return LiveEngine(config)


def _build_workload(settings: BenchSettings, index: int) -> Workload:
    return build_workload(
        settings.workload,
        num_requests=settings.num_requests,
        arrivals=settings.arrivals,
        rate_scale=settings.rate_scale,
        seed=settings.seed + index,
    )


def _max_model_len(settings: BenchSettings, model: ModelSource) -> int:
    """The model's own limit, or what the KV cache holds where that is less."""
    if not settings.kv_blocks:
        return model.max_model_len
    # vLLM keeps one block for itself.
    capacity = (settings.kv_blocks - 1) * settings.block_size
    if capacity < 2:
        raise ConfigError(f"kv_blocks={settings.kv_blocks} must be at least 2, or 0 for all memory")
    return min(model.max_model_len, capacity)


def _make_round(
    settings: BenchSettings, model: ModelSource, workload: Workload, index: int
) -> Round:
    seed = settings.seed + index
    requests = engine_requests(workload, vocab_size=model.vocab_size, seed=seed)
    times = [request.arrival_seconds for request in workload.requests]
    timed = tuple(TimedRequest(*pair) for pair in zip(times, requests, strict=True))
    return Round(index + 1, seed, timed)


def _usual_arrivals(workload: Workload) -> str:
    """What `build_workload` takes when nobody says: a file's own times, or all at once."""
    return "saturated" if workload.requests[0].line is None else TRACE_ARRIVALS


def _lengths(tokens: Sequence[int]) -> dict[str, float | None]:
    summary = asdict(Distribution.of(tokens))
    rounded = {key: None if value is None else round(value, 1) for key, value in summary.items()}
    return {**rounded, "max": max(tokens)}
