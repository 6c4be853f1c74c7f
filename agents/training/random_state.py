"""The state of every source of chance in this process, as values that JSON and npz can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def read_random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's global generators, as JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
    }


def write_random_state(state: dict[str, Any]) -> None:
    """Puts the generators back to where `read_random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves chance as it was, whatever is drawn inside: an evaluation must not change training."""
    state = read_random_state()
    try:
        yield
    finally:
        write_random_state(state)
