from __future__ import annotations

import gc
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from gymnasium.utils.env_checker import data_equivalence

import batchpilot.env.registration  # noqa: F401
from batchpilot.agents.features import FEATURE_NAMES
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.batch_limits_env import BatchLimitsEnv
from batchpilot.env.env_parameters import VirtualEnvParameters

SMALL: dict[str, Any] = {
    "profile": "llama-3.1-8b-rtx4090",
    "workload": "fixed:64:32",
    "arrivals": "poisson:20",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_blocks": 64,
    "horizon_s": 3.0,
    "decision_interval_s": 0.5,
    "action_design": "absolute",
}
ENV_ID = "batchpilot/BatchLimits-v0"
HIGHEST = np.ones(2, np.float32)


@pytest.fixture
def make() -> Iterator[Any]:
    envs: list[gymnasium.Env[Any, Any]] = []

    def build(**settings: Any) -> BatchLimitsEnv:
        env = BatchLimitsEnv(**{**SMALL, **settings})
        envs.append(env)
        return env

    yield build
    for env in envs:
        env.close()


def play(env: gymnasium.Env[Any, Any], actions: Any, seed: int | None) -> list[Any]:
    """One episode: reset's and every step's results."""
    results: list[Any] = [env.reset(seed=seed)]
    for action in actions:
        results.append(env.step(action))
        if results[-1][3]:
            break
    return results


def random_actions(seed: int, count: int = 100) -> Any:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)


DESIGNS = ("absolute", "residual", "grid")


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_gymnasium_accepts_it(design: str):
    env = gymnasium.make(ENV_ID, **{**SMALL, "action_design": design, "history": 2})
    check_gymnasium_env(env.unwrapped)
    env.close()


@pytest.mark.parametrize("design", DESIGNS)
def test_stable_baselines_accepts_it(make: Any, design: str):
    check = pytest.importorskip("stable_baselines3.common.env_checker").check_env
    check(make(action_design=design, history=2), warn=True)


def test_one_seed_is_one_episode(make: Any):
    actions = random_actions(0)
    settings = {"noise": 0.1, "rate_spread": 2.0, "arrivals": "gamma:20:2"}
    env = make(**settings)
    first = play(env, actions, seed=5)
    between = play(env, random_actions(1), seed=6)
    again = play(env, actions, seed=5)
    elsewhere = play(make(**settings), actions, seed=5)
    assert len(first) > 5
    # To the last digit: comparing what `repr` shows tells any two floats apart.
    assert repr(first) == repr(again) == repr(elsewhere)
    assert repr(first) != repr(between)


def test_episodes_after_a_seed_differ_and_come_again(make: Any):
    env = make()
    seeds = [env.reset(seed=3)[1]["episode_seed"], env.reset()[1]["episode_seed"]]
    assert seeds[0] != seeds[1]
    assert seeds == [env.reset(seed=3)[1]["episode_seed"], env.reset()[1]["episode_seed"]]


def test_a_reset_in_the_middle_leaves_nothing_behind(make: Any):
    env = make()
    whole = play(env, random_actions(2), seed=8)
    env.reset(seed=9)
    env.step(HIGHEST)
    assert repr(play(env, random_actions(2), seed=8)) == repr(whole)


def test_actions_become_limits(make: Any):
    env = make(min_num_seqs=1, min_num_batched_tokens=64)
    env.reset(seed=0)
    *_, info = env.step(np.array([0.0, 0.0], np.float32))
    assert info["proposed_limits"] == {"max_num_seqs": 4, "max_num_batched_tokens": 128}
    assert info["applied_limits"] == {"max_num_seqs": 4, "max_num_batched_tokens": 128}
    assert (info["shielded"], info["shielded_share"]) == (False, 0.0)
    assert info["running"] <= 4


def test_the_shield_never_lets_running_requests_out(make: Any):
    env = make(workload="fixed:64:200", arrivals="saturated")
    env.reset(seed=0)
    *_, before = env.step(HIGHEST)
    *_, info = env.step(-HIGHEST)
    assert before["running"] > 1
    assert info["proposed_limits"]["max_num_seqs"] == 1
    assert info["applied_limits"]["max_num_seqs"] >= info["running"] > 1
    assert info["shielded"]
    assert info["shielded_share"] == 1.0


