"""What differs from episode to episode where an agent is to meet many engines and loads.

Ranges as a mapping, for example from YAML; every key has a default:

    profiles: [llama-3.1-8b-rtx4090, llama-3.1-8b-a100]
    kv_shares: [0.1, 1.0]
    load: [0.6, 1.5]

Lists of engine settings are chosen from, so that engines can be kept; two numbers of the others
are the ends of a range, drawn evenly on a log scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from batchpilot.agents.limits import EngineFacts
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.contest.scenario import estimated_capacity
from batchpilot.env.profiles import GpuProfile
from batchpilot.env.reward import MeanLengths, profile_capacity
from batchpilot.env.workloads import WorkloadSpec

#: Requests that a scenario's mean lengths are taken from.
_SAMPLE = 500
#: A request is at most this share of the KV cache, and its prompt this share of the request.
_LONGEST_SHARE, _PROMPT_SHARE = 0.5, 0.6


class Range(NamedTuple):
    """Two positive numbers, the ends of a range on a log scale."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        """A number of the range."""
        return float(self.low * (self.high / self.low) ** rng.random())


class EngineChoice(NamedTuple):
    """Settings of an engine; equal ones can share one."""

    profile: str
    kv_share: float
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Scenario:
    """What was drawn for one episode.

    Attributes:
        engine: The engine's settings.
        prompt_mean, output_mean: Mean lengths in tokens, before they are cut to what fits.
        output_sigma: Spread of the log of output lengths.
        load: Requests per second, over what the engine can finish in steps within the ITL target.
        burstiness: Coefficient of variation of the gaps between arrivals; 1 is Poisson.
        itl_slo_ratio: ITL target over the step time of a lone sequence.
        ttft_slo_s: TTFT target in seconds.
    """

    engine: EngineChoice
    prompt_mean: float
    output_mean: float
    output_sigma: float
    load: float
    burstiness: float
    itl_slo_ratio: float
    ttft_slo_s: float

    def settings(self, profile: GpuProfile, facts: EngineFacts) -> dict[str, Any]:
        """The environment's settings that the scenario decides, as `VirtualEnvParameters` has them.

        Args:
            profile: Of its engine.
            facts: Of its engine.
        """
        workload = self._workload(facts)
        sample = WorkloadSpec(workload, None, _SAMPLE).build()
        mean = MeanLengths.of(sample.requests)
        itl_slo_ms = (
            self.itl_slo_ratio * 1e3 * profile.step_time.seconds(1, 0, round(mean.prompt_tokens))
        )
        within_target = estimated_capacity(
            replace(profile, num_blocks=facts.total_blocks + 1), workload, itl_slo_ms
        )
        at_most = profile_capacity(profile.step_time, facts, mean) / mean.output_tokens
        rate = self.load * min(within_target, at_most)
        return {
            "workload": workload,
            "arrivals": f"gamma:rate={rate:.6g}:cv={self.burstiness:.6g}",
            "itl_slo_ms": itl_slo_ms,
            "ttft_slo_ms": 1e3 * self.ttft_slo_s,
        }

    def _workload(self, facts: EngineFacts) -> str:
        longest = int(facts.kv_capacity_tokens * _LONGEST_SHARE)
        prompt_max = max(1, min(int(longest * _PROMPT_SHARE), round(self.prompt_mean * 10)))
        output_max = max(1, min(longest - prompt_max, round(self.output_mean * 10)))
        return (
            f"lognormal:prompt_mean={self.prompt_mean:.6g}:output_mean={self.output_mean:.6g}"
            f":output_sigma={self.output_sigma:.6g}:prompt_max={prompt_max}:output_max={output_max}"
        )


#: Profiles that are trained on where none are named; the gate's held-out cells are on others.
TRAINING_PROFILES = (
    "llama-3.1-8b-rtx4090",
    "qwen3-8b-h200",
    "llama-3.1-70b-a100-tp4",
    "llama-3.1-70b-h200-tp4",
)


@dataclass(frozen=True)
class ScenarioRanges:
    """Where scenarios are drawn from.

    Attributes:
        profiles: GPU profiles, names or files.
        kv_shares: Shares of the profile's KV blocks that the engine has.
        max_num_seqs: Start-up limits.
        max_num_batched_tokens: Start-up limits.
        prompt_mean, output_mean, output_sigma, load, burstiness, itl_slo_ratio, ttft_slo_s: As in
            `Scenario`.

    Raises:
        ConfigError: An empty list, or ends of a range that are not 0 < low <= high.
    """

    profiles: tuple[str, ...] = TRAINING_PROFILES
    kv_shares: tuple[float, ...] = (0.25, 1.0)
    max_num_seqs: tuple[int, ...] = (128, 256)
    max_num_batched_tokens: tuple[int, ...] = (2048,)
    prompt_mean: Range = Range(100, 1500)
    output_mean: Range = Range(50, 400)
    output_sigma: Range = Range(0.3, 1.0)
    load: Range = Range(0.5, 1.5)
    burstiness: Range = Range(1.0, 4.0)
    itl_slo_ratio: Range = Range(1.3, 3.0)
    ttft_slo_s: Range = Range(0.5, 5.0)

    def __post_init__(self) -> None:
        """Checks every list and range."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Range):
                if not (0 < value.low <= value.high < math.inf):
                    raise ConfigError(
                        f"{item.name}={list(value)!r} must be two numbers with 0 < low <= high"
                    )
            elif not value:
                raise ConfigError(f"{item.name} is an empty list")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str) -> ScenarioRanges:
        """Reads lists of numbers or texts.

        Raises:
            ConfigError: An unknown key, or a value that does not fit; the text names both.
        """
        known = {item.name: item.default for item in fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}; allowed: {', '.join(known)}")
        try:
            return cls(**{key: _read(key, value, known[key]) for key, value in values.items()})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def draw(self, rng: np.random.Generator) -> Scenario:
        """Draws a scenario."""
        engine = EngineChoice(
            self.profiles[rng.integers(len(self.profiles))],
            self.kv_shares[rng.integers(len(self.kv_shares))],
            self.max_num_seqs[rng.integers(len(self.max_num_seqs))],
            self.max_num_batched_tokens[rng.integers(len(self.max_num_batched_tokens))],
        )
        drawn = {
            item.name: value.draw(rng)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Range)
        }
        return Scenario(engine, **drawn)


def _read(key: str, value: Any, default: Any) -> Any:
    """A list as the tuple that the field's default is."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}={value!r} is not a list")
    if isinstance(default, Range):
        if len(value) != 2 or not all(_is_number(end) for end in value):
            raise ConfigError(f"{key}={value!r} must be two numbers")
        return Range(float(value[0]), float(value[1]))
    kind = type(default[0])
    if kind is str:
        return tuple(map(str, value))
    if not all(_is_number(item) and item > 0 and item == kind(item) for item in value):
        raise ConfigError(f"{key}={value!r} must be numbers above 0 (whole ones for limits)")
    return tuple(map(kind, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
