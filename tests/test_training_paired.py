"""Training episodes that are rewarded for what they gain over the base policy."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from training_runs import ENVIRONMENT

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.paired_env import PAIRED_SEED, PairedEnv, _Base
from batchpilot.agents.training.recipes import EnvRecipe
from batchpilot.agents.training.replayable import ReplayableEnv
from batchpilot.env.batch_limits_env import BatchLimitsEnv

ZERO = np.zeros(2, np.float32)
FEW = np.array([-1.0, -1.0], np.float32)


def paired(episodes: int = 2, **settings: Any) -> PairedEnv:
    return PairedEnv(BatchLimitsEnv(**{**ENVIRONMENT, **settings}), episodes)


def rewards(env: Any, action: Any) -> list[float]:
    """Of the rest of the episode."""
    found, over = [], False
    while not over:
        _, reward, _, over, _ = env.step(action)
        found.append(float(reward))
    return found


def test_the_base_policy_gains_nothing_over_itself():
    env = paired()
    for _ in range(3):
        env.reset()
        assert rewards(env, ZERO) == [0.0] * 12
    env.close()


@pytest.mark.parametrize("action", [FEW, -FEW])
def test_an_episodes_rewards_sum_up_to_what_it_gained_over_the_base(action):
    plain = BatchLimitsEnv(**ENVIRONMENT)
    sums = []
    for played in (ZERO, action):
        plain.reset(seed=PAIRED_SEED)
        sums.append(sum(rewards(plain, played)))
    env = paired(episodes=1)
    env.reset()
    assert sum(rewards(env, action)) == pytest.approx(sums[1] - sums[0], abs=1e-9)
    assert sums[1] != sums[0]
    plain.close(), env.close()


def test_the_base_is_subtracted_by_engine_time_not_by_number_of_intervals():
    base = _Base(ends=[1.0, 2.0, 4.0], rewards=[10.0, 20.0, 8.0])
    assert base.between(0.0, 1.0) == 10.0
    assert base.between(0.5, 1.25) == 5.0 + 5.0
    assert base.between(1.0, 3.0) == 20.0 + 4.0
    assert base.between(3.5, math.inf) == 2.0
    assert base.between(4.5, math.inf) == 0.0


def test_the_number_of_the_neutral_action_stands_for_the_base():
    env = paired(action_design="grid")
    env.reset(seed=3)
    assert rewards(env, env.unwrapped._design.neutral) == [0.0] * 12
    env.close()


def test_a_seed_decides_the_series_whatever_was_played_before():
    first, second = paired(5), paired(5)
    for _ in range(3):
        second.reset()
    series = []
    for env in (first, second):
        seen = [env.reset(seed=7)[1]["episode_seed"]]
        seen += [env.reset()[1]["episode_seed"] for _ in range(6)]
        series.append(seen)
        env.close()
    assert series[0] == series[1]
    assert 1 < len(set(series[0])) <= 5


def test_it_is_played_again_to_the_last_digit():
    env = ReplayableEnv(paired(4))
    env.reset(seed=4)
    env.reset()
    for _ in range(5):
        seen = env.step(FEW)[0]
    state = json.loads(json.dumps(env.get_state()))
    again = ReplayableEnv(paired(4))
    again.reset(seed=77)
    assert again.set_state(state).tolist() == seen.tolist()
    for _ in range(10):
        assert repr(env.step(FEW)[:2]) == repr(again.step(FEW)[:2])
    assert repr(env.reset()) == repr(again.reset())
    env.close(), again.close()


def test_absolute_actions_have_no_base_to_be_paired_with():
    with pytest.raises(ConfigError, match="needs an action design with a base policy"):
        paired(action_design="absolute")
    recipe = EnvRecipe("virtual", {**ENVIRONMENT, "action_design": "absolute"})
    assert recipe.paired(8).paired_episodes == 0
    assert EnvRecipe("live").paired(8).paired_episodes == 0
    assert EnvRecipe("virtual", ENVIRONMENT).paired(8).paired_episodes == 8
