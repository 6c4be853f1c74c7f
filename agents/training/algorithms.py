"""The algorithms that fit, by name: their classes, their hyperparameters, their actions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.hyperparameters import (
    DqnHyperparameters,
    Hyperparameters,
    PpoHyperparameters,
    QrDqnHyperparameters,
    RecurrentPpoHyperparameters,
    SacHyperparameters,
    TqcHyperparameters,
)


@dataclass(frozen=True)
class Algorithm:
    """One algorithm of Stable-Baselines3 or sb3-contrib.

    Attributes:
        library: The module it is imported from.
        class_name: Its class there.
        policy: Name of its policy's class.
        hyperparameters: What it takes.
        discrete: Whether it chooses from a grid (action design `grid`) or gives two numbers.
    """

    library: str
    class_name: str
    policy: str
    hyperparameters: type[Hyperparameters]
    discrete: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm("stable_baselines3", "PPO", "MlpPolicy", PpoHyperparameters),
    "recurrent_ppo": Algorithm(
        "sb3_contrib", "RecurrentPPO", "MlpLstmPolicy", RecurrentPpoHyperparameters
    ),
    "sac": Algorithm("stable_baselines3", "SAC", "MlpPolicy", SacHyperparameters),
    "tqc": Algorithm("sb3_contrib", "TQC", "MlpPolicy", TqcHyperparameters),
    "dqn": Algorithm("stable_baselines3", "DQN", "MlpPolicy", DqnHyperparameters, discrete=True),
    "qrdqn": Algorithm("sb3_contrib", "QRDQN", "MlpPolicy", QrDqnHyperparameters, discrete=True),
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm behind a name.

    Raises:
        ConfigError: No algorithm has that name.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}; known: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def build_model(name: str, values: Hyperparameters, env: VecEnv, seed: int | None) -> BaseAlgorithm:
    """A fresh model of an algorithm, on the CPU.

    Args:
        name: Of the algorithm.
        values: Its hyperparameters.
        env: What it trains on, or anything with the same spaces.
        seed: Of networks, actions and environments; None leaves chance as it stands.
    """
    from torch import nn

    algorithm = find_algorithm(name)
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[values.activation_fn]
    policy_kwargs: Mapping[str, Any] = {
        **values.policy_arguments(),
        "activation_fn": activation,
    }
    model_class = getattr(importlib.import_module(algorithm.library), algorithm.class_name)
    model: BaseAlgorithm = model_class(
        algorithm.policy,
        env,
        seed=seed,
        device="cpu",
        policy_kwargs=dict(policy_kwargs),
        **values.arguments(),
    )
    return model
