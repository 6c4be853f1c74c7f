"""`batchpilot/RandomBatchLimits-v0`: another engine, load and targets in each episode.

import gymnasium
import batchpilot.env.registration

env = gymnasium.make("batchpilot/RandomBatchLimits-v0", scenarios={"load": [0.8, 1.4]})
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.batch_limits_env import BatchLimitsEnv, opened_engine, start_engine
from batchpilot.env.episode import OpenedEngine
from batchpilot.env.profiles import load_profile
from batchpilot.env.reward import MeanLengths
from batchpilot.env.scenarios import EngineChoice, Scenario, ScenarioRanges
from batchpilot.env.virtual_engine import VirtualEngine

#: Engines kept for episodes to come; building one takes a second, and each holds some memory.
MOST_ENGINES = 16
_DRAWN = (
    *("profile", "kv_blocks", "max_num_seqs", "max_num_batched_tokens"),
    *("workload", "arrivals", "itl_slo_ms", "ttft_slo_ms"),
)


class RandomBatchLimitsEnv(BatchLimitsEnv):
    """`BatchLimitsEnv` with another engine, load and targets in each episode.

    What is drawn, and from where, is in `batchpilot.env.scenarios`. One seed is one series of
    episodes, whatever was played before.

    Info, from `reset`, besides that of `BatchLimitsEnv`:

        scenario             dict of what was drawn

    Args:
        render_mode: `"ansi"` for a line of text an interval, or None.
        scenarios: Ranges, as `ScenarioRanges.from_mapping` reads them.
        settings: The fields of `VirtualEnvParameters` that are not drawn.

    Raises:
        ConfigError: An unknown setting or range, or one that does not fit.
    """

    def __init__(
        self,
        *,
        render_mode: str | None = None,
        scenarios: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Checks every setting; engines start when they are drawn."""
        for name in _DRAWN:
            if name in settings:
                raise ConfigError(
                    f"RandomBatchLimits-v0: {name} is drawn in each episode; set it in `scenarios`"
                )
        self._ranges = ScenarioRanges.from_mapping(scenarios or {}, where="scenarios")
        self._engines: OrderedDict[EngineChoice, VirtualEngine] = OrderedDict()
        self.scenario: Scenario | None = None
        super().__init__(render_mode=render_mode, **settings)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Draws a scenario and starts an episode of it; see `BatchLimitsEnv`."""
        seen, info = super().reset(seed=seed, options=options)
        assert self.scenario is not None
        return seen, {**info, "scenario": asdict(self.scenario)}

    def close(self) -> None:
        """Shuts every engine down."""
        self._opened = self._episode = None
        while self._engines:
            self._engines.popitem()[1].close()

    def _prepare(self) -> None:
        self.scenario = self._ranges.draw(self.np_random)
        engine = self._engine(self.scenario.engine)
        drawn = self.scenario.settings(engine.profile, engine.facts)
        self.params = replace(self.params, **drawn)
        self._spec = self.params.workload_spec
        self._opened = None

    def _open(self, mean: MeanLengths) -> OpenedEngine:
        assert self.scenario is not None
        return opened_engine(self._engine(self.scenario.engine), self.params, mean)

    def _engine(self, choice: EngineChoice) -> VirtualEngine:
        """The kept engine of these settings, or a new one; what was used longest ago goes."""
        engine = self._engines.pop(choice, None)
        if engine is None:
            blocks = max(2, round(load_profile(choice.profile).num_blocks * choice.kv_share))
            engine = start_engine(
                replace(
                    self.params,
                    profile=choice.profile,
                    kv_blocks=blocks,
                    max_num_seqs=choice.max_num_seqs,
                    max_num_batched_tokens=choice.max_num_batched_tokens,
                )
            )
            if len(self._engines) >= MOST_ENGINES:
                self._engines.popitem(last=False)[1].close()
        self._engines[choice] = engine
        return engine
