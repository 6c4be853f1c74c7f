from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.algorithms import ALGORITHMS
from batchpilot.agents.training.hyperparameters import (
    PpoHyperparameters,
    SacHyperparameters,
    flatten,
    read_zoo_file,
    schedule,
)
from batchpilot.agents.training.run_config import make_run_config, read_run_config
from batchpilot.agents.training.tune import _with_values


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_bundled_file_fits_its_algorithm(name: str):
    values = read_zoo_file(None, name, "batchpilot/RandomBatchLimits-v0")
    read = ALGORITHMS[name].hyperparameters.from_mapping(values, where=name)
    assert read.layers
    assert callable(read.policy_arguments)


def test_the_zoos_form_becomes_arguments():
    values = flatten(
        {
            "learning_rate": "lin_0.001",
            "clip_range": 0.1,
            "normalize": {"norm_reward": True},
            "policy_kwargs": {"net_arch": [32, 16], "activation_fn": "relu", "log_std_init": -2},
        },
        where="here",
    )
    read = PpoHyperparameters.from_mapping(values, where="here")
    arguments = read.arguments()
    assert arguments["clip_range"] == 0.1
    assert [arguments["learning_rate"](left) for left in (1.0, 0.5, 0.0)] == [0.001, 0.0005, 0.0]
    assert read.policy_arguments() == {
        "net_arch": {"pi": [32, 16], "vf": [32, 16]},
        "log_std_init": -2.0,
    }
    assert read.norm_reward
    assert "norm_reward" not in arguments


def test_the_entropys_weight_is_a_number_or_learned():
    assert SacHyperparameters(ent_coef="0.2").arguments()["ent_coef"] == 0.2
    assert SacHyperparameters(ent_coef="auto_0.1").arguments()["ent_coef"] == "auto_0.1"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'"),
        ({"learning_rate": "__import__('os')"}, "neither a number from 0 nor lin_NUMBER"),
        ({"learning_rate": -1}, "neither a number"),
        ({"clip_range": "lin_x"}, "clip_range='x' is neither"),
        ({"net_arch": "64,x"}, "net_arch='64,x' is not a list of whole numbers"),
        ({"activation_fn": "nn.ReLU"}, "activation_fn='nn.ReLU' is not one of: tanh, relu"),
        ({"gamma": 1.5}, "gamma=1.5 must be at most 1"),
    ],
)
def test_bad_values(values: dict[str, Any], error: str):
    with pytest.raises(ConfigError, match=error.replace("(", r"\(").replace(")", r"\)")):
        PpoHyperparameters.from_mapping(values, where="here")


def test_code_is_not_run():
    with pytest.raises(ConfigError, match="must be a mapping; no code is run"):
        flatten({"policy_kwargs": "dict(net_arch=[64])"}, where="here")


def test_a_schedule_is_a_number_or_a_line():
    assert schedule("0.5") == 0.5
    line = schedule("lin_2")
    assert callable(line)
    assert line(0.25) == 0.5


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path):
    given = {"algo": "ppo", "timesteps": 100, "seed": 3}
    config = make_run_config(given, "demo", {"history": 2, "horizon_s": None})
    (tmp_path / "config.yaml").write_text(config.to_text())
    assert read_run_config(tmp_path / "config.yaml") == config
    assert config.recipe.settings["history"] == 2
    assert config.recipe.settings["shaping_discount"] == config.hyperparameters.gamma


@pytest.mark.parametrize(
    ("given", "settings", "error"),
    [
        ({"algo": "pp"}, {}, "unknown algorithm 'pp'"),
        ({"timesteps": 0}, {}, "timesteps=0 must be at least 1"),
        ({}, {"env": "moon"}, "env='moon' is not one of: random, virtual, live"),
        ({}, {"action_design": "grid"}, "algo='ppo' needs action_design residual or absolute"),
        ({"algo": "dqn"}, {"action_design": "absolute"}, "algo='dqn' needs action_design grid"),
        ({"n_envs": 2}, {"env": "live"}, "env=live takes n_envs 1 and no workers, not n_envs=2"),
    ],
)
def test_runs_that_cannot_be(given: dict[str, Any], settings: dict[str, Any], error: str):
    with pytest.raises(ConfigError, match=error):
        make_run_config(given, None, settings)


def test_a_search_keeps_the_shaping_of_the_reward_neutral():
    found = {"learning_rate": 1e-3, "gamma": 0.91}
    config = make_run_config({}, None, {})
    tuned = _with_values(config, found)
    assert tuned.hyperparameters.gamma == 0.91 == tuned.recipe.settings["shaping_discount"]
    own = make_run_config({}, None, {"shaping_discount": 0.5})
    assert _with_values(own, found).recipe.settings["shaping_discount"] == 0.5


def test_files_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read .*nowhere.yaml.*bundled: demo"):
        make_run_config({}, str(tmp_path / "nowhere.yaml"), {})
    (tmp_path / "a.yaml").write_text("envs: random")
    with pytest.raises(ConfigError, match="unknown key 'envs'; allowed: env, settings"):
        make_run_config({}, str(tmp_path / "a.yaml"), {})