def test_the_reward_is_the_sum_of_its_terms(make: Any):
    env = make(arrivals="poisson:60", ttft_slo_ms=300, itl_slo_ms=25, slo_weight=0.25)
    env.reset(seed=0)
    inside = missed = 0
    for action in random_actions(4, 6):
        _, reward, _, _, info = env.step(action)
        penalties = (
            info["reward_slo_penalty"]
            + info["reward_preemption_penalty"]
            + info["reward_shield_penalty"]
        )
        assert reward == info["reward_goodput"] - penalties + info["reward_shaping"]
        assert info["reward_shield_penalty"] == 0.1 * info["shielded_share"]
        if info["inside"]:
            ratio = info["missed"] / info["inside"]
            assert info["reward_slo_penalty"] == pytest.approx(
                0.25 * ratio * info["reward_goodput"]
            )
        inside, missed = inside + info["inside"], missed + info["missed"]
        assert 0 <= info["cost"] <= 1
        assert info["slo_attainment"] == (inside / (inside + missed) if inside + missed else 1.0)
        assert info["goodput_tokens_per_s"] <= info["throughput_tokens_per_s"]
    assert inside > 0 < missed


@pytest.mark.parametrize("base", ["memory-peak", "memory+sla", "sla-guarded", "static"])
def test_the_action_0_is_the_base_policy_itself(make: Any, base: str):
    """In every engine step: as if the base steered alone."""
    settings = {"arrivals": "gamma:40:2", "itl_slo_ms": 25, "base_policy": base}
    directed = make(**settings, action_design="residual")
    alone = make(**settings, action_design="residual")
    limits = []
    for env, replaced in ((directed, False), (alone, True)):
        env.reset(seed=3)
        if replaced:
            env._opened.engine.set_policy(env.params.build_base_policy())
        limits.append([env.step(np.zeros(2, np.float32))[4]["applied_limits"] for _ in range(6)])
    assert limits[0] == limits[1]


def test_residual_actions_shift_what_the_base_decides(make: Any):
    env = make(action_design="residual", base_policy="static:max_num_seqs=4", tokens_span=4.0)
    env.reset(seed=0)
    asked = [env.step(np.array(a, np.float32))[4]["proposed_limits"] for a in ((-1, 0), (1, -1))]
    assert asked == [
        {"max_num_seqs": 2, "max_num_batched_tokens": 256},
        {"max_num_seqs": 8, "max_num_batched_tokens": 8 + 64},
    ]


def test_grid_actions_are_numbers(make: Any):
    env = make(action_design="grid", base_policy="static:max_num_seqs=4")
    assert env.action_space == gymnasium.spaces.Discrete(28)
    env.reset(seed=0)
    *_, info = env.step(np.int64(env.params.actions.neutral))
    assert info["proposed_limits"] == {"max_num_seqs": 4, "max_num_batched_tokens": 256}
    with pytest.raises(ValueError, match="action=28 must be a whole number from 0 to 27"):
        env.step(28)


def test_history_puts_observations_side_by_side(make: Any):
    env, plain = make(history=3), make()
    (first, _), (seen, _) = env.reset(seed=0), plain.reset(seed=0)
    assert first.tolist() == [*seen, *seen, *seen]
    rows = [seen]
    for action in random_actions(1, 4):
        stacked = env.step(action)[0]
        rows.append(plain.step(action)[0])
    assert env.observation_space.contains(stacked)
    assert stacked.tolist() == np.concatenate(rows[-3:]).tolist()


def test_shaping_adds_up_to_nothing_over_an_episode_that_ends_empty(make: Any):
    env = make(num_requests=20, arrivals="poisson:40", horizon_s=8.0, shaping_discount=1.0)
    results = play(env, [HIGHEST] * 100, seed=0)[1:]
    assert results[-1][4]["running"] == 0
    shaping = [result[4]["reward_shaping"] for result in results]
    assert max(shaping) > 0.05
    assert sum(shaping) == pytest.approx(0.0, abs=1e-12)


def test_capacity_sets_the_scale_of_the_reward(make: Any):
    plain, halved = make(capacity_tokens_per_s=100), make(capacity_tokens_per_s=200)
    rewards = []
    for env in (plain, halved):
        env.reset(seed=1)
        rewards.append(env.step(HIGHEST)[4]["reward_shaping"])
    assert rewards[0] == pytest.approx(2 * rewards[1])
    assert rewards[0] > 0


def test_the_capacity_is_about_what_saturation_gives(make: Any):
    env = make(
        workload="fixed:100:100", arrivals="saturated", itl_slo_ms=None, ttft_slo_ms=None,
        kv_blocks=2000, max_num_seqs=64, max_num_batched_tokens=2048, horizon_s=20.0,
        shaping_discount=1.0,
    )  # fmt: skip
    results = [result[4] for result in play(env, [HIGHEST] * 100, seed=0)[1:]]
    worth = sum(info["reward_goodput"] + info["reward_shaping"] for info in results[10:])
    seconds = results[-1]["clock_s"] - results[9]["clock_s"]
    assert worth * 0.5 / seconds == pytest.approx(1.0, abs=0.1)


