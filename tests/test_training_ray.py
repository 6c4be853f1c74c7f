"""Environments on Ray actors: a local cluster of two, workers that die."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import ENVIRONMENT, run_in, small_config

from batchpilot.agents.training.evaluation import evaluate_base, play_episodes
from batchpilot.agents.training.model_files import read_tensors
from batchpilot.agents.training.recipes import EnvRecipe, build_vector

ray = pytest.importorskip("ray")
RECIPE = EnvRecipe("virtual", ENVIRONMENT)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two cores' worth of workers on this machine."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def walk(vector: Any, steps: int, kill_at: int | None = None) -> list[Any]:
    """Random actions; everything that came of them."""
    vector.seed(5)
    seen = [vector.reset().tolist()]
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, vector.num_envs, 2))
    for number, action in enumerate(actions.astype(np.float32)):
        if number == kill_at:
            ray.kill(vector.workers[-1])
        observations, rewards, overs, infos = vector.step(action)
        seen.append((observations.tolist(), rewards.tolist(), overs.tolist()))
        seen.append([info["clock_s"] for info in infos])
    return seen


def test_one_worker_two_workers_and_none_are_the_same():
    """20 intervals: longer than an episode, so that environments begin another."""
    walks = []
    for workers in (0, 1, 2):
        vector = build_vector(RECIPE, 3, workers=workers)
        walks.append(walk(vector, 20))
        vector.close()
    assert walks[0] == walks[1] == walks[2]


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost():
    undisturbed, killed = (build_vector(RECIPE, 3, workers=2) for _ in range(2))
    expected = walk(undisturbed, 20)
    assert walk(killed, 20, kill_at=15) == expected
    assert (undisturbed.replaced, killed.replaced) == (0, 1)
    undisturbed.close(), killed.close()


def test_every_worker_may_die_between_calls():
    vector = build_vector(RECIPE, 2, workers=2)
    walk(vector, 5)
    before = vector.env_method("get_state")
    for worker in vector.workers:
        ray.kill(worker)
    assert vector.env_method("get_state") == before
    assert vector.replaced == 2
    vector.close()


def test_evaluations_do_not_hang_on_the_number_of_workers():
    figures = []
    for workers in (1, 2):
        vector = build_vector(RECIPE.under("static"), 2, workers=workers)
        figures.append(evaluate_base("static", vector, 4).figures())
        vector.close()
    assert figures[0] == figures[1]


def test_training_does_not_hang_on_the_number_of_workers(tmp_path: Path):
    """Same seed, same total, same weights; a run goes on with another number of workers."""
    config = small_config(tmp_path, timesteps=64, n_envs=2)
    models = []
    for workers in (0, 1, 2):
        chosen = replace(config, run=replace(config.run, workers=workers))
        run, _ = run_in(tmp_path / f"run-{workers}", chosen)
        models.append(read_tensors(run.path / "last" / "model.zip")["policy"])
    for other in models[1:]:
        assert all((other[key] == value).all() for key, value in models[0].items())


def test_a_step_that_always_kills_its_worker_is_an_error():
    vector = build_vector(RECIPE, 1, workers=1)
    with pytest.raises(RuntimeError, match="died 3 times in the same step"):
        _die(vector)
    vector.close()


def _die(vector: Any) -> None:
    """Kills whoever is asked."""

    def ask(worker: Any, share: Any) -> Any:
        ray.kill(worker)
        return worker.call.remote(0, "get_state", (), {})

    vector._answer(0, ask)


def test_play_episodes_on_ray_uses_the_seeds_asked_for():
    vector = build_vector(RECIPE, 2, workers=2)
    zero = np.zeros((2, 2), np.float32)
    results = play_episodes(vector, lambda *_: zero, 3, seed=40)
    assert [result.seed for result in results] == [40, 41, 42]
    vector.close()
