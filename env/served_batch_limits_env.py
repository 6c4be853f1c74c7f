"""`batchpilot/ServedBatchLimits-v0`: observe, shadow or steer a running server by its service.

import gymnasium
import batchpilot.env.registration

env = gymnasium.make("batchpilot/ServedBatchLimits-v0", target="localhost:50061", mode="shadow")
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from batchpilot.agents.actions import ACTION_SIZE, ActionScale
from batchpilot.agents.features import FEATURE_NAMES, observation
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError, parameter
from batchpilot.agents.telemetry import TelemetryWindow
from batchpilot.env.served_engine import ServedEngine, ServedEngineConfig

Observation = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ServedEnvParameters(ServedEngineConfig):
    """The parameters of `batchpilot/ServedBatchLimits-v0`, and of the engine behind it."""

    decision_interval_s: float = parameter(2.0, minimum=0.5, help="seconds between two actions")
    intervals: int = parameter(300, minimum=1, help="actions of an episode")
    min_num_seqs: int = parameter(1, minimum=1, help="max_num_seqs of the action -1")
    min_num_batched_tokens: int = parameter(64, minimum=1, help="token budget of the action -1")
    capacity_tokens_per_s: float | None = parameter(
        None, above=0, help="output tokens that count as 1; None: the most seen so far"
    )
    slow_weight: float = parameter(0.5, minimum=0, help="weight of tokens slower than the target")
    preemption_weight: float = parameter(0.2, minimum=0, help="weight of work thrown away")

    def __post_init__(self) -> None:
        """Checks that limits hold from one action to the next."""
        super().__post_init__()
        if self.hold_seconds < 2 * self.decision_interval_s:
            raise ConfigError(
                f"hold_seconds={self.hold_seconds:g} must be at least twice "
                f"decision_interval_s={self.decision_interval_s:g}, or limits end between actions"
            )


class ServedBatchLimitsEnv(gymnasium.Env[Observation, Any]):
    """Steers both batch limits of a running server, in real time, by its tuning service.

    Action, `Box(-1, 1, (2,), float32)`: both limits on a log scale, from the least allowed to the
    start-up limits (`batchpilot.agents.actions.ActionScale`). In mode `observe` and `shadow` it is
    worked out and not applied.

    Observation, `Box(-1, 1, (26,), float32)`: the telemetry of the interval, as the hook reported
    it (`batchpilot.agents.features`).

    Reward: output tokens per second inside the inter-token target, over the engine's capacity, less
    `slow_weight` times those outside it, less `preemption_weight` times the share of work that
    preemptions threw away. A report holds sums, not requests: a request's fate, which
    `BatchLimits-v0` rewards, is not known here.

    Info: `applied_limits` and `proposed_limits`, `binding`, `source`, `running`, `waiting`,
    `preemptions`, `throughput_tokens_per_s`, `window_s` (time the reports span).

    An episode is truncated after `intervals` actions. Users bring the requests: no two are alike.

    Args:
        render_mode: None is known.
        settings: The fields of `ServedEnvParameters`.

    Raises:
        ConfigError: An unknown setting, or one that does not fit.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        """Checks every setting; the engine is looked for at the first reset."""
        self.params = ServedEnvParameters.from_mapping(settings, where="ServedBatchLimits-v0")
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-1.0, 1.0, (len(FEATURE_NAMES),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
        self._engine: ServedEngine | None = None
        self._scale: ActionScale | None = None
        self._left = 0
        self._most_tokens_per_s = 1e-9

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode with what the engine does now.

        Raises:
            ConfigError: An unknown option.
            ServedEngineError: The engine cannot be found.
        """
        if options:
            raise ConfigError(f"reset: unknown option {next(iter(options))!r}; there are none")
        super().reset(seed=seed)
        p = self.params
        if self._engine is None:
            config = {item.name: getattr(p, item.name) for item in fields(ServedEngineConfig)}
            self._engine = ServedEngine(ServedEngineConfig(**config))
            self._scale = ActionScale.of(
                self._engine.facts,
                min_num_seqs=p.min_num_seqs,
                min_num_batched_tokens=p.min_num_batched_tokens,
            )
        self._left = p.intervals
        window = self._engine.collect(p.decision_interval_s)
        return self._observe(self._engine, window), self._info(self._engine, window)

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Asks for the action's limits and collects one interval.

        Raises:
            RuntimeError: No episode has been started.
            ServedEngineError: The engine or its service has gone.
        """
        engine, scale = self._engine, self._scale
        if engine is None or scale is None:
            raise RuntimeError("step before reset: call reset() to start an episode")
        engine.apply(scale.to_limits(np.asarray(action, dtype=np.float64).tolist()))
        window = engine.collect(self.params.decision_interval_s)
        self._left -= 1
        reward = self._reward(window)
        info = self._info(engine, window)
        return self._observe(engine, window), reward, False, self._left <= 0, info

    def close(self) -> None:
        """Gives the engine back as it was."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _observe(self, engine: ServedEngine, window: TelemetryWindow) -> Observation:
        return observation(window, engine.facts, engine.targets)

    def _reward(self, window: TelemetryWindow) -> float:
        p, seconds = self.params, max(window.seconds, 1e-9)
        self._most_tokens_per_s = max(self._most_tokens_per_s, window.decode_tokens / seconds)
        capacity = p.capacity_tokens_per_s or self._most_tokens_per_s
        slow = window.slow_decode_tokens
        worth = window.decode_tokens - slow - p.slow_weight * slow
        return worth / seconds / capacity - p.preemption_weight * window.recomputed_share

    def _info(self, engine: ServedEngine, window: TelemetryWindow) -> dict[str, Any]:
        proposed = engine.shadow_limits
        return {
            "applied_limits": _as_dict(window.limits),
            "proposed_limits": None if proposed is None else _as_dict(proposed),
            "binding": engine.binding.value,
            "source": engine.source,
            "running": window.running,
            "waiting": window.waiting,
            "preemptions": window.preemptions,
            "throughput_tokens_per_s": window.decode_tokens / max(window.seconds, 1e-9),
            "window_s": window.seconds,
        }


def _as_dict(limits: BatchLimits) -> dict[str, int]:
    return {
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
    }
