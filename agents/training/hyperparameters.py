"""Hyperparameters: one YAML file per algorithm, in the form of the RL Zoo, read as typed values.

    batchpilot/BatchLimits-v0:
      n_timesteps: 200000
      n_envs: 2
      learning_rate: lin_3e-4
      n_steps: 512
      normalize: {norm_reward: true}
      policy_kwargs: {net_arch: [64, 64], activation_fn: tanh, log_std_init: -1.0}

Names and meanings are Stable-Baselines3's. What is not a typed field is refused; texts are never
evaluated: a schedule is a number, or `lin_` and a number, which falls to zero in a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from batchpilot.agents.parameters import ConfigError, Parameters, parameter

Schedule = Callable[[float], float]
_NESTED = ("policy_kwargs", "normalize")


@dataclass(frozen=True)
class Hyperparameters(Parameters):
    """What every algorithm takes."""

    n_timesteps: int = parameter(200_000, minimum=1, help="environment steps, all together")
    n_envs: int = parameter(2, minimum=1, help="environments side by side")
    learning_rate: str = parameter("3e-4", help="a number, or lin_NUMBER")
    gamma: float = parameter(0.99, above=0, maximum=1, help="discount of a decision interval")
    batch_size: int = parameter(256, minimum=1, help="samples in a gradient step")
    norm_reward: bool = parameter(False, help="divide rewards by their running spread")
    paired_episodes: int = parameter(
        0, minimum=0, help="so many episodes, rewarded for what is gained over the base; 0: neither"
    )
    net_arch: str = parameter("64,64", help="widths of the hidden layers")
    activation_fn: str = parameter("tanh", choices=("tanh", "relu"), help="of the hidden layers")

    def __post_init__(self) -> None:
        """Checks each value, and the texts that stand for more than one."""
        super().__post_init__()
        for name in self.schedules:
            schedule(getattr(self, name), name)
        _ = self.layers

    @property
    def schedules(self) -> tuple[str, ...]:
        """The fields that may be schedules."""
        return ("learning_rate",)

    @property
    def layers(self) -> list[int]:
        """Widths of the hidden layers."""
        widths = [part.strip() for part in self.net_arch.strip("[]").split(",")]
        if not all(width.isdecimal() and int(width) > 0 for width in widths):
            raise ConfigError(f"net_arch={self.net_arch!r} is not a list of whole numbers from 1")
        return [int(width) for width in widths]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the algorithm's class, without `policy_kwargs`."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in _NOT_ARGUMENTS & set(own):
            del own[name]
        return own | {name: schedule(own[name], name) for name in self.schedules}

    def policy_arguments(self) -> dict[str, Any]:
        """The algorithm's `policy_kwargs`, but for the activation, which is a class of torch's."""
        return {"net_arch": self.layers}


@dataclass(frozen=True)
class PpoHyperparameters(Hyperparameters):
    """PPO's."""

    n_steps: int = parameter(512, minimum=2, help="steps of each environment in a rollout")
    n_epochs: int = parameter(10, minimum=1, help="passes over a rollout")
    gae_lambda: float = parameter(0.95, minimum=0, maximum=1, help="of the advantages")
    clip_range: str = parameter("0.2", help="a number, or lin_NUMBER")
    ent_coef: float = parameter(0.0, minimum=0, help="weight of the entropy")
    vf_coef: float = parameter(0.5, minimum=0, help="weight of the value loss")
    max_grad_norm: float = parameter(0.5, above=0, help="longest gradient")
    target_kl: float | None = parameter(None, above=0, help="ends a rollout's passes early")
    log_std_init: float = parameter(0.0, help="log of the first standard deviation of actions")

    @property
    def schedules(self) -> tuple[str, ...]:
        """The fields that may be schedules."""
        return ("learning_rate", "clip_range")

    def policy_arguments(self) -> dict[str, Any]:
        """Separate networks for policy and value, of the same shape."""
        layers = {"pi": self.layers, "vf": self.layers}
        return {"net_arch": layers, "log_std_init": self.log_std_init}


@dataclass(frozen=True)
class RecurrentPpoHyperparameters(PpoHyperparameters):
    """RecurrentPPO's."""

    batch_size: int = parameter(128, minimum=1, help="samples in a gradient step")
    lstm_hidden_size: int = parameter(64, minimum=1, help="width of the LSTM")

    def policy_arguments(self) -> dict[str, Any]:
        """An LSTM before each network."""
        return {**super().policy_arguments(), "lstm_hidden_size": self.lstm_hidden_size}


