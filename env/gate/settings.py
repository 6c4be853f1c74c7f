"""What the gate tries a policy on, and what it asks of it: a YAML file, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.bench.plan import build_round_workload
from batchpilot.env.bench.settings import BenchSettings
from batchpilot.env.contest.scenario import estimated_capacity
from batchpilot.env.profiles import load_profile, profile_names

_DEFAULT = resources.files("batchpilot.env.gate") / "held_out.yaml"
_BENCH_KEYS = frozenset(
    (
        *("profile", "workload", "arrivals", "rate_scale", "num_requests", "noise"),
        *("itl_slo_ms", "ttft_slo_ms", "max_num_seqs", "max_num_batched_tokens", "kv_blocks"),
    )
)
#: Arrivals that a process's mean rate is taken from.
_DRAWN = 20_000


@dataclass(frozen=True)
class Rules(Parameters):
    """What a policy must show."""

    confidence: float = parameter(
        0.95, above=0.5, below=1, help="of the gain in goodput over the policy in force"
    )
    most_cell_loss: float = parameter(
        0.02, minimum=0, below=1, help="share of goodput that a single cell may lose"
    )
    most_violation_increase: float = parameter(
        0.0, minimum=0, below=1, help="by which the mean share of late requests may grow"
    )
    most_shield_share: float = parameter(
        0.2, minimum=0, maximum=1, help="mean share of steps in which the shield changes its limits"
    )
    resamples: int = parameter(10_000, minimum=100, help="of the bootstrap")


@dataclass(frozen=True)
class HeldOutCell:
    """One situation: an engine, a traffic, targets.

    Attributes:
        name: Of its row in the table.
        settings: As of a bench on the virtual engine.
    """

    name: str
    settings: BenchSettings


@dataclass(frozen=True)
class GateSettings:
    """Everything the gate needs to know.

    Attributes:
        cells: What a policy is tried on.
        rounds: Seeds per cell.
        first_seed: Of the first round; far from those of training.
        analytic: Policies shown beside it; it must be no worse than any of them on average.
        static_max_num_seqs: Fixed limits, the best of which is shown: what tuning by hand gives.
        default_policy: Stands for the policy in force where no version is promoted.
        rules: What it must show.
    """

    cells: tuple[HeldOutCell, ...]
    rounds: int = 3
    first_seed: int = 900_000
    analytic: tuple[str, ...] = ("static", "memory+sla", "predictive")
    static_max_num_seqs: tuple[int, ...] = ()
    default_policy: str = "predictive"
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        """Checks what a bench does not.

        Raises:
            ConfigError: No cell, two of one name, or a number out of range.
        """
        names = [cell.name for cell in self.cells]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"cells={names} must be at least one, each with its own name")
        for name in ("rounds", "first_seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number above 0")


def load_gate_settings(path: Path | None = None) -> GateSettings:
    """Reads a gate's file; None takes the one that comes with batchpilot.

    Raises:
        ConfigError: It cannot be read, or a key or value does not fit.
    """
    where = f"gate settings {path or 'held_out.yaml'}"
    try:
        text = (path or _DEFAULT).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    try:
        return _settings(values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _settings(values: Any) -> GateSettings:
    found = _mapping(values, {item.name for item in fields(GateSettings)}, "the file")
    if not isinstance(found.get("cells"), list):
        raise ConfigError("cells is required: a list")
    found["cells"] = tuple(_cell(cell) for cell in found["cells"])
    for name in ("analytic", "static_max_num_seqs"):
        if name in found:
            found[name] = tuple(found[name])
    if "rules" in found:
        rules = _mapping(found["rules"], set(Rules.names()), "rules")
        found["rules"] = Rules.from_mapping(rules, where="rules")
    return GateSettings(**found)


def _cell(values: Any) -> HeldOutCell:
    found = _mapping(values, {"name", "load", *_BENCH_KEYS}, "a cell")
    name, load = str(found.pop("name", "")), found.pop("load", None)
    if not name:
        raise ConfigError(f"a cell has no name: {found}")
    settings = BenchSettings.from_mapping({"engine": "virtual", **found}, where=f"cell {name}")
    if settings.profile is None:
        raise ConfigError(f"cell {name}: needs a profile: {', '.join(profile_names())}")
    if not settings.slo.is_set:
        raise ConfigError(f"cell {name}: itl_slo_ms or ttft_slo_ms is required: goodput needs one")
    if load is not None:
        settings = _loaded(settings, load, f"cell {name}")
    return HeldOutCell(name, settings)


def _loaded(settings: BenchSettings, load: Any, where: str) -> BenchSettings:
    """The settings with the rate scale at which requests come at `load` times the capacity.

    The capacity is the contest's estimate, which is made from the profile, the lengths and the
    target between tokens; no policy had a hand in it.
    """
    if not isinstance(load, int | float) or not load > 0:
        raise ConfigError(f"{where}: load={load!r} must be a number above 0")
    if settings.itl_slo_ms is None or settings.rate_scale != 1:
        raise ConfigError(f"{where}: load needs itl_slo_ms, and takes the place of rate_scale")
    # Of a process many, so that chance does not count; of a trace those that are served.
    drawn = settings if settings.arrivals is None else replace(settings, num_requests=_DRAWN)
    requests = build_round_workload(drawn, 0).requests
    seconds = requests[-1].arrival_seconds
    if not seconds:
        raise ConfigError(f"{where}: load needs arrivals over time, not all at once")
    assert settings.profile is not None
    capacity = estimated_capacity(
        load_profile(settings.profile), settings.workload, settings.itl_slo_ms
    )
    return replace(settings, rate_scale=load * capacity * seconds / len(requests))


def _mapping(values: Any, known: set[str] | frozenset[str], where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {values!r} is not a mapping")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
    return dict(values)
