"""Training episodes compared with the base policy's own: far less chance in the rewards."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.utils import seeding

from batchpilot.agents.parameters import ConfigError

#: Seeds of the episodes start here; those of evaluations and of the gate are elsewhere.
PAIRED_SEED = 10_000_000


class PairedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Plays one of so many episodes again and again, and rewards what is gained over the base.

    Formula: r'(t) = r(t) - b(t), with b(t) the reward of interval t of the same episode (engine,
    requests, noise) under the neutral action, which is the base policy. What an agent does has no
    influence on b, so that the best policy stays the best; what goes is the chance of whether an
    episode was an easy one, which else is far greater than what an agent can gain or lose.

    Regimes: an episode is played under the base when it comes for the first time; from then on it
    costs what any other does. Intervals beyond the base's last keep their reward.

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
        self._base: dict[int, list[float]] = {}
        self._rewards: list[float] = []
        self._interval = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts one of the episodes; a seed decides which ones come from here on."""
        unwrapped = self.unwrapped
        chance = unwrapped.np_random if seed is None else seeding.np_random(seed)[0]
        number = int(chance.integers(self._episodes))
        if number not in self._base:
            self._base[number] = self._play_base(number)
        seen, info = self.env.reset(seed=PAIRED_SEED + number, options=options)
        unwrapped.np_random = chance  # the episode's own was needed in its reset alone
        self._rewards, self._interval = self._base[number], 0
        return seen, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Takes the action; its reward is what it gained over the base."""
        seen, reward, terminated, truncated, info = self.env.step(action)
        if self._interval < len(self._rewards):
            reward = float(reward) - self._rewards[self._interval]
        self._interval += 1
        return seen, reward, terminated, truncated, info

    def _play_base(self, number: int) -> list[float]:
        self.env.reset(seed=PAIRED_SEED + number)
        rewards, over = [], False
        while not over:
            _, reward, terminated, truncated, _ = self.env.step(self._neutral)
            rewards.append(float(reward))
            over = terminated or truncated
        return rewards
