"""Environments whose state can be written down: how the episode began, and every action since.

An engine's state is a scheduler full of requests and cannot be saved. But a virtual environment is
deterministic, so that playing an episode again up to the same step gives the same state, to the
last digit.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np

from batchpilot.agents.parameters import ConfigError


class ReplayableEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Writes down what it takes to play the running episode again.

    Limitations: it holds for environments that draw from chance in `reset` alone, from their
    `np_random`. A live engine comes back at the start of an episode of the same requests.

    Args:
        env: What to wrap; a `Monitor` around it must be inside, to be replayed too.
        replays: Whether the environment is deterministic; else `set_state` only starts the episode.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], *, replays: bool = True) -> None:
        """Nothing is written down before the first reset."""
        super().__init__(env)
        self._replays = replays
        self._start: dict[str, Any] | None = None
        self._actions: list[Any] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode and forgets the one before."""
        generator = self.unwrapped.np_random.bit_generator
        self._start = {"generator": generator.state} if seed is None else {"seed": seed}
        self._actions = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Notes the action, then takes it."""
        self._actions.append(np.asarray(action).tolist())
        return self.env.step(action)

    def get_state(self) -> dict[str, Any]:
        """The running episode as JSON values: how it began, and its actions so far."""
        return {
            "start": self._start,
            "actions": list(self._actions),
            "replays": self._replays,
        }

    def set_state(self, state: dict[str, Any]) -> Any:
        """Plays an episode again.

        Args:
            state: From `get_state`.

        Returns:
            The newest observation.

        Raises:
            ConfigError: It is no such state.
        """
        start, actions = state.get("start"), state.get("actions")
        if not isinstance(start, dict) or not isinstance(actions, list):
            raise ConfigError("the state of an environment lacks 'start' or 'actions'")
        if "generator" in start:
            self.unwrapped.np_random.bit_generator.state = start["generator"]
        seen, _ = self.reset(seed=start.get("seed"))
        kind = self.action_space.dtype
        for action in actions if self._replays else ():
            seen, *_ = self.step(np.asarray(action, dtype=kind))
        return seen
