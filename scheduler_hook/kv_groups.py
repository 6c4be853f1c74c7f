"""What the groups of vLLM's KV cache keep of a sequence.

Layers of one kind form groups, and all groups take their blocks from one pool. Only some of them
hold every token: those with a sliding window or chunks give older blocks back, Mamba layers hold
one state. Kinds are told by the names of vLLM's classes, which older releases have fewer of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchpilot.agents.kv_growth import EVERY_TOKEN, KvGrowth

#: Kinds of layers that keep the newest tokens only, and the attribute that says how many.
WINDOWS = {
    "SlidingWindowSpec": "sliding_window",
    "ChunkedLocalAttentionSpec": "attention_chunk_size",
}
#: Kinds that keep as much of any sequence, in whole blocks.
CONSTANT = {"MambaSpec", "CrossAttentionSpec", "CircularBufferSpec"}


def kv_growth(groups: Sequence[Any], block_size: int) -> KvGrowth:
    """How a sequence's share of the pool grows with its context.

    Args:
        groups: The scheduler's KV cache groups.
        block_size: Tokens per block of those that hold tokens.
    """
    kept = [_kept_tokens(group.kv_cache_spec, block_size) for group in groups]
    windows = [tokens for tokens in kept if tokens is not None]
    if not windows:
        return EVERY_TOKEN
    return KvGrowth(1 - len(windows) / len(kept), round(sum(windows) / len(windows)))


def block_tokens(groups: Sequence[Any], scheduler_block_size: int, context_parallel: int) -> int:
    """Tokens per block of the groups that hold tokens.

    The scheduler's own block size is what all groups' have in common, which for a Mamba state that
    covers the longest context is no measure of anything.

    Args:
        groups: The scheduler's KV cache groups.
        scheduler_block_size: The scheduler's.
        context_parallel: Ranks that share the tokens of a block between them.
    """
    sizes = {group.kv_cache_spec.block_size for group in groups}
    if len(sizes) == 1:
        return scheduler_block_size
    holding = [
        group.kv_cache_spec.block_size
        for group in groups
        if not _names(group.kv_cache_spec) & CONSTANT
    ]
    return min(holding) * context_parallel if holding else scheduler_block_size


def _kept_tokens(spec: Any, block_size: int) -> int | None:
    """Tokens that a group keeps of a sequence at most; None where it keeps all."""
    names = _names(spec)
    for name, attribute in WINDOWS.items():
        if name in names:
            return int(getattr(spec, attribute))
    if names & CONSTANT and getattr(spec, "mamba_cache_mode", "none") != "all":
        return block_size
    return None


def _names(spec: Any) -> set[str]:
    return {kind.__name__ for kind in type(spec).__mro__}
