"""From settings to a profile: starts the engine, measures it, fits what it measured."""

from __future__ import annotations

import json
import re
from typing import Any

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.environment import cpu_model, usable_cores, vllm_version
from batchpilot.env.bench.results import check_writable
from batchpilot.env.calibrate.fit import StepTimeFit, fit_step_times
from batchpilot.env.calibrate.measure import FULL_GRID, QUICK_GRID, Cell, Progress, measure, noise
from batchpilot.env.calibrate.settings import CalibrateSettings
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig
from batchpilot.env.models import ModelSource, longest_that_fits, resolve_model
from batchpilot.env.profiles import GpuProfile

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def calibrate(settings: CalibrateSettings, progress: Progress) -> tuple[GpuProfile, list[Cell]]:
    """Starts an engine, measures it and fits a profile.

    Args:
        settings: What to calibrate.
        progress: Told of each part of the measurements.

    Returns:
        The profile, and the cells it was fitted to.

    Raises:
        ConfigError: A setting that cannot be used.
        EngineStalledError: The engine gives no tokens any more.
    """
    model = resolve_model(settings.model)
    kv_bytes = kv_bytes_per_token(model)
    for path in settings.output_files:
        check_writable(path)
    config = LiveEngineConfig(
        model=settings.model,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_blocks=settings.kv_blocks or None,
        block_size=settings.block_size,
        max_model_len=longest_that_fits(model, settings.kv_blocks, settings.block_size),
        # Every prompt is to be computed, whatever was there before.
        enable_prefix_caching=False,
    )
    with LiveEngine(config) as engine:
        cells = measure(
            engine,
            QUICK_GRID if settings.quick else FULL_GRID,
            max_model_len=engine.max_model_len,
            vocab_size=model.vocab_size,
            seed=settings.seed,
            progress=progress,
        )
        # vLLM keeps a block that requests cannot use; a profile counts it.
        num_blocks, max_model_len = engine.facts.total_blocks + 1, engine.max_model_len
    fit = fit_step_times([cell.sample for cell in cells])
    device = _device_name()
    profile = GpuProfile(
        name=settings.name or profile_name(settings.model, device),
        model=settings.model,
        gpu=device,
        tensor_parallel=1,
        kv_bytes_per_token=kv_bytes,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        max_model_len=max_model_len,
        step_time=fit.model,
        noise=noise(cells),
        source=_source(fit, cells),
        licence="Apache-2.0",
        fit_error=fit.error,
    )
    return profile, cells


def profile_name(model: str, device: str) -> str:
    """`<model>-<device>` in the letters a profile's name may have."""
    kind = "cpu" if device.startswith("CPU") else device.removeprefix("NVIDIA ")
    text = f"{model.rstrip('/').rpartition('/')[2]}-{kind}".lower()
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.")


def kv_bytes_per_token(model: ModelSource) -> int:
    """KV-cache bytes of a token, from the model's configuration.

    Raises:
        ConfigError: The configuration does not say.
    """
    path = model.path / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    try:
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * _BYTES[dtype])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot tell the KV cache's size: {error} is unknown") from None


def _device_name() -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"CPU, {cpu_model() or 'unknown'}, {usable_cores()} cores"
    return str(current_platform.get_device_name())


def _source(fit: StepTimeFit, cells: list[Cell]) -> str:
    steps = sum(cell.steps for cell in cells)
    return (
        f"measured by batchpilot calibrate: {steps} steps of vLLM {vllm_version()} in "
        f"{len(cells)} cells, fitted to the median of each; the engine's overhead is in the "
        f"coefficients (fit error {fit.error.mean_relative:.1%})"
    )
