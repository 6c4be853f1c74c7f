"""What a bench found, as `results.json`, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.capacity import Capacity
from batchpilot.env.bench.measure import Distribution, Sample
from batchpilot.env.bench.runner import BenchRun

SCHEMA = 1
TIMELINE_POINTS = 400


@dataclass(frozen=True)
class BenchResults:
    """Everything a bench found.

    Attributes:
        engine: Kind of engine, such as "live".
        model: The model's name.
        workload: What was served, as JSON values.
        config: Every setting of the bench, as JSON values.
        environment: What it ran on, as JSON values.
        command: The command line that runs it again.
        runs: In the order they ran; after a search for capacity, each policy's at its own.
        capacity: What each policy can serve, where that was searched for.
    """

    engine: str
    model: str
    workload: Mapping[str, Any]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: str
    runs: tuple[BenchRun, ...]
    capacity: tuple[Capacity, ...] = ()

    @property
    def policies(self) -> tuple[str, ...]:
        """The contestants, as they ran in the first round."""
        return tuple(dict.fromkeys(run.policy for run in self.runs))

    def of(self, policy: str) -> list[BenchRun]:
        """One contestant's runs, by round."""
        return [run for run in self.runs if run.policy == policy]

    def to_json(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            "schema": SCHEMA,
            "engine": self.engine,
            "model": self.model,
            "workload": dict(self.workload),
            "config": dict(self.config),
            "environment": dict(self.environment),
            "command": self.command,
            **({"capacity": [c.to_json() for c in self.capacity]} if self.capacity else {}),
            "runs": [run_to_json(run) for run in self.runs],
        }


def run_to_json(run: BenchRun) -> dict[str, Any]:
    """One entry of `runs`."""
    measured = run.measurement
    return {
        "policy": run.policy,
        "round": run.round,
        "seed": run.seed,
        "submitted": measured.submitted,
        "completed": measured.completed,
        "failed": measured.failed,
        "duration_s": measured.duration_s,
        "output_tokens": measured.output_tokens,
        "output_tokens_per_s": measured.output_tokens_per_s,
        "preemptions": measured.preemptions,
        "recomputed_tokens": measured.recomputed_tokens,
        "itl_ms": asdict(Distribution.of(measured.itl_ms)),
        "tpot_ms": asdict(Distribution.of(measured.tpot_ms)),
        "ttft_ms": asdict(Distribution.of(measured.ttft_ms)),
        "slo_attainment": measured.slo_attainment,
        "goodput_per_s": measured.goodput_per_s,
        "mean_running": measured.mean_running,
        "peak_running": measured.peak_running,
        "timeline": timeline_to_json(measured.timeline),
    }


def timeline_to_json(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """The samples in columns, thinned to what a plot can show."""
    kept = thin(samples, TIMELINE_POINTS)
    beside = [sample.shadow for sample in kept]
    shadow: dict[str, list[float]] = {}
    if any(beside):  # where it has failed, zero
        shadow["shadow_max_num_seqs"] = [s.max_num_seqs if s else 0 for s in beside]
        shadow["shadow_max_num_batched_tokens"] = [
            s.max_num_batched_tokens if s else 0 for s in beside
        ]
    return {
        "t_s": [round(sample.seconds, 4) for sample in kept],
        "running": [sample.running for sample in kept],
        "waiting": [sample.waiting for sample in kept],
        "max_num_seqs": [sample.limits.max_num_seqs for sample in kept],
        "max_num_batched_tokens": [sample.limits.max_num_batched_tokens for sample in kept],
        "kv_cache_usage": [round(sample.kv_cache_usage, 4) for sample in kept],
        "preemptions": [sample.preemptions for sample in kept],
        **shadow,
    }


def thin(samples: Sequence[Sample], points: int) -> list[Sample]:
    """At most `points` samples, even in time, the last one among them.

    Each is the newest at its moment, so that counters stay exact wherever they are read.
    """
    if len(samples) <= points:
        return list(samples)
    seconds = np.array([sample.seconds for sample in samples])
    moments = np.linspace(seconds[0], seconds[-1], points)
    newest = np.unique(np.searchsorted(seconds, moments, side="right") - 1)
    return [samples[index] for index in newest]


def to_json_text(results: BenchResults) -> str:
    """The text of `results.json`; numbers that JSON does not know are errors."""
    return json.dumps(results.to_json(), indent=1, allow_nan=False) + "\n"


def check_writable(path: Path) -> None:
    """Makes the folder of a file to be written, and tries that it can be written there.

    Raises:
        ConfigError: It is a folder or no regular file, or cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise ConfigError(f"cannot write {path}: it is not a regular file")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"cannot write {path}: permission denied")
    try:
        _try_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def check_folder(setting: str, folder: Path) -> None:
    """Makes a folder of files to be written, and tries that they can be written there.

    Args:
        setting: The setting that names it, for the error.
        folder: The folder.

    Raises:
        ConfigError: It is a file, or cannot be made or written.
    """
    try:
        _try_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"{setting}={str(folder)!r} is no folder to write in: {error.strerror}"
        ) from None


def _try_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there: never half a file, never a lost one.

    Raises:
        OSError: The disk is full, or the folder has gone.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = path.resolve()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's umask, which only setting it tells."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
