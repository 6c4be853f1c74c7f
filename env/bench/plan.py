"""Everything a bench needs, made and checked before its engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.contestants import Contestant, parse_contestants
from batchpilot.env.bench.measure import Distribution
from batchpilot.env.bench.runner import Round, TimedRequest
from batchpilot.env.bench.settings import BenchSettings
from batchpilot.env.engine import Engine
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig
from batchpilot.env.models import ModelSource, longest_that_fits, resolve_model
from batchpilot.env.profiles import GpuProfile, load_profile, profile_names
from batchpilot.env.virtual_engine import VOCAB_SIZE, VirtualEngine, VirtualEngineConfig
from batchpilot.env.workloads import (
    SATURATED,
    TRACE_ARRIVALS,
    Workload,
    WorkloadSpec,
    engine_requests,
    read_spec,
)

#: What a search for capacity scales where nobody says.
CAPACITY_ARRIVALS = "poisson:1"


@dataclass(frozen=True)
class BenchPlan:
    """What will run.

    Attributes:
        settings: As asked for.
        contestants: The policies, in order.
        model: The model, found and ready; the profile's on a virtual engine.
        kv_blocks: KV blocks, 0 for as many as fit.
        block_size: Tokens per KV block.
        max_model_len: Longest prompt and output together that model and KV cache can hold.
        spec: What the first round is drawn from.
        workloads: One per round.
    """

    settings: BenchSettings
    contestants: tuple[Contestant, ...]
    model: ModelSource
    kv_blocks: int
    block_size: int
    max_model_len: int
    spec: WorkloadSpec
    workloads: tuple[Workload, ...]

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """The requests of every round, with their prompts."""
        return tuple(
            _make_round(self.settings, self.model, workload, index)
            for index, workload in enumerate(self.workloads)
        )

    def workload_to_json(self) -> dict[str, Any]:
        """What was served, from the first round."""
        first = self.workloads[0]
        return {
            "name": first.name,
            "arrivals": self.spec.arrivals or _usual_arrivals(first),
            "rate_scale": self.spec.rate_scale,
            "num_requests": len(first.requests),
            "last_arrival_s": first.requests[-1].arrival_seconds,
            "prompt_tokens": _lengths([r.prompt_tokens for r in first.requests]),
            "output_tokens": _lengths([r.output_tokens for r in first.requests]),
        }


def prepare(settings: BenchSettings) -> BenchPlan:
    """Makes everything ready and tries what can be tried without an engine.

    Raises:
        ConfigError: Anything that cannot be used.
    """
    slo = settings.slo
    defaults = {"itl_slo_ms": slo.itl_slo_ms, "ttft_slo_ms": slo.ttft_slo_ms}
    contestants = parse_contestants(settings.policies, defaults, settings.shadow)
    drawn = [_draw(settings, index) for index in range(settings.rounds)]
    spec = drawn[0][0]
    workloads = tuple(workload for _, workload in drawn)
    _check_inputs_are_kept(settings, spec)
    model, kv_blocks, block_size = _target(settings)
    max_model_len = longest_that_fits(model, kv_blocks, block_size)
    for workload in workloads:
        workload.check_fits(max_model_len)
    return BenchPlan(
        settings, contestants, model, kv_blocks, block_size, max_model_len, spec, workloads
    )


def open_engine(plan: BenchPlan) -> Engine:
    """Starts the engine that the settings ask for.

    Raises:
        ConfigError: It cannot be started so.
    """
    settings = plan.settings
    assert settings.max_num_seqs is not None and settings.model and settings.block_size
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


def open_virtual_engine(settings: BenchSettings, max_model_len: int) -> VirtualEngine:
    """Builds the virtual engine that the settings ask for.

    Raises:
        ConfigError: It cannot be built so.
    """
    assert settings.max_num_seqs is not None and settings.profile is not None
    return VirtualEngine(
        VirtualEngineConfig(
            profile=settings.profile,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_blocks=settings.kv_blocks or None,
            max_model_len=max_model_len,
            noise=settings.noise,
        )
    )


def build_round_workload(settings: BenchSettings, index: int) -> Workload:
    """What is served in one round, counted from 0.

    Raises:
        ConfigError: It cannot be built.
    """
    return _draw(settings, index)[1]


def build_round(settings: BenchSettings, index: int) -> Round:
    """The requests of one round, counted from 0.

    Raises:
        ConfigError: They cannot be built.
    """
    model, _, _ = _target(settings)
    return _make_round(settings, model, build_round_workload(settings, index), index)


def _draw(settings: BenchSettings, index: int) -> tuple[WorkloadSpec, Workload]:
    """What a round is drawn from, a YAML file's own values taken in, and what that gives."""
    spec = read_spec(
        WorkloadSpec(
            settings.workload,
            settings.arrivals,
            settings.num_requests,
            settings.rate_scale,
            settings.seed + index,
        )
    )
    workload = spec.build()
    if settings.find_capacity and not workload.requests[-1].arrival_seconds:
        # All at once has no rate to scale.
        if spec.arrivals is not None:
            raise ConfigError(
                f"find_capacity scales a rate, and arrivals={spec.arrivals!r} of "
                f"workload {settings.workload!r} has none"
            )
        spec = replace(spec, arrivals=CAPACITY_ARRIVALS)
        workload = spec.build()
    if spec.rate_scale != 1 and (spec.arrivals or _usual_arrivals(workload)) == SATURATED:
        raise ConfigError(
            f"rate_scale={spec.rate_scale:g} multiplies a rate, and arrivals={SATURATED!r} of "
            f"workload {settings.workload!r} has none; poisson:RATE has one"
        )
    return spec, workload


