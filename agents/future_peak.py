"""Rule 1c: the peak of future KV memory, and how many waiting requests it leaves room for.

After LightLLM's Past-Future scheduler (arXiv:2507.10150). Every decoding sequence grows one token
a step until it finishes, then frees all it holds. Memory can therefore only peak at the moment a
sequence finishes, so the whole future is known from one sort.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Peak(NamedTuple):
    """The moment at which the most KV memory is held.

    Attributes:
        tokens: KV tokens held then.
        after_tokens: Decode steps until then.
    """

    tokens: float
    after_tokens: float


def future_peak(held: NDArray[Any], remaining: NDArray[Any]) -> Peak:
    """The most KV tokens that these sequences will ever hold together, and when.

    With sequences sorted by `remaining` r, longest first, memory when the k-th finishes is
    `sum(held[:k]) + k * r[k]`, and the peak is its maximum over k. The finishing token counts: a
    sequence holds `held + remaining` in its last step and is freed after it.

    Args:
        held: KV tokens each sequence holds now; shape (n,).
        remaining: Output tokens each still generates, 0 or more; shape (n,).

    Returns:
        The peak; (0, 0) for no sequence.

    Raises:
        ValueError: The shapes differ.
    """
    _check_shapes(held, remaining)
    if not len(held):
        return Peak(0.0, 0.0)
    order = np.argsort(-remaining)
    by_length = remaining[order]
    memory = np.cumsum(held[order]) + np.arange(1, len(held) + 1) * by_length
    worst = int(np.argmax(memory))
    return Peak(float(memory[worst]), float(by_length[worst]))


def admissible(
    held: NDArray[Any],
    remaining: NDArray[Any],
    new_held: NDArray[Any],
    new_remaining: NDArray[Any],
    capacity: float,
) -> int:
    """How many waiting requests can start, in queue order, without the peak passing `capacity`.

    One more sequence never lowers the peak, so a binary search finds the answer; everything is
    sorted once and each try only masks.

    Args:
        held: KV tokens each running sequence holds; shape (n,).
        remaining: Output tokens each running sequence still generates; shape (n,).
        new_held: KV tokens each waiting request needs to start, in queue order; shape (m,).
        new_remaining: Output tokens each waiting request will generate; shape (m,).
        capacity: Tokens the peak may reach.

    Returns:
        The largest j in 0..m whose first j waiting requests fit beside all running ones; 0 also
        when the running ones alone pass `capacity`.

    Raises:
        ValueError: The shapes differ.
    """
    _check_shapes(held, remaining)
    _check_shapes(new_held, new_remaining)
    all_held = np.concatenate((held, new_held)).astype(np.float64)
    all_remaining = np.concatenate((remaining, new_remaining)).astype(np.float64)
    order = np.argsort(-all_remaining)
    sorted_held, sorted_remaining = all_held[order], all_remaining[order]

    fits, too_many = 0, len(new_held) + 1
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        present = order < len(held) + tried
        # An absent sequence sits below a present one with no more memory: it cannot be the peak.
        memory = np.cumsum(sorted_held * present) + np.cumsum(present) * sorted_remaining
        if memory.max() <= capacity:
            fits = tried
        else:
            too_many = tried
    return fits


def _check_shapes(held: NDArray[Any], remaining: NDArray[Any]) -> None:
    if held.shape != remaining.shape:
        raise ValueError(
            f"held has shape {held.shape} and remaining {remaining.shape}; "
            "give one value of each per sequence"
        )
