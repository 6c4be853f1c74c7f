"""A run that is interrupted and goes on is the run that was never interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from training_runs import ENVIRONMENT, run_in, silent, small_config

from batchpilot.agents.training.checkpoint import CheckpointError
from batchpilot.agents.training.model_files import read_tensors
from batchpilot.agents.training.random_state import (
    read_random_state,
    undisturbed,
    write_random_state,
)
from batchpilot.agents.training.replayable import ReplayableEnv
from batchpilot.agents.training.run_folder import RunFolder
from batchpilot.agents.training.trainer import train
from batchpilot.env.batch_limits_env import BatchLimitsEnv


def flat(tensors: Any) -> list[Any]:
    """Every number of a nest of tensors, in order."""
    if isinstance(tensors, dict):
        return [item for key in sorted(tensors, key=str) for item in flat(tensors[key])]
    if isinstance(tensors, list | tuple):
        return [item for part in tensors for item in flat(part)]
    return tensors.flatten().tolist() if isinstance(tensors, torch.Tensor) else [tensors]


def with_total(config: Any, timesteps: int) -> Any:
    return replace(config, run=replace(config.run, timesteps=timesteps))


def stop_half_way(folder: Path, config: Any) -> Any:
    """Ctrl-C at half the total, which schedules that fall over the total do not notice."""
    half = config.run.timesteps // 2

    def interrupt(step: int, text: str = "") -> None:
        if step == half:
            os.kill(os.getpid(), signal.SIGINT)

    run = RunFolder(folder)
    run.create(config)
    return run, train(config, run, interrupt)


def check_exact_resume(
    tmp_path: Path, algo: str, total: int, *, stopped: bool = False, **changes: Any
) -> None:
    """Half, a new process's worth of fresh objects, the other half: the same to the last bit.

    The first half is a run of half the total, or one that was stopped there.
    """
    config = small_config(tmp_path, algo, timesteps=total, **changes)
    straight, _ = run_in(tmp_path / "straight", config)
    if stopped:
        halves, half = stop_half_way(tmp_path / "halves", config)
    else:
        halves, half = run_in(tmp_path / "halves", with_total(config, total // 2))
    assert half.steps < total
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    _, result = run_in(tmp_path / "halves", config, resume=True)
    assert result.steps >= total
    first, second = (run.path / "last" / "model.zip" for run in (straight, halves))
    assert flat(read_tensors(first)) == flat(read_tensors(second))
    tables = [(run.path / "episodes.csv").read_text() for run in (straight, halves)]
    assert len(tables[0].splitlines()) > 2
    assert tables[0] == tables[1]


def test_ppo_goes_on_exactly(tmp_path: Path):
    """In the middle of an episode, with rewards that are scaled by their running spread."""
    changes = {"normalize": {"norm_reward": True}}
    check_exact_resume(tmp_path, "ppo", 64, hyperparameters=changes, settings={"history": 2})


def test_sac_goes_on_exactly(tmp_path: Path):
    check_exact_resume(tmp_path, "sac", 60)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "recurrent_ppo", "sac", "tqc", "dqn", "qrdqn"])
def test_every_algorithm_goes_on_exactly(tmp_path: Path, algo: str):
    """10,000 steps straight, and 5,000 twice; 2,000 and 1,000 twice where learning is slow."""
    total = 10_000 if algo == "ppo" else 2_000
    # The exploration of both falls over the total.
    check_exact_resume(tmp_path, algo, total, stopped="dqn" in algo)


@pytest.mark.slow
def test_it_goes_on_exactly_with_environments_in_processes(tmp_path: Path):
    check_exact_resume(tmp_path, "ppo", 128, n_envs=2)


def test_an_evaluation_changes_nothing(tmp_path: Path):
    config = small_config(tmp_path, timesteps=48)
    watched = replace(config, run=replace(config.run, eval_every=16, checkpoint_every=16))
    plain, _ = run_in(tmp_path / "plain", config)
    seen, _ = run_in(tmp_path / "watched", watched)
    assert [row["step"] for row in seen.read_rows("evaluations.csv")] == [0, 16, 32, 48]
    first, second = (run.path / "last" / "model.zip" for run in (plain, seen))
    assert flat(read_tensors(first)) == flat(read_tensors(second))


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path):
    config = small_config(tmp_path, timesteps=64)
    straight, _ = run_in(tmp_path / "straight", config)

    calls = []

    def interrupt(step: int, text: str = "") -> None:
        calls.append(step)
        if step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    run = RunFolder(tmp_path / "stopped")
    run.create(config)
    result = train(config, run, interrupt)
    assert (result.finished, run.newest_checkpoint().name) == (False, "step-0000000032")
    assert max(calls) < 64
    assert train(config, run, silent, resume=True).finished
    first, second = (r.path / "last" / "model.zip" for r in (straight, run))
    assert flat(read_tensors(first)) == flat(read_tensors(second))


def test_ctrl_c_in_the_last_rollout_leaves_the_rest_to_whoever_goes_on(tmp_path: Path):
    config = small_config(tmp_path, timesteps=32, eval_every=16)

    def interrupt(step: int, text: str = "") -> None:
        if step == 30:
            os.kill(os.getpid(), signal.SIGINT)

    run = RunFolder(tmp_path / "run")
    run.create(config)
    result = train(config, run, interrupt)
    assert (result.steps, result.finished) == (32, False)
    assert run.read_rows("evaluations.csv")[-1]["step"] == 16
    assert train(config, run, silent, resume=True).finished
    assert run.read_rows("evaluations.csv")[-1]["step"] == 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run with a checkpoint at its end."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(folder, timesteps=32)
    run, _ = run_in(folder / "run", config)
    return config, run


@pytest.mark.parametrize("name", ["model.zip", "arrays.npz", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_checkpoint_is_refused(trained: Any, tmp_path: Path, name: str, damage: str):
    config, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    path = copy / "checkpoints" / run.newest_checkpoint().name / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-7] if damage == "cut" else content[:-1] + b"~")
    with pytest.raises(CheckpointError, match=r"checkpoint .* (is refused|whole checkpoint)|whole"):
        run_in(copy, with_total(config, 64), resume=True)


def test_another_environment_is_noticed(trained: Any, tmp_path: Path):
    config, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    recipe = config.recipe.with_settings(arrivals="gamma:13:2")
    changed = replace(with_total(config, 64), recipe=recipe)
    with pytest.raises(CheckpointError, match="environment 0 does not come back"):
        run_in(copy, changed, resume=True)


def test_another_version_is_refused(trained: Any, tmp_path: Path):
    config, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    path = copy / "checkpoints" / run.newest_checkpoint().name / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match="has version 2; this is 1"):
        run_in(copy, with_total(config, 64), resume=True)


def test_an_episode_is_played_again_to_the_last_digit():
    env = ReplayableEnv(BatchLimitsEnv(**ENVIRONMENT))
    env.reset(seed=4)
    env.reset()  # the second of the seed's episodes
    actions = np.random.default_rng(1).uniform(-1, 1, (8, 2)).astype(np.float32)
    for action in actions[:5]:
        seen = env.step(action)[0]
    state = json.loads(json.dumps(env.get_state()))
    again = ReplayableEnv(BatchLimitsEnv(**ENVIRONMENT))
    again.reset(seed=77)
    assert again.set_state(state).tolist() == seen.tolist()
    for action in actions[5:]:
        first, second = env.step(action), again.step(action)
        assert repr(first) == repr(second)
    assert repr(env.reset()) == repr(again.reset())
    env.close(), again.close()


def test_what_is_no_state_is_refused():
    env = ReplayableEnv(gymnasium.make("CartPole-v1"))
    with pytest.raises(ValueError, match="lacks 'start' or 'actions'"):
        env.set_state({"start": {}})


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(1))]


def test_chance_comes_back():
    random.gauss(0, 1), np.random.normal()  # each keeps half of a pair for later
    state = json.loads(json.dumps(read_random_state()))
    first = draws()
    assert draws() != first
    write_random_state(state)
    assert draws() == first
    write_random_state(state)
    with undisturbed():
        draws()
    assert draws() == first


def test_the_second_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch):
    from batchpilot.agents.training import interrupts

    before = signal.getsignal(signal.SIGINT)
    with interrupts.stop_on_interrupt() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one, sent to the group as well
        assert request.is_set
        monkeypatch.setattr(interrupts, "ONE_SIGNAL_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