def _check_inputs_are_kept(settings: BenchSettings, spec: WorkloadSpec) -> None:
    """Raises for an output that would take the place of a file that is read."""
    inputs = {path.resolve() for path in _input_files(settings, spec)}
    for path in settings.output_files:
        if path.resolve() in inputs:
            raise ConfigError(f"{path} is read by this bench: write its results to another file")


def _input_files(settings: BenchSettings, spec: WorkloadSpec) -> list[Path]:
    """What the description was read from, what it names, and the profile."""
    profile = settings.profile
    files = [Path(settings.workload), *spec.files]
    if profile is not None and profile not in profile_names():
        files.append(Path(profile).expanduser())
    return files


def _target(settings: BenchSettings) -> tuple[ModelSource, int, int]:
    """The model, its KV blocks (0: as many as fit) and their size."""
    if settings.engine == "live":
        assert settings.model is not None
        assert settings.kv_blocks is not None and settings.block_size is not None
        return resolve_model(settings.model), settings.kv_blocks, settings.block_size
    if settings.profile is None:
        raise ConfigError(f"engine 'virtual' needs a profile: {', '.join(profile_names())}")
    profile = load_profile(settings.profile)
    return _virtual_model(profile), settings.kv_blocks or profile.num_blocks, profile.block_size


def _virtual_model(profile: GpuProfile) -> ModelSource:
    """What stands for a model where there is none."""
    return ModelSource(profile.name, Path(), VOCAB_SIZE, profile.max_model_len)


def _make_round(
    settings: BenchSettings, model: ModelSource, workload: Workload, index: int
) -> Round:
    seed = settings.seed + index
    requests = engine_requests(workload, vocab_size=model.vocab_size, seed=seed)
    times = [request.arrival_seconds for request in workload.requests]
    timed = tuple(TimedRequest(*pair) for pair in zip(times, requests, strict=True))
    return Round(index + 1, seed, timed)


def _usual_arrivals(workload: Workload) -> str:
    """What is taken when nobody says: a file's own times, or all at once."""
    return SATURATED if workload.requests[0].line is None else TRACE_ARRIVALS


def _lengths(tokens: Sequence[int]) -> dict[str, float | None]:
    summary = asdict(Distribution.of(tokens))
    rounded = {key: None if value is None else round(value, 1) for key, value in summary.items()}
    return {**rounded, "max": max(tokens)}
