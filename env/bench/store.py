"""Finished runs on disk, so that a bench that was interrupted goes on where it stopped.

A run is kept under the digest of everything that decides it: its settings, the profile, the
requests, and those of batchpilot's own sources that it goes through. What is found under that name
is what would come out again, for a virtual engine repeats itself exactly. Files are plain arrays;
nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from batchpilot.agents.limits import BatchLimits
from batchpilot.env.bench.measure import RunMeasurement, Sample
from batchpilot.env.bench.results import write_whole

_LOG = logging.getLogger(__name__)

_NUMBERS = (
    "submitted",
    "completed",
    "failed",
    "duration_s",
    "output_tokens",
    "preemptions",
    "recomputed_tokens",
    "requests_inside_slo",
    "slo_is_set",
)
_ARRAYS = ("itl_ms", "tpot_ms", "ttft_ms")
_COLUMNS = ("seconds", "counts", "limits", "usage", "shadow")


def digest(values: Mapping[str, Any]) -> str:
    """The name of what these JSON values decide."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def keep(path: Path, content: str | bytes) -> None:
    """Writes a file that only spares time later: what cannot be kept is warned of and not lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        _warn_once(path.parent, error.strerror or str(error))


@cache
def _warn_once(folder: Path, reason: str) -> None:
    """Says it once a process: a full disk would have it said of every run."""
    _LOG.warning("finished runs cannot be kept in %s: %s; no result is lost", folder, reason)


class RunStore:
    """A folder of finished runs.

    Args:
        folder: Where they are; made when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        """Names the folder."""
        self._folder = folder

    def load(self, name: str) -> RunMeasurement | None:
        """A finished run; None where there is none that can be read."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as content:
                return _from_arrays(content)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            _LOG.warning("%s cannot be read (%s): that run is done again", path, error)
            return None

    def save(self, name: str, measured: RunMeasurement) -> None:
        """Keeps a finished run, if it can."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **_to_arrays(measured))
        keep(self._path(name), buffer.getvalue())

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"


def _to_arrays(measured: RunMeasurement) -> dict[str, Any]:
    samples = measured.timeline
    limits = [(s.limits.max_num_seqs, s.limits.max_num_batched_tokens) for s in samples]
    counts = [(s.running, s.waiting, s.preemptions) for s in samples]
    return {
        **{name: np.array(getattr(measured, name)) for name in (*_NUMBERS, *_ARRAYS)},
        "seconds": np.array([sample.seconds for sample in samples]),
        "usage": np.array([sample.kv_cache_usage for sample in samples]),
        "limits": np.array(limits, dtype=np.int64).reshape(-1, 2),
        "counts": np.array(counts, dtype=np.int64).reshape(-1, 3),
        "shadow": np.array([_pair(s.shadow) for s in samples], dtype=np.int64).reshape(-1, 2),
    }


def _pair(limits: BatchLimits | None) -> tuple[int, int]:
    """A pair of limits as numbers; zeros, which no engine has, where there is none."""
    return (limits.max_num_seqs, limits.max_num_batched_tokens) if limits else (0, 0)


def _from_arrays(content: Mapping[str, Any]) -> RunMeasurement:
    known: dict[tuple[int, int], BatchLimits] = {}
    samples = []
    columns = [content[name].tolist() for name in _COLUMNS]
    for seconds, counts, pair, usage, beside in zip(*columns, strict=True):
        running, waiting, preemptions = counts
        limits = known.setdefault(tuple(pair), BatchLimits(*pair))
        shadow = known.setdefault(tuple(beside), BatchLimits(*beside)) if beside[0] else None
        samples.append(Sample(seconds, running, waiting, limits, usage, preemptions, shadow))
    numbers = {name: content[name].item() for name in _NUMBERS}
    arrays = {name: content[name] for name in _ARRAYS}
    return RunMeasurement(**numbers, **arrays, timeline=tuple(samples))
