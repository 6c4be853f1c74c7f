"""Searches hyperparameters with Optuna: short trainings, the hopeless ones ended early."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from stable_baselines3.common.callbacks import BaseCallback

from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.agents.training.evaluation import evaluate_agent
from batchpilot.agents.training.hyperparameters import (
    Hyperparameters,
    OffPolicyHyperparameters,
    PpoHyperparameters,
)
from batchpilot.agents.training.progress import Progress
from batchpilot.agents.training.random_state import undisturbed
from batchpilot.agents.training.run_config import RunConfig
from batchpilot.agents.training.run_folder import RunFolder

#: Evaluations of a trial; after each it may be ended.
REPORTS = 4


@dataclass(frozen=True)
class TuneSettings(Parameters):
    """How hard to search."""

    trials: int = parameter(8, minimum=1, help="trainings to try")
    steps: int = parameter(4_000, minimum=1, help="environment steps of each")
    startup: int = parameter(3, minimum=1, help="trials that are neither guided nor ended early")


def tune(
    config: RunConfig, settings: TuneSettings, folder: RunFolder, progress: Progress
) -> RunConfig:
    """Tries hyperparameters around the configuration's own, which are the first trial.

    Compared by SLO attainment on the held-out seeds of evaluations. One seed gives one search, as
    far as the environments are deterministic. `tune.json` in the folder has every trial.

    Args:
        config: Of the run.
        settings: How hard to search.
        folder: Of the run.
        progress: Hears of each trial.

    Returns:
        The configuration with the best hyperparameters found.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=config.run.seed, n_startup_trials=settings.startup),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=settings.startup, n_warmup_steps=1),
    )
    study.enqueue_trial(_own_values(config.hyperparameters))
    for number in range(settings.trials):
        study.optimize(lambda trial: _objective(trial, config, settings), n_trials=1)
        folder.write_json("tune.json", _trials(study))
        progress(number + 1, f"trial {number + 1}: best attainment {study.best_value:.3f}")
    return _with_values(config, study.best_params)


def _objective(trial: optuna.Trial, config: RunConfig, settings: TuneSettings) -> float:
    """Trains with the trial's values; the last evaluation's attainment."""
    from batchpilot.agents.training.trainer import open_training

    values = _suggest(trial, config.hyperparameters)
    run = replace(config.run, timesteps=settings.steps)
    tried = replace(_with_values(config, values), run=run)
    with open_training(tried) as (model, held_out):

        def evaluate() -> float:
            with undisturbed():
                result = evaluate_agent(model, held_out, config.run.eval_episodes)
            return result.mean("slo_attainment")

        reports = _Reports(trial, max(1, settings.steps // REPORTS), evaluate)
        model.learn(settings.steps, reports)
        if reports.pruned:
            raise optuna.TrialPruned
        return evaluate()


class _Reports(BaseCallback):
    """Evaluates between rollouts, and ends a trial that is not worth going on with."""

    def __init__(self, trial: optuna.Trial, every: int, evaluate: Any) -> None:
        super().__init__()
        self._trial, self._every, self._evaluate = trial, every, evaluate
        self._reported = 0
        self.pruned = False

    def _on_rollout_start(self) -> None:
        due = self.model.num_timesteps // self._every
        if due > self._reported:
            self._reported = due
            self._trial.report(self._evaluate(), due)
            self.pruned = self._trial.should_prune()

    def _on_step(self) -> bool:
        return not self.pruned


def _suggest(trial: optuna.Trial, own: Hyperparameters) -> dict[str, Any]:
    values: dict[str, Any] = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "gamma": trial.suggest_float("gamma", 0.9, 0.999),
        "batch_size": _choice(trial, "batch_size", own, (64, 128, 256)),
    }
    if isinstance(own, PpoHyperparameters):
        values |= {
            "n_steps": _choice(trial, "n_steps", own, (64, 128, 256, 512)),
            "gae_lambda": trial.suggest_float("gae_lambda", 0.8, 1.0),
            "ent_coef": trial.suggest_float("ent_coef", 0.0, 0.02),
            "log_std_init": trial.suggest_float("log_std_init", -2.5, 0.0),
        }
    if isinstance(own, OffPolicyHyperparameters):
        values["learning_starts"] = _choice(trial, "learning_starts", own, (200, 500, 1000))
    return values


def _choice(trial: optuna.Trial, name: str, own: Hyperparameters, others: tuple[int, ...]) -> int:
    """One of several, the configuration's own among them."""
    chosen: int = trial.suggest_categorical(name, sorted({*others, getattr(own, name)}))
    return chosen


def _own_values(own: Hyperparameters) -> dict[str, Any]:
    """The configuration's own values of what is searched."""
    values = asdict(own)
    searched: dict[str, Any] = {k: values[k] for k in ("gamma", "batch_size") if k in values}
    if isinstance(own, PpoHyperparameters):
        searched |= {k: values[k] for k in ("n_steps", "gae_lambda", "ent_coef", "log_std_init")}
    if not own.learning_rate.startswith("lin_"):
        searched["learning_rate"] = float(own.learning_rate)
    return searched


def _with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with these values.

    The reward's shaping follows gamma, unless it was given a discount of its own: with another one
    it is no longer neutral (Ng, Harada and Russell, 1999).
    """
    own = config.hyperparameters
    tuned = replace(own, **{**values, "learning_rate": f"{values['learning_rate']:.6g}"})
    recipe = config.recipe
    if recipe.settings.get("shaping_discount") == own.gamma:
        recipe = recipe.with_settings(shaping_discount=tuned.gamma)
    return replace(config, recipe=recipe, hyperparameters=tuned)


def _trials(study: optuna.Study) -> dict[str, Any]:
    return {
        "best": {"attainment": study.best_value, **study.best_params},
        "trials": [
            {"number": t.number, "state": t.state.name, "attainment": t.value, **t.params}
            for t in study.trials
        ],
    }
