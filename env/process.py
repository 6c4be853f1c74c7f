"""What must be set for this process before torch, transformers or vLLM is imported in it."""

from __future__ import annotations

import os


def prepare_process() -> None:
    """Sets what those libraries read from the environment; the user's own choices win.

    Threads that spin while they wait make vLLM crawl, ten times slower and more, on a CPU that
    others use too; threads that sleep cost a little on one that is idle. And nothing here needs a
    model hub.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
