"""Models whose layers do not all keep every token, on vLLM's real KV-cache manager."""

import random

import pytest
import torch
from driving import build_core, drive
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.kv_growth import EVERY_TOKEN, KvGrowth
from batchpilot.env import scheduler_core
from batchpilot.env.engine import EngineRequest
from batchpilot.scheduler_hook.kv_groups import block_tokens, kv_growth

ATTENTION = {"block_size": 16, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
FULL = FullAttentionSpec(**ATTENTION)
SLIDING = SlidingWindowSpec(**ATTENTION, sliding_window=64)
CHUNKED = ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=512)


def mamba(mode="none", block_size=4096):
    return MambaSpec(
        block_size=block_size, shapes=((32,),), dtypes=(torch.float32,), mamba_cache_mode=mode
    )


def groups(*specs):
    return [KVCacheGroupSpec([f"layer{place}"], spec) for place, spec in enumerate(specs)]


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([FULL], EVERY_TOKEN),
        ([FULL, FULL], EVERY_TOKEN),
        ([FULL, SLIDING], KvGrowth(0.5, 64)),
        ([FULL, SLIDING, CHUNKED, SLIDING], KvGrowth(0.25, 213)),
        ([FULL, mamba(), mamba(), mamba()], KvGrowth(0.25, 16)),
        ([FULL, mamba("align")], KvGrowth(0.5, 16)),
        ([FULL, mamba("all")], EVERY_TOKEN),  # a state for each block
        ([mamba()], KvGrowth(0.0, 16)),
    ],
)
def test_growth_is_read_off_the_kinds_of_layers(specs, expected):
    assert kv_growth(groups(*specs), 16) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("specs", "of_scheduler", "ranks", "expected"),
    [
        ([FULL], 16, 1, 16),
        ([FULL], 32, 2, 32),  # the scheduler's has the ranks in it
        ([FULL, SLIDING], 16, 1, 16),
        ([FULL, mamba()], 4096, 1, 16),  # the state of a whole context is no measure of a block
        ([FULL, mamba()], 4096, 2, 32),
        ([mamba()], 4096, 1, 4096),
    ],
)
def test_a_block_has_the_tokens_of_layers_that_hold_tokens(specs, of_scheduler, ranks, expected):
    assert block_tokens(groups(*specs), of_scheduler, ranks) == expected


def saturated(policy, **config):
    """Long answers in a cache that binds: steps it took, preemptions, mean use of the cache."""
    core = build_core(max_num_seqs=128, kv_blocks=1201, max_num_batched_tokens=1024, **config)
    scheduler, hook = core.scheduler, core.hook
    hook.set_policy(PolicySpec.parse(policy).build())
    rng = random.Random(0)
    requests = [
        EngineRequest(
            f"r{place}",
            [rng.randrange(3, 900) for _ in range(rng.randrange(20, 100))],
            rng.randrange(200, 600),
        )
        for place in range(100)
    ]
    uses = []
    run = drive(core, requests, before_step=lambda _: uses.append(scheduler.kv_cache_manager.usage))
    assert len(run.finished) == len(requests)
    middle = uses[len(uses) // 4 : len(uses) // 2]
    return len(run.steps), hook.stats.preemptions, sum(middle) / len(middle)


@pytest.mark.parametrize("policy", ["memory-peak", "predictive"])
def test_where_most_layers_keep_a_window_the_cache_is_filled_all_the_same(policy, monkeypatch):
    specs = [FULL, *[SLIDING] * 5]
    monkeypatch.setattr(scheduler_core, "_kv_cache_groups", lambda _: groups(*specs))
    stock_steps, stock_preemptions, _ = saturated("static", enable_prefix_caching=False)
    steps, preemptions, use = saturated(policy, enable_prefix_caching=False)
    assert use > 0.85
    assert preemptions < 0.6 * stock_preemptions
    assert steps < 1.05 * stock_steps