def test_more_sequences_serve_more_when_requests_queue(make: Any):
    throughput = []
    for action in (-HIGHEST, HIGHEST):
        results = play(make(arrivals="saturated"), [action] * 100, seed=0)
        throughput.append(sum(result[4]["throughput_tokens_per_s"] for result in results[1:]))
    assert throughput[1] > 3 * throughput[0]


def test_it_is_truncated_at_the_horizon_and_never_terminated(make: Any):
    results = play(make(), [HIGHEST] * 100, seed=0)[1:]
    assert not any(result[2] for result in results)
    assert [result[3] for result in results] == [False] * (len(results) - 1) + [True]
    assert results[-2][4]["clock_s"] < 3.0 <= results[-1][4]["clock_s"]


def test_a_workload_that_runs_dry_leaves_the_engine_idle(make: Any):
    results = play(make(num_requests=1, arrivals="saturated"), [HIGHEST] * 100, seed=0)[1:]
    last = results[-1][4]
    assert sum(result[4]["finished"] for result in results) == 1
    assert (last["running"], last["waiting"], last["engine_steps"]) == (0, 0, 0)
    assert last["clock_s"] == pytest.approx(3.0, abs=0.5)


def test_a_trace_can_begin_anywhere(make: Any):
    env = make(workload="azure-2023-conv:prompt_max=400:output_max=50", arrivals=None,
               random_start=True, kv_blocks=500)  # fmt: skip
    arrived = []
    for seed in range(3):
        results = play(env, [HIGHEST] * 100, seed=seed)
        arrived.append(tuple(result[4]["arrived"] for result in results[1:]))
    assert len(set(arrived)) == 3


TRACE = "arrival_s,input_tokens,output_tokens\n0.25,20,5\n0.75,20,5\n2.25,20,5\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_a_trace_keeps_its_own_times_where_no_others_are_asked_for(trace: Path):
    settings = {key: value for key, value in SMALL.items() if key != "arrivals"}
    env = BatchLimitsEnv(**{**settings, "workload": str(trace)})
    arrived = [result[4]["arrived"] for result in play(env, [HIGHEST] * 100, seed=0)[1:]]
    env.close()
    assert arrived == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("workload: chat\narrivals: poisson:7", None, "poisson:7"),
        ("workload: chat\narrivals: poisson:7", "saturated", "saturated"),
        ("workload: chat", None, "gamma:4.5:3"),
        ("workload: trace.csv", None, None),
        ("workload: trace.csv\narrivals: poisson:7", None, "poisson:7"),
    ],
)
def test_whose_arrivals_count(
    trace: Path, tmp_path: Path, text: str, given: str | None, expected: str | None
):
    path = tmp_path / "workload.yaml"
    path.write_text(text)
    params = VirtualEnvParameters(workload=str(path), arrivals=given)
    assert params.workload_spec.arrivals == expected


def test_a_synthetic_workload_has_the_arrivals_of_its_environment():
    assert VirtualEnvParameters().workload_spec.arrivals == "gamma:4.5:3"
    assert VirtualEnvParameters(workload="chat").workload_spec.arrivals == "gamma:4.5:3"


def test_rendering(make: Any):
    env = make(render_mode="ansi")
    env.reset(seed=0)
    assert str(env.render()).startswith("episode of seed")
    env.step(HIGHEST)
    assert "limits 16/256" in str(env.render())
    assert make().render() is None
    assert make(render_mode="rgb_array").render() is None


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"profil": "x"}, "BatchLimits-v0: unknown key 'profil'; allowed: "),
        ({"horizon_s": 0}, "BatchLimits-v0: horizon_s=0.0 must be greater than 0"),
        ({"horizon_s": 0.1}, r"horizon_s=0\.1 must be at least decision_interval_s=0\.5"),
        ({"rate_spread": 0.5}, r"rate_spread=0\.5 must be at least 1"),
        ({"action_design": "polar"}, "action_design='polar' is not one of: absolute, residual"),
        ({"base_policy": "lucky"}, "unknown policy 'lucky'"),
        ({"history": 0}, "history=0 must be at least 1"),
        (
            {"random_start": True},
            "random_start=True needs a trace at its own times, not workload='fixed:64:32'",
        ),
        (
            {"random_start": True, "workload": "azure-2023-conv"},
            "not workload='azure-2023-conv' with arrivals='poisson:20'",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: str):
    with pytest.raises(ConfigError, match=error):
        BatchLimitsEnv(**{**SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"profile": "abacus"}, "no profile 'abacus'"),
        ({"workload": "poem"}, "unknown workload 'poem'"),
        ({"arrivals": "bus"}, "unknown arrivals 'bus'"),
        ({"workload": "fixed:2000:32"}, "request 0: 2000 prompt .* more than the 1008"),
        ({"min_num_seqs": 16}, "max_num_seqs: the lowest, 16, .* less than the highest, 16"),
    ],
)
def test_what_the_first_reset_refuses(make: Any, settings: dict[str, Any], error: str):
    with pytest.raises(ConfigError, match=error):
        make(**settings).reset(seed=0)


