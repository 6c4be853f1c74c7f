"""How environments are built: a recipe that travels to other processes, and vectors made of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import gymnasium
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.paired_env import PairedEnv
from batchpilot.agents.training.replayable import ReplayableEnv
from batchpilot.env.registration import LIVE_ENV, RANDOM_ENV, VIRTUAL_ENV

#: A process that was asked to end goes on for so long, at most, until its trainer has saved.
LONGEST_FAREWELL_SECONDS = 600

ENV_IDS = {"random": RANDOM_ENV, "virtual": VIRTUAL_ENV, "live": LIVE_ENV}


@dataclass(frozen=True)
class EnvRecipe:
    """An environment's kind and settings.

    Attributes:
        kind: `random` draws another engine and load each episode, `virtual` has one of them,
            `live` is a real vLLM.
        settings: Keywords of `gymnasium.make`.
        paired_episodes: As in `PairedEnv`; 0: a new episode each time, and plain rewards.
    """

    kind: str = "random"
    settings: Mapping[str, Any] = field(default_factory=dict)
    paired_episodes: int = 0

    def __post_init__(self) -> None:
        """Checks the kind; settings are checked when the environment is built."""
        if self.kind not in ENV_IDS:
            raise ConfigError(f"env={self.kind!r} is not one of: {', '.join(ENV_IDS)}")

    def with_settings(self, **settings: Any) -> EnvRecipe:
        """The same with other settings."""
        return replace(self, settings={**self.settings, **settings})

    def under(self, policy: str) -> EnvRecipe:
        """The environment in which the action 0 is this policy, whatever design agents have."""
        return self.with_settings(action_design="residual", base_policy=policy, history=1)

    def paired(self, episodes: int) -> EnvRecipe:
        """The same for training, where a base policy can be played beside the agent."""
        has_base = self.settings.get("action_design", "residual") != "absolute"
        can_pair = has_base and self.kind != "live"
        return replace(self, paired_episodes=episodes if can_pair else 0)

    def build(self) -> ReplayableEnv:
        """One environment.

        Raises:
            ConfigError: A setting that does not fit.
        """
        env = gymnasium.make(ENV_IDS[self.kind], disable_env_checker=True, **self.settings)
        # gymnasium's wrapper insists that step follows reset, and has nothing else to add here.
        monitored: gymnasium.Env[Any, Any] = Monitor(env.unwrapped, allow_early_resets=True)
        if self.paired_episodes:
            monitored = PairedEnv(monitored, self.paired_episodes)
        return ReplayableEnv(monitored, replays=self.kind != "live")


def build_vector(recipe: EnvRecipe, count: int, *, workers: int = 0) -> VecEnv:
    """Environments side by side: in this process if it is one, else each in its own.

    Args:
        recipe: Of each.
        count: How many.
        workers: Ray actors that share them; 0 uses processes of this machine.
    """
    if workers:
        from batchpilot.agents.training.ray_vector import RayVecEnv

        return RayVecEnv(recipe, count, workers)
    if count == 1:
        return DummyVecEnv([recipe.build])
    return _Processes([_builder(recipe)] * count, start_method="spawn")


class _Processes(SubprocVecEnv):
    """Environments in processes that are gone once it is closed, whatever has become of them."""

    def close(self) -> None:
        try:
            super().close()
        except (EOFError, OSError):
            for process in self.processes:
                process.kill()
            self.closed = True


def _builder(recipe: EnvRecipe) -> Callable[[], ReplayableEnv]:
    def build() -> ReplayableEnv:
        prepare_worker()
        env = recipe.build()
        outlive_sigterm()
        return env

    return build


def prepare_worker() -> None:
    """Readies a process that runs environments: Ctrl-C is for the trainer, logs are for servers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def outlive_sigterm() -> None:
    """Lets the trainer save first where SIGTERM reaches the whole group: the next one counts."""

    def wait(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(LONGEST_FAREWELL_SECONDS)

    signal.signal(signal.SIGTERM, wait)
