from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.contest.scenario import estimated_capacity
from batchpilot.env.profiles import load_profile
from batchpilot.env.random_batch_limits_env import RandomBatchLimitsEnv
from batchpilot.env.reward import MeanLengths, profile_capacity
from batchpilot.env.scenarios import EngineChoice, Range, Scenario
from batchpilot.env.workloads import WorkloadSpec

SCENARIOS: dict[str, Any] = {
    "profiles": ["llama-3.1-8b-rtx4090", "qwen3-8b-a100"],
    "kv_shares": [0.05, 0.1],
    "max_num_seqs": [8, 16],
    "max_num_batched_tokens": [256],
    "prompt_mean": [20, 60],
    "output_mean": [5, 20],
}
SETTINGS: dict[str, Any] = {
    "scenarios": SCENARIOS,
    "horizon_s": 1.5,
    "decision_interval_s": 0.25,
    "base_policy": "memory-peak",
}
ZERO = np.zeros(2, np.float32)


@pytest.fixture
def make() -> Iterator[Any]:
    envs: list[RandomBatchLimitsEnv] = []

    def build(**changes: Any) -> RandomBatchLimitsEnv:
        envs.append(RandomBatchLimitsEnv(**{**SETTINGS, **changes}))
        return envs[-1]

    yield build
    for env in envs:
        env.close()


def play(env: RandomBatchLimitsEnv, seed: int | None) -> list[Any]:
    results: list[Any] = [env.reset(seed=seed)]
    while len(results) < 2 or not results[-1][3]:
        results.append(env.step(ZERO))
    return results


def test_both_checkers_accept_it(make: Any):
    check_gymnasium_env(make())
    pytest.importorskip("stable_baselines3.common.env_checker").check_env(make(), warn=True)


def test_episodes_differ_in_engine_load_and_targets(make: Any):
    env = make()
    env.reset(seed=0)
    seen = [env.reset()[1]["scenario"] for _ in range(12)]
    for key in ("profile", "kv_share", "max_num_seqs"):
        index = EngineChoice._fields.index(key)
        assert len({scenario["engine"][index] for scenario in seen}) == 2
    for key in ("prompt_mean", "load", "burstiness", "itl_slo_ratio", "ttft_slo_s"):
        assert len({scenario[key] for scenario in seen}) == 12


def test_one_seed_is_one_episode_on_whatever_engine_was_there_before(make: Any):
    env = make()
    first = play(env, 5)
    for seed in range(4):
        play(env, seed)
    assert repr(play(env, 5)) == repr(first) == repr(play(make(), 5))


def test_the_engine_and_the_targets_are_the_scenarios(make: Any):
    env = make()
    _, info = env.reset(seed=1)
    drawn = env.scenario
    facts = env._opened.engine.facts
    profile = load_profile(drawn.engine.profile)
    assert facts.startup_limits == BatchLimits(drawn.engine.max_num_seqs, 256)
    assert facts.total_blocks == round(profile.num_blocks * drawn.engine.kv_share) - 1
    assert env.params.ttft_slo_ms == 1e3 * drawn.ttft_slo_s
    assert info["scenario"]["load"] == drawn.load


def rate_of(chosen: dict[str, Any]) -> float:
    return float(chosen["arrivals"].split("=")[1].split(":")[0])


def test_the_load_is_relative_to_what_the_engine_can_finish():
    profile = load_profile("llama-3.1-8b-rtx4090")
    facts = EngineFacts(BatchLimits(64, 2048), 2587, 16)
    scenario = Scenario(EngineChoice("x", 1, 64, 2048), 300, 100, 0.5, 0.8, 1.0, 2.0, 1.5)
    chosen = scenario.settings(profile, facts)
    mean = MeanLengths.of(WorkloadSpec(chosen["workload"], None, 500).build().requests)
    within = estimated_capacity(
        replace(profile, num_blocks=2588), chosen["workload"], chosen["itl_slo_ms"]
    )
    assert rate_of(chosen) == pytest.approx(0.8 * within, rel=1e-4)
    # With a loose target, start-up limits and KV cache are what is left.
    loose = replace(scenario, itl_slo_ratio=50.0).settings(profile, facts)
    at_most = profile_capacity(profile.step_time, facts, mean) / mean.output_tokens
    assert rate_of(loose) == pytest.approx(0.8 * at_most, rel=1e-4)
    assert at_most > within
    alone_ms = 1e3 * profile.step_time.seconds(1, 0, round(mean.prompt_tokens))
    assert chosen["itl_slo_ms"] == pytest.approx(2 * alone_ms)
    assert chosen["ttft_slo_ms"] == 1500


@settings(max_examples=40, deadline=None)
@given(
    capacity_blocks=st.integers(4, 4000),
    prompt_mean=st.floats(1, 5000),
    output_mean=st.floats(1, 2000),
)
def test_every_request_fits_its_engine(
    capacity_blocks: int, prompt_mean: float, output_mean: float
):
    facts = EngineFacts(BatchLimits(8, 256), capacity_blocks, 16)
    scenario = Scenario(
        EngineChoice("x", 1, 8, 256), prompt_mean, output_mean, 1.0, 1.0, 1.0, 2.0, 1.0
    )
    workload = WorkloadSpec(scenario._workload(facts), None, 200).build()
    workload.check_fits(facts.kv_capacity_tokens)


@given(st.floats(0.001, 1000), st.floats(1, 1000), st.integers(0, 100))
def test_ranges_are_drawn_between_their_ends(low: float, factor: float, seed: int):
    drawn = Range(low, low * factor).draw(np.random.default_rng(seed))
    assert low * (1 - 1e-12) <= drawn <= low * factor * (1 + 1e-12)


@pytest.mark.parametrize(
    ("scenarios", "error"),
    [
        ({"gpu": ["x"]}, "scenarios: unknown key 'gpu'; allowed: profiles, kv_shares"),
        (
            {"load": [2, 1]},
            r"scenarios: load=\[2.0, 1.0\] must be two numbers with 0 < low <= high",
        ),
        ({"load": [0, 1]}, "load=.* must be two numbers with 0 < low"),
        ({"load": 1}, "load=1 is not a list"),
        ({"load": [1]}, r"load=\[1\] must be two numbers"),
        ({"load": [1, True]}, "must be two numbers"),
        ({"profiles": []}, "profiles is an empty list"),
        ({"max_num_seqs": [8.5]}, "must be numbers above 0"),
    ],
)
def test_ranges_that_cannot_be(make: Any, scenarios: dict[str, Any], error: str):
    with pytest.raises(ConfigError, match=error):
        make(scenarios=scenarios)


def test_what_is_drawn_cannot_be_set(make: Any):
    with pytest.raises(ConfigError, match="profile is drawn in each episode; set it in `scenar"):
        make(profile="llama-3.1-8b-h100")
