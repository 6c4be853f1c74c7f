"""A run's whole configuration: what `config.yaml` in its folder says, and nothing else is needed.

A file for `--config` has the same form, every key optional:

    env: random                   random, virtual or live
    settings:                     of the environment, as gymnasium.make takes them
      horizon_s: 60
      scenarios: {load: [0.6, 1.4]}
    hyperparameters:              of the algorithm, over those of its zoo file
      n_steps: 256
    baselines: [static, memory+sla, predictive]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.agents.training.algorithms import ALGORITHMS, find_algorithm
from batchpilot.agents.training.hyperparameters import (
    Hyperparameters,
    flatten,
    read_zoo_file,
)
from batchpilot.agents.training.recipes import ENV_IDS, EnvRecipe

BASELINES = ("static", "memory+sla", "predictive")
#: Algorithms whose policy has a mean action, which can be fitted to what is shown.
IMITATORS = ("ppo", "sac", "tqc")
_FILE_KEYS = ("env", "settings", "hyperparameters", "baselines")
_FAMILIES = resources.files("batchpilot.agents.training") / "families"


@dataclass(frozen=True)
class RunSettings(Parameters):
    """The plain settings of a run."""

    timesteps: int = parameter(minimum=1, help="environment steps, all environments together")
    algo: str = parameter("ppo", choices=tuple(ALGORITHMS), help="the algorithm")
    seed: int = parameter(0, minimum=0, help="of everything")
    n_envs: int = parameter(2, minimum=1, help="environments side by side")
    workers: int = parameter(0, minimum=0, help="Ray actors that share them; 0: processes")
    eval_every: int = parameter(
        20_000, minimum=1, help="steps between evaluations, each at the end of a rollout"
    )
    eval_episodes: int = parameter(8, minimum=1, help="episodes of each")
    checkpoint_every: int = parameter(10_000, minimum=1, help="steps between checkpoints")
    search_episodes: int = parameter(
        0, minimum=0, help="episodes of a search over steady actions, imitated first; 0: none"
    )
    test_episodes: int = parameter(
        20, minimum=1, help="other held-out episodes, of the last comparison"
    )
    name: str = parameter("agent", help="of the exported policy")
    export: str = parameter(
        "best",
        choices=("best", "last"),
        help="what is compared and exported: the best model of the evaluations, or the last",
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Attributes:
        run: The plain settings.
        recipe: The environment.
        hyperparameters: Of the algorithm.
        baselines: Policies to compare with, at the end.
    """

    run: RunSettings
    recipe: EnvRecipe
    hyperparameters: Hyperparameters
    baselines: tuple[str, ...] = field(default=BASELINES)

    def __post_init__(self) -> None:
        """Checks that algorithm, action design and environment fit."""
        grid = self.recipe.settings.get("action_design", "residual") == "grid"
        if find_algorithm(self.run.algo).discrete != grid:
            needed = "grid" if not grid else "residual or absolute"
            raise ConfigError(
                f"algo={self.run.algo!r} needs action_design {needed}: it "
                + ("chooses among numbered actions" if not grid else "gives numbers")
            )
        self._check_search()
        if self.recipe.kind == "live" and (self.run.n_envs > 1 or self.run.workers):
            raise ConfigError(
                f"env=live takes n_envs 1 and no workers, not n_envs={self.run.n_envs} and "
                f"workers={self.run.workers}: a machine has room for one live vLLM"
            )

    def _check_search(self) -> None:
        if not self.run.search_episodes:
            return
        design = self.recipe.settings.get("action_design", "residual")
        if design != "residual" or self.run.algo not in IMITATORS or self.recipe.kind == "live":
            raise ConfigError(
                f"search_episodes={self.run.search_episodes} needs residual actions, "
                f"{' or '.join(IMITATORS)}, and virtual engines, not action_design {design!r}, "
                f"algo={self.run.algo!r} and env={self.recipe.kind!r}"
            )
        if self.run.search_episodes < 2:
            raise ConfigError("search_episodes=1 must be 0 or at least 2: one tells nothing")

    def to_text(self) -> str:
        """YAML, which `read_run_config` reads back."""
        values = {
            **asdict(self.run),
            "env": self.recipe.kind,
            "settings": dict(self.recipe.settings),
            "hyperparameters": asdict(self.hyperparameters),
            "baselines": list(self.baselines),
        }
        return yaml.safe_dump(values, sort_keys=False)


def make_run_config(
    given: Mapping[str, Any], config: str | None, settings: Mapping[str, Any]
) -> RunConfig:
    """Puts a run's configuration together: command line over file over the algorithm's defaults.

    Args:
        given: Keys of `RunSettings`; None where nothing was said.
        config: A file, or a bundled family's name.
        settings: Of the environment, over the file's, None where nothing was said; `env` is its
            kind.

    Raises:
        ConfigError: Anything in it that cannot be used.
    """
    content = _read_file(config) if config else {}
    said = {key: value for key, value in settings.items() if value is not None}
    kind = str(said.pop("env", content.get("env", "random")))
    chosen = {**_mapping(content, "settings"), **said}
    algo = str(given.get("algo") or "ppo")
    if find_algorithm(algo).discrete:
        chosen.setdefault("action_design", "grid")
    zoo = read_zoo_file(None, algo, ENV_IDS.get(kind, kind))
    over = flatten(_mapping(content, "hyperparameters"), where="hyperparameters")
    hyperparameters = find_algorithm(algo).hyperparameters.from_mapping(
        {**zoo, **over}, where=f"hyperparameters of {algo}"
    )
    chosen.setdefault("shaping_discount", hyperparameters.gamma)
    n_envs = 1 if kind == "live" else hyperparameters.n_envs
    defaults = {"timesteps": hyperparameters.n_timesteps, "n_envs": n_envs}
    values = {**defaults, **{k: v for k, v in given.items() if v is not None}, "algo": algo}
    run = RunSettings.from_mapping(values, where="train")
    baselines = tuple(map(str, content.get("baselines", BASELINES)))
    return RunConfig(run, EnvRecipe(kind, chosen), hyperparameters, baselines)


def read_run_config(path: Path) -> RunConfig:
    """Reads a run's own `config.yaml`.

    Raises:
        ConfigError: It cannot be read, or something in it cannot be used.
    """
    content = _load(path)
    run = RunSettings.from_mapping(
        {key: value for key, value in content.items() if key not in _FILE_KEYS}, where=str(path)
    )
    hyperparameters = find_algorithm(run.algo).hyperparameters.from_mapping(
        _mapping(content, "hyperparameters"), where=f"{path}: hyperparameters"
    )
    recipe = EnvRecipe(str(content.get("env")), _mapping(content, "settings"))
    return RunConfig(run, recipe, hyperparameters, tuple(content.get("baselines", BASELINES)))


def family_names() -> tuple[str, ...]:
    """The bundled files for `--config`."""
    names = (item.name for item in _FAMILIES.iterdir())
    return tuple(sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml")))


def _read_file(config: str) -> dict[str, Any]:
    bundled = config in family_names()
    content = _load(_FAMILIES / f"{config}.yaml" if bundled else Path(config))
    for key in content:
        if key not in _FILE_KEYS:
            raise ConfigError(f"{config}: unknown key {key!r}; allowed: {', '.join(_FILE_KEYS)}")
    return content


def _load(path: Any) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}; bundled: {', '.join(family_names())}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a list of `key: value` lines")
    return {str(key): value for key, value in content.items()}


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value!r} is not a list of `key: value` lines")
    return value
