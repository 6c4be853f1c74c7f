"""Training episodes compared with the base policy's own: far less chance in the rewards."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.utils import seeding

from batchpilot.agents.parameters import ConfigError

#: Seeds of the episodes start here; those of evaluations and of the gate are elsewhere.
PAIRED_SEED = 10_000_000


class PairedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Plays one of so many episodes again and again, and rewards what is gained over the base.

    Formula: r' = r - b, with b the reward of the same episode (engine, requests, noise) under the
    neutral action, which is the base policy, in the same stretch of engine time: an interval ends
    with the step that reaches its end, so that an agent's and the base's hardly coincide. Of a
    base's interval that lies in the stretch in part, that part counts; the last interval takes all
    that is left, so that an episode's rewards sum up to its gain. What an agent does has no
    influence on the sum of b, so that the best policy stays the best; what goes is the chance of
    whether an episode was an easy one, which else is far greater than what an agent can gain or
    lose.

    Regimes: an episode is played under the base when it comes for the first time; from then on it
    costs what any other does.

    Limitations: it holds for environments that draw from chance in `reset` alone. Few episodes can
    be learned by heart.

    Args:
        env: Its action design has a neutral action.
        episodes: How many there are.

    Raises:
        ConfigError: The design has no neutral action.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], episodes: int) -> None:
        """Nothing is played before the first reset."""
        super().__init__(env)
        neutral = env.unwrapped.params.actions.neutral  # type: ignore[attr-defined]
        if neutral is None:
            raise ConfigError("paired_episodes needs an action design with a base policy")
        self._neutral = np.asarray(neutral, dtype=env.action_space.dtype)
        self._episodes = episodes
        self._bases: dict[int, _Base] = {}
        self._base = _Base([], [])
        self._clock = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts one of the episodes; a seed decides which ones come from here on."""
        unwrapped = self.unwrapped
        chance = unwrapped.np_random if seed is None else seeding.np_random(seed)[0]
        number = int(chance.integers(self._episodes))
        if number not in self._bases:
            self._bases[number] = self._play_base(number)
        seen, info = self.env.reset(seed=PAIRED_SEED + number, options=options)
        unwrapped.np_random = chance  # the episode's own was needed in its reset alone
        self._base, self._clock = self._bases[number], 0.0
        return seen, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Takes the action; its reward is what it gained over the base."""
        seen, reward, terminated, truncated, info = self.env.step(action)
        before, self._clock = self._clock, info["clock_s"]
        until = math.inf if terminated or truncated else self._clock
        gained = float(reward) - self._base.between(before, until)
        return seen, gained, terminated, truncated, info

    def _play_base(self, number: int) -> _Base:
        self.env.reset(seed=PAIRED_SEED + number)
        base, over = _Base([], []), False
        while not over:
            _, reward, terminated, truncated, info = self.env.step(self._neutral)
            base.ends.append(info["clock_s"])
            base.rewards.append(float(reward))
            over = terminated or truncated
        return base


class _Base(NamedTuple):
    """The base policy's intervals: when each ended, in seconds, and its reward."""

    ends: list[float]
    rewards: list[float]

    def between(self, start: float, end: float) -> float:
        """What it had from one moment to another; each interval's reward is spread evenly."""
        total, begun = 0.0, 0.0
        for ended, reward in zip(self.ends, self.rewards, strict=True):
            inside = min(end, ended) - max(start, begun)
            if inside > 0:
                total += reward * (inside / (ended - begun))
            begun = ended
        return total
