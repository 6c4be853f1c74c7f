"""`batchpilot/BatchLimits-v0`: steer both batch limits of vLLM's scheduler on a virtual GPU.

import gymnasium
import batchpilot.env.registration

env = gymnasium.make("batchpilot/BatchLimits-v0", profile="llama-3.1-8b-h100", workload="chat")
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Generic, SupportsFloat, TypeVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from batchpilot.agents.actions import ACTION_SIZE, Action, checked_action
from batchpilot.agents.features import FEATURE_NAMES, observation
from batchpilot.agents.history import ObservationHistory
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.env_parameters import EnvParameters, VirtualEnvParameters
from batchpilot.env.episode import Episode, Interval, OpenedEngine
from batchpilot.env.reward import MeanLengths, RewardTerms, profile_capacity
from batchpilot.env.virtual_engine import VOCAB_SIZE, VirtualEngine, VirtualEngineConfig

Observation = npt.NDArray[np.float32]
_SEEDS = 2**31

P = TypeVar("P", bound=EnvParameters)


class SteeredEngineEnv(gymnasium.Env[Observation, Any], ABC, Generic[P]):
    """What the environments share: everything but how their engine is started.

    Args:
        params: How it is set up.
        render_mode: `"ansi"` for a line of text an interval. Any other renders nothing:
            Gymnasium warns of it, and Stable-Baselines3 asks for one unasked.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(self, params: P, *, render_mode: str | None = None) -> None:
        """Checks everything; the engine starts at the first reset."""
        self.params = params
        self.render_mode = render_mode
        self._spec = params.workload_spec
        size = params.history * len(FEATURE_NAMES)
        self.observation_space = spaces.Box(-1.0, 1.0, (size,), np.float32)
        self._design = params.actions
        self.action_space = (
            spaces.Discrete(self._design.output_size)
            if self._design.design == "grid"
            else spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
        )
        self._history = ObservationHistory(params.history)
        self._potential = 0.0
        self._opened: OpenedEngine | None = None
        self._episode: Episode | None = None
        self._line = ""

    @abstractmethod
    def _open(self, mean: MeanLengths) -> OpenedEngine:
        """Starts the engine.

        Args:
            mean: Of the workload, for the engine's capacity.
        """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode: an empty engine, start-up limits, a workload of its own.

        Args:
            seed: Decides this episode and, until the next seed, all that follow.
            options: None are known.

        Raises:
            ConfigError: An unknown option, or an engine or workload that cannot be built.
        """
        if options:
            raise ConfigError(f"reset: unknown option {next(iter(options))!r}; there are none")
        super().reset(seed=seed)
        if self._episode is not None:
            self._episode.abandon()
        self._prepare()
        opened = self._open_engine()
        episode_seed = int(self.np_random.integers(_SEEDS))
        spread = math.log(self.params.rate_spread)
        factor = math.exp(self.np_random.uniform(-spread, spread))
        spec = replace(self._spec, seed=episode_seed, rate_scale=self._spec.rate_scale * factor)
        self._episode = Episode(opened, self.params, spec)
        window = self._episode.close_window()
        self._line = f"episode of seed {episode_seed}"
        info = {"episode_seed": episode_seed, "rate_scale": spec.rate_scale}
        self._history.clear()
        self._potential = 0.0
        return self._history.push(observation(window, opened.engine.facts, self.params)), info

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Serves for one decision interval under the limits that the action asks for.

        Args:
            action: Two numbers, or with `action_design="grid"` the number of a pair of factors.

        Raises:
            RuntimeError: No episode has been started.
            ValueError: No action of the design.
        """
        episode, opened = self._episode, self._opened
        if episode is None or opened is None:
            raise RuntimeError("step before reset: call reset() to start an episode")
        report = episode.run_interval(self._read_action(action))
        terms = self._terms(report, opened)
        facts = opened.engine.facts
        usage = report.window.used_blocks / facts.total_blocks
        info = _info(report, terms, episode.ledger.slo_attainment, usage)
        self._line = _describe(report, terms, info)
        seen = self._history.push(observation(report.window, facts, self.params))
        return seen, terms.total, False, episode.is_over, info

    def render(self) -> str | None:
        """The newest interval as a line of text, with `render_mode="ansi"`."""
        return self._line if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Shuts the engine down."""
        opened, self._opened, self._episode = self._opened, None, None
        if opened is not None:
            opened.engine.close()

    def _prepare(self) -> None:
        """Draws what else differs from episode to episode, from `np_random`; nothing here."""

    def _read_action(self, action: Any) -> Action:
        if self._design.design == "grid":
            self._design.grid.factors(int(action))  # raises where there is no such action
            return int(action)
        return checked_action(np.asarray(action, dtype=np.float64).tolist())

    def _open_engine(self) -> OpenedEngine:
        if self._opened is None:
            sample = replace(self._spec, num_requests=self._spec.num_requests or 1000).build()
            self._opened = self._open(MeanLengths.of(sample.requests))
        return self._opened

    def _terms(self, report: Interval, opened: OpenedEngine) -> RewardTerms:
        p, service = self.params, report.service
        expected = opened.capacity_requests_per_s * p.decision_interval_s
        potential = service.on_track - p.slo_weight * service.off_track
        gained = p.shaping_discount * potential - self._potential
        self._potential = potential
        return RewardTerms(
            goodput=service.inside / expected,
            slo_penalty=p.slo_weight * service.missed / expected,
            preemption_penalty=p.preemption_weight * report.window.recomputed_share,
            shield_penalty=p.shield_weight * report.shielded_share,
            shaping=gained / expected,
        )


class BatchLimitsEnv(SteeredEngineEnv[VirtualEnvParameters]):
    """Steers both batch limits of vLLM's own scheduler on a virtual GPU; deterministic by seed.

    One step is one decision interval of engine time (it ends with the engine step that reaches
    its end). An episode is truncated at the horizon and never terminated.

    Action, on a log scale (`batchpilot.agents.actions` has the formulas); vLLM applies it after the
    shield, which never lets a limit fall below what runs. With `action_design="residual"`,
    `Box(-1, 1, (2,), float32)`, relative to what `base_policy` decides before each engine step; 0
    is the base policy itself:

        index  limit                   -1                   1
        0      max_num_seqs            base / seqs_span     base * seqs_span
        1      max_num_batched_tokens  room / tokens_span   room * tokens_span

    where room is what the base leaves beside the decodes; with `"absolute"`, the same space, from
    `min_num_seqs` and `min_num_batched_tokens` to the start-up limits; with `"grid"`,
    `Discrete(28)`, one of a few pairs of factors for the same two.

    Observation, `Box(-1, 1, (26 * history,), float32)`: the interval's telemetry, before it that of
    the intervals before; `batchpilot.agents.features` has the table of names, sources, units and
    scales.

    Reward: requests inside their targets over what the engine could finish, less penalties for late
    requests, for work that preemption threw away and for steps that the shield changed, with a
    potential that pays as tokens come; `batchpilot.env.reward` has the formula.

    Info, from `step`:

        proposed_limits      dict of both limits, as the action asked for
        applied_limits       dict of both limits, of the interval's newest engine step
        shielded             whether the shield changed the newest proposal
        shielded_share       share of the interval's engine steps in which it did, 0 to 1
        episode_shielded_share
                             the same of the whole episode so far
        binding              what kept the next request out: kv_cache, max_num_seqs,
                             token_budget or none
        reward_goodput, reward_slo_penalty, reward_preemption_penalty, reward_shield_penalty,
        reward_shaping       the reward's terms: the first less the three penalties, plus the last
        cost                 share of late requests among those served or overdue, 0 to 1
        inside, missed       requests whose fate became known: inside their targets, or late
        slo_attainment       share inside of all whose fate is known in this episode, 0 to 1; 1
                             before the first
        goodput_tokens_per_s, throughput_tokens_per_s
                             output tokens per second, those inside the targets and all
        running, waiting, arrived, finished, preemptions
                             requests; the last three counted since the interval before
        kv_cache_usage       share of KV blocks in use, 0 to 1
        clock_s              seconds since the episode began
        engine_steps         engine steps in the interval

    Args:
        render_mode: `"ansi"` for a line of text an interval, or None.
        settings: The fields of `VirtualEnvParameters`.

    Raises:
        ConfigError: An unknown setting, or one that does not fit; the engine's at the first reset.
    """

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        """Checks every setting; the engine starts at the first reset."""
        params = VirtualEnvParameters.from_mapping(settings, where="BatchLimits-v0")
        super().__init__(params, render_mode=render_mode)

    def _open(self, mean: MeanLengths) -> OpenedEngine:
        return opened_engine(start_engine(self.params), self.params, mean)


def start_engine(params: VirtualEnvParameters) -> VirtualEngine:
    """The engine that the parameters describe."""
    return VirtualEngine(
        VirtualEngineConfig(
            profile=params.profile,
            max_num_seqs=params.max_num_seqs,
            max_num_batched_tokens=params.max_num_batched_tokens,
            kv_blocks=params.kv_blocks,
            enable_prefix_caching=params.enable_prefix_caching,
            async_scheduling=params.async_scheduling,
            noise=params.noise,
        )
    )


def opened_engine(
    engine: VirtualEngine, params: VirtualEnvParameters, mean: MeanLengths
) -> OpenedEngine:
    """The engine with what an environment must know of it.

    Args:
        engine: Started with these parameters.
        params: Their capacity wins over the computed one.
        mean: Of the workload.
    """
    capacity = params.capacity_tokens_per_s or profile_capacity(
        engine.profile.step_time, engine.facts, mean
    )
    return OpenedEngine(engine, VOCAB_SIZE, engine.max_model_len, capacity, mean.output_tokens)


def _info(
    report: Interval, terms: RewardTerms, slo_attainment: float | None, kv_cache_usage: float
) -> dict[str, Any]:
    """The table in `BatchLimitsEnv`."""
    window, service = report.window, report.service
    return {
        "proposed_limits": _limits(report.proposed),
        "applied_limits": _limits(window.limits),
        "shielded": report.shielded,
        "shielded_share": report.shielded_share,
        "episode_shielded_share": report.episode_shielded_share,
        "binding": report.binding.value,
        "reward_goodput": terms.goodput,
        "reward_slo_penalty": terms.slo_penalty,
        "reward_preemption_penalty": terms.preemption_penalty,
        "reward_shield_penalty": terms.shield_penalty,
        "reward_shaping": terms.shaping,
        "cost": service.cost,
        "inside": service.inside,
        "missed": service.missed,
        "slo_attainment": 1.0 if slo_attainment is None else slo_attainment,
        "goodput_tokens_per_s": service.good_tokens / window.seconds,
        "throughput_tokens_per_s": service.tokens / window.seconds,
        "running": window.running,
        "waiting": window.waiting,
        "arrived": window.arrived,
        "finished": service.completed,
        "preemptions": window.preemptions,
        "kv_cache_usage": kv_cache_usage,
        "clock_s": report.clock_seconds,
        "engine_steps": window.steps,
    }


def _limits(limits: BatchLimits) -> dict[str, int]:
    return {
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
    }


def _describe(report: Interval, terms: RewardTerms, info: dict[str, Any]) -> str:
    limits, proposed = report.window.limits, report.proposed
    asked = (
        f" (asked for {proposed.max_num_seqs}/{proposed.max_num_batched_tokens})"
        if report.shielded
        else ""
    )
    return (
        f"{report.clock_seconds:7.1f} s  limits {limits.max_num_seqs}/"
        f"{limits.max_num_batched_tokens}{asked}  running {info['running']}  "
        f"waiting {info['waiting']}  KV {info['kv_cache_usage']:.0%}  "
        f"bound by {report.binding.value}  "
        f"{info['throughput_tokens_per_s']:.0f} tok/s, {info['goodput_tokens_per_s']:.0f} good  "
        f"preempted {info['preemptions']}  reward {terms.total:.3f}"
    )
