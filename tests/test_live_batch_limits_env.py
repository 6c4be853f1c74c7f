from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from bench_engine import QueueEngine
from gymnasium.utils.env_checker import check_env

import batchpilot.env.registration  # noqa: F401
from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.engine import EngineRequest
from batchpilot.env.live_batch_limits_env import (
    LiveBatchLimitsEnv,
    LiveEnvParameters,
    measured_capacity,
)

ENV_ID = "batchpilot/LiveBatchLimits-v0"
SMALL: dict[str, Any] = {
    "model": "tiny",
    "workload": "fixed:20:20",
    "arrivals": "poisson:40",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_blocks": 65,
    "horizon_s": 1.0,
    "decision_interval_s": 0.2,
    "capacity_probe_s": 1.0,
}


def test_capacity_is_measured_in_the_steady_state():
    engine = QueueEngine(max_num_seqs=8, total_blocks=1000)
    endless = (EngineRequest(f"r{i}", [1] * 5, 10) for i in range(10**6))
    # Steps of 10 ms give each of 8 sequences a token.
    assert measured_capacity(engine, endless, 2.0) == pytest.approx(800, rel=0.02)
    assert not engine.has_unfinished_requests()
    assert engine.facts == EngineFacts(BatchLimits(8, 1024), 1000, 1)


def test_it_is_registered_as_what_it_is():
    spec = gymnasium.spec(ENV_ID)
    assert spec.nondeterministic
    with pytest.raises(ConfigError, match="LiveBatchLimits-v0: unknown key 'profile'"):
        gymnasium.make(ENV_ID, profile="llama-3.1-8b-h100")


def test_only_a_synthetic_workload_has_the_arrivals_of_the_environment():
    assert LiveEnvParameters().workload_spec.arrivals == "poisson:2"
    assert LiveEnvParameters(workload="azure-2023-conv").workload_spec.arrivals is None


@pytest.mark.live
def test_a_live_engine_is_steered():
    env = gymnasium.make(ENV_ID, render_mode="ansi", **SMALL)
    unwrapped = env.unwrapped
    assert isinstance(unwrapped, LiveBatchLimitsEnv)
    check_env(unwrapped, skip_render_check=True, skip_close_check=True)
    env.reset(seed=0)
    finished = tokens = 0
    for action in ((1.0, 1.0), (0.0, 1.0), (-1.0, -1.0), (1.0, 1.0), (1.0, 1.0)):
        seen, reward, terminated, over, info = env.step(np.array(action, np.float32))
        assert env.observation_space.contains(seen)
        assert np.isfinite(reward)
        finished += info["finished"]
        tokens += info["throughput_tokens_per_s"]
        if info["engine_steps"]:
            applied = info["applied_limits"]["max_num_seqs"]
            assert 1 <= applied <= 16
            assert info["shielded"] == (info["proposed_limits"] != info["applied_limits"])
    assert over and not terminated
    assert finished > 0
    assert tokens > 0
    assert "limits 16/256" in str(env.render())
    env.close()