def test_unknown_options_and_a_step_too_early(make: Any):
    env = make()
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(HIGHEST)
    with pytest.raises(ConfigError, match="unknown option 'rate'"):
        env.reset(options={"rate": 3})


def test_vectors_of_environments():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv

    ours = gymnasium.make_vec(ENV_ID, num_envs=2, vectorization_mode="sync", **SMALL)
    ours.reset(seed=[0, 1])
    theirs = make_vec_env(ENV_ID, n_envs=2, env_kwargs=SMALL, vec_env_cls=DummyVecEnv)
    theirs.seed(0)
    first, second = ours.step(np.ones((2, 2), np.float32))[0], None
    theirs.reset()
    second = theirs.step(np.ones((2, 2), np.float32))[0]
    assert first.shape == second.shape == (2, len(FEATURE_NAMES))
    assert data_equivalence(first, second)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("kind", ["gymnasium", "stable_baselines3"])
def test_environments_in_processes(kind: str):
    """In an interpreter of their own: forking one that has vLLM's threads may lock up."""
    code = {
        "gymnasium": (
            "envs = gymnasium.make_vec(ID, num_envs=2, vectorization_mode='async', "
            "vector_kwargs={'context': 'spawn'}, **SMALL); envs.reset(seed=0); "
            "print(envs.step(np.ones((2, 2), np.float32))[0].shape)"
        ),
        "stable_baselines3": (
            "from stable_baselines3.common.env_util import make_vec_env; "
            "from stable_baselines3.common.vec_env import SubprocVecEnv; "
            "envs = make_vec_env(ID, n_envs=2, env_kwargs=SMALL, vec_env_cls=SubprocVecEnv, "
            "vec_env_kwargs={'start_method': 'spawn'}); envs.reset(); "
            "print(envs.step(np.ones((2, 2), np.float32))[0].shape)"
        ),
    }[kind]
    # A spawned process learns of the environments by the module in the id.
    env_id = f"batchpilot.env.registration:{ENV_ID}"
    program = (
        "import gymnasium, numpy as np\n"
        f"ID, SMALL = {env_id!r}, {SMALL!r}\n"
        "if __name__ == '__main__':\n"
        f"    {code}; envs.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith(f"(2, {len(FEATURE_NAMES)})\n"), done.stderr


def test_importing_the_registration_is_cheap():
    code = (
        "import sys, batchpilot.env.registration; "
        "print(*sorted({'vllm', 'torch', 'yaml'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (loaded.returncode, loaded.stdout.strip()) == (0, "")


def check_random_episodes(env: BatchLimitsEnv, episodes: range) -> None:
    """Plays random actions and checks what must hold in every interval of every episode."""
    actions = np.random.default_rng(episodes.start)
    for seed in episodes:
        env.reset(seed=seed)
        over, arrived, finished = False, 0, 0
        while not over:
            action = actions.uniform(-1, 1, 2).astype(np.float32)
            seen, reward, _, over, info = env.step(action)
            arrived, finished = arrived + info["arrived"], finished + info["finished"]
            assert env.observation_space.contains(seen)
            assert np.isfinite(reward)
            for name in ("max_num_seqs", "max_num_batched_tokens"):
                assert 1 <= info["applied_limits"][name] <= SMALL[name]
            assert info["kv_cache_usage"] <= 1.0
            assert info["running"] <= info["applied_limits"]["max_num_seqs"]
            check_no_request_is_lost(env, info, finished)


def check_no_request_is_lost(env: BatchLimitsEnv, info: dict[str, Any], finished: int) -> None:
    ledger = env._episode.ledger
    assert ledger.finished == finished
    assert ledger.arrived == ledger.finished + ledger.unfinished
    assert ledger.unfinished == info["running"] + info["waiting"]


CROWDED: dict[str, Any] = {
    **SMALL,
    "workload": "lognormal:60:40:0.8:0.8:300:200",
    "arrivals": "gamma:30:2",
    "horizon_s": 1.5,
    "decision_interval_s": 0.25,
}


def test_random_episodes_break_nothing(make: Any):
    check_random_episodes(make(**CROWDED), range(20))


@pytest.mark.slow
def test_a_thousand_random_episodes_break_nothing_and_leak_nothing(make: Any):
    env = make(**CROWDED)
    check_random_episodes(env, range(200))
    gc.collect()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_random_episodes(env, range(200, 1000))
    gc.collect()
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    # 800 episodes of some 45 requests: keeping only their prompts would be more than this.
    assert grown_kb < 16 * 1024