@dataclass(frozen=True)
class OffPolicyHyperparameters(Hyperparameters):
    """What algorithms with a replay buffer share."""

    buffer_size: int = parameter(100_000, minimum=1, help="transitions kept")
    learning_starts: int = parameter(1_000, minimum=0, help="random steps before the first update")
    train_freq: int = parameter(1, minimum=1, help="steps between updates")
    gradient_steps: int = parameter(1, minimum=-1, help="per update; -1: one for each step")


@dataclass(frozen=True)
class SacHyperparameters(OffPolicyHyperparameters):
    """SAC's."""

    activation_fn: str = parameter("relu", choices=("tanh", "relu"), help="of the hidden layers")
    tau: float = parameter(0.005, above=0, maximum=1, help="how fast target networks follow")
    ent_coef: str = parameter("auto", help="weight of the entropy; auto learns it")

    def __post_init__(self) -> None:
        """Checks each value, and the weight of the entropy."""
        super().__post_init__()
        if self.ent_coef.partition("_")[0] != "auto":
            _number(self.ent_coef, "ent_coef")

    def arguments(self) -> dict[str, Any]:
        """The weight of the entropy as a number where it is one."""
        fixed = self.ent_coef.partition("_")[0] != "auto"
        weight = float(self.ent_coef) if fixed else self.ent_coef
        return {**super().arguments(), "ent_coef": weight}


@dataclass(frozen=True)
class TqcHyperparameters(SacHyperparameters):
    """TQC's."""

    top_quantiles_to_drop_per_net: int = parameter(2, minimum=0, help="of each critic")


@dataclass(frozen=True)
class DqnHyperparameters(OffPolicyHyperparameters):
    """DQN's."""

    activation_fn: str = parameter("relu", choices=("tanh", "relu"), help="of the hidden layers")
    tau: float = parameter(1.0, above=0, maximum=1, help="how far target networks follow")
    target_update_interval: int = parameter(500, minimum=1, help="steps between their updates")
    exploration_fraction: float = parameter(0.2, above=0, maximum=1, help="of training")
    exploration_initial_eps: float = parameter(1.0, minimum=0, maximum=1, help="random actions")
    exploration_final_eps: float = parameter(0.05, minimum=0, maximum=1, help="random actions")


@dataclass(frozen=True)
class QrDqnHyperparameters(DqnHyperparameters):
    """QR-DQN's."""

    n_quantiles: int = parameter(50, minimum=1, help="of the return")

    def policy_arguments(self) -> dict[str, Any]:
        """One output per action and quantile."""
        return {**super().policy_arguments(), "n_quantiles": self.n_quantiles}


_NOT_ARGUMENTS = {
    *("n_timesteps", "n_envs", "norm_reward", "paired_episodes", "net_arch", "activation_fn"),
    *("log_std_init", "lstm_hidden_size", "n_quantiles"),
}


def schedule(text: str, name: str = "schedule") -> float | Schedule:
    """A constant, or a function of the share of training that is left.

    Args:
        text: A number, or `lin_` and a number.
        name: For error messages.

    Raises:
        ConfigError: Anything else.
    """
    if not text.startswith("lin_"):
        return _number(text, name)
    first = _number(text.removeprefix("lin_"), name)
    return lambda progress_remaining: first * progress_remaining


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name}={text!r} is neither a number from 0 nor lin_NUMBER")
    return value


def read_zoo_file(path: Path | None, algorithm: str, env_id: str) -> dict[str, Any]:
    """The settings of one environment in an algorithm's file, nested ones flattened.

    Args:
        path: The file; None takes the bundled one of the algorithm.
        algorithm: Its name, for the bundled file.
        env_id: The key; `default` stands in for one that is not there.

    Raises:
        ConfigError: The file cannot be read, or has another form.
    """
    source = path or resources.files("batchpilot.agents.training") / "zoo" / f"{algorithm}.yaml"
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read hyperparameters {source}: {error}") from error
    chosen = content.get(env_id, content.get("default")) if isinstance(content, dict) else None
    if not isinstance(chosen, dict):
        raise ConfigError(f"{source}: neither {env_id!r} nor 'default' is a list of settings")
    return flatten(chosen, where=str(source))


def flatten(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Lifts the keys of `policy_kwargs` and `normalize`, and writes lists as texts.

    Raises:
        ConfigError: One of the two is not a mapping (the zoo's own files write code there).
    """
    flat = {str(key): value for key, value in values.items() if key not in _NESTED}
    for name in _NESTED:
        nested = values.get(name) or {}
        if not isinstance(nested, Mapping):
            raise ConfigError(f"{where}: {name}={nested!r} must be a mapping; no code is run")
        flat |= {str(key): value for key, value in nested.items()}
    return {key: _plain(value) for key, value in flat.items()}


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value
