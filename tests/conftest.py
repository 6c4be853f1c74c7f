"""Fixtures shared by tests of several modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig

# How long an example takes says nothing on a busy machine.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SMALL = {
    "model": "tiny",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_blocks": 65,
    "block_size": 32,
    "max_model_len": 1024,
}


@pytest.fixture(scope="module")
def tiny_engine(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., LiveEngine]]:
    """Starts real engines on the tiny model, `tiny_engine(max_num_seqs=8)`, and closes them.

    vLLM takes one engine a process, so a second call closes the first engine.
    """
    engines: list[LiveEngine] = []

    def start(**settings: object) -> LiveEngine:
        while engines:
            engines.pop().close()
        engines.append(LiveEngine(LiveEngineConfig(**{**SMALL, **settings})))
        return engines[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHPILOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield start
        while engines:
            engines.pop().close()
