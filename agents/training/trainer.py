"""Trains an agent in a run's folder, from the start or from its newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from batchpilot.agents.training.algorithms import build_model
from batchpilot.agents.training.callbacks import BetweenRollouts, Rhythm, ServingMetrics
from batchpilot.agents.training.checkpoint import read_checkpoint
from batchpilot.agents.training.evaluation import Evaluation, evaluate_agent, evaluate_base
from batchpilot.agents.training.interrupts import stop_on_interrupt
from batchpilot.agents.training.model_files import load_model
from batchpilot.agents.training.progress import Progress
from batchpilot.agents.training.recipes import build_vector
from batchpilot.agents.training.run_config import RunConfig
from batchpilot.agents.training.run_folder import RunFolder
from batchpilot.agents.training.steady_search import start_from_search
from batchpilot.agents.training.warm_start import warm_start_model
from batchpilot.env.process import prepare_process


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    Attributes:
        steps: Environment steps, all together.
        finished: Whether it reached its total; else it was asked to stop, and has saved.
        best: The best SLO attainment of its evaluations; None without one.
    """

    steps: int
    finished: bool
    best: float | None


def train(
    config: RunConfig,
    folder: RunFolder,
    progress: Progress,
    *,
    resume: bool = False,
    experience: Path | None = None,
) -> TrainingResult:
    """Trains; the folder holds everything that comes of it.

    Args:
        config: Of the run; where it goes on, only its total of steps may be another.
        folder: Made already.
        progress: Hears how far it is.
        resume: Go on from the newest checkpoint, or with a search that has none yet.
        experience: Logged decisions to imitate before training starts.

    Raises:
        ConfigError: A setting, a checkpoint or a log that cannot be used.
    """
    _ready_process()
    with (
        open_training(config) as (model, held_out),
        stop_on_interrupt() as stop,
    ):
        begun = resume and (folder.has_checkpoint or not config.run.search_episodes)
        chance = _go_on(model, folder) if begun else None
        if experience is not None and not begun:
            warm_start_model(model, experience, config, progress)

        def evaluate() -> Evaluation:
            return evaluate_agent(model, held_out, config.run.eval_episodes)

        if config.run.search_episodes and not begun:
            report = start_from_search(
                model, config, folder, progress, stop, lambda: evaluate().mean("slo_attainment")
            )
            if report is None:
                return TrainingResult(0, finished=False, best=None)
        model.set_logger(_logger(folder))
        between = BetweenRollouts(
            folder,
            evaluate,
            evaluations=Rhythm(config.run.eval_every, is_on=config.recipe.kind != "live"),
            checkpoints=Rhythm(config.run.checkpoint_every),
            stop=stop,
            chance=chance,
            progress=progress,
        )
        between.init_callback(model)  # also where no step is left to learn
        left = config.run.timesteps - model.num_timesteps
        if left > 0:
            callbacks = [between, ServingMetrics(folder, progress)]
            model.learn(left, callbacks, log_interval=1, reset_num_timesteps=not begun)
        if not between.stopped:
            between.save_now()
            if not stop.is_set:  # else the comparison is left to whoever goes on
                between.evaluate_now()
        model.logger.close()
        return TrainingResult(between.saved_steps, not stop.is_set, between.best)


@contextmanager
def open_training(config: RunConfig) -> Iterator[tuple[BaseAlgorithm, VecEnv]]:
    """A fresh model on its environments, and others for evaluations; all are closed at the end.

    A process has room for one live vLLM: there both are the same.
    """
    recipe = config.recipe.paired(config.hyperparameters.paired_episodes)
    vector = held_out = build_vector(recipe, config.run.n_envs, workers=config.run.workers)
    try:
        if config.recipe.kind != "live":
            count = min(config.run.n_envs, config.run.eval_episodes)
            held_out = build_vector(config.recipe, count, workers=config.run.workers)
        if config.hyperparameters.norm_reward:
            gamma = config.hyperparameters.gamma
            vector = VecNormalize(vector, norm_obs=False, norm_reward=True, gamma=gamma)
        yield (
            build_model(config.run.algo, config.hyperparameters, vector, config.run.seed),
            held_out,
        )
    finally:
        vector.close()
        if config.recipe.kind != "live":
            held_out.close()


def load_trained(config: RunConfig, path: Path, vector: VecEnv) -> BaseAlgorithm:
    """A trained model, built anew and given the tensors of a file.

    Args:
        config: Of its run.
        path: A `model.zip`.
        vector: Anything with its spaces.

    Raises:
        CheckpointError: The file cannot be used; nothing in it is run.
    """
    model = build_model(config.run.algo, config.hyperparameters, vector, seed=None)
    load_model(model, path)
    return model


def compare(
    config: RunConfig,
    model_path: Path,
    *,
    episodes: int,
    seed: int,
    tell: Callable[[str], None],
) -> list[Evaluation]:
    """Plays the same held-out episodes with a trained model and with policies.

    Args:
        config: Of the model's run.
        model_path: Its `model.zip`.
        episodes: For each.
        seed: Of the first.
        tell: Hears who plays.
    """
    _ready_process()
    count = min(config.run.n_envs, episodes)
    results = []
    tell(f"comparing on {episodes} other held-out episodes: the agent")
    vector = build_vector(config.recipe, count)
    try:
        model = load_trained(config, model_path, vector)
        results.append(evaluate_agent(model, vector, episodes, seed=seed))
    finally:
        vector.close()
    for policy in config.baselines:
        tell(f"comparing: {policy}")
        vector = build_vector(config.recipe.under(policy), count)
        try:
            results.append(evaluate_base(policy, vector, episodes, seed=seed))
        finally:
            vector.close()
    return results


def _ready_process() -> None:
    """One thread for torch: networks this small lose by more, and environments need the cores."""
    prepare_process()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)


def _go_on(model: BaseAlgorithm, folder: RunFolder) -> dict[str, Any]:
    chance = read_checkpoint(model, folder.newest_checkpoint())
    for name in ("episodes.csv", "evaluations.csv"):
        folder.forget_rows_after(name, model.num_timesteps)
    return chance


def _logger(folder: RunFolder) -> Logger:
    path = folder.path / "tensorboard"
    path.mkdir(exist_ok=True)
    return Logger(str(path), [TensorBoardOutputFormat(str(path))])
