"""Checkpoints: everything that decides how training goes on, so that it goes on exactly.

A folder of four files, written whole or not at all:

    model.zip      networks, optimizers, loose tensors (see `model_files`)
    arrays.npz     the newest observations, LSTM states, the spread of rewards, the replay buffer
    state.json     counters, every source of chance, and each environment's running episode
    manifest.json  format version, and the SHA-256 of the others

A checkpoint is taken between an update and the next rollout: what a rollout has gathered so far
is never part of it. Exact are equal totals of steps: with `lin_` schedules or exploration that
falls over time, a run of half the length has other values on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from batchpilot.agents.training.model_files import CheckpointError, load_model, write_model
from batchpilot.agents.training.random_state import read_random_state, write_random_state

CHECKPOINT_VERSION = 1
_FILES = ("model.zip", "arrays.npz", "state.json")
_COUNTERS = (
    *("num_timesteps", "_episode_num", "_n_updates", "_n_calls"),
    *("_current_progress_remaining", "exploration_rate"),
)
_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

Arrays = dict[str, npt.NDArray[Any]]


def write_checkpoint(model: BaseAlgorithm, folder: Path) -> None:
    """Writes a checkpoint; an older one of the same name is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_model(model, partial / "model.zip")
    with open(partial / "arrays.npz", "wb") as file:
        np.savez(file, **_read_arrays(model))  # type: ignore[arg-type]
    (partial / "state.json").write_text(json.dumps(_read_state(model)), encoding="utf-8")
    manifest = {"version": CHECKPOINT_VERSION, "sha256": {n: _hash(partial / n) for n in _FILES}}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_checkpoint(model: BaseAlgorithm, folder: Path) -> dict[str, Any]:
    """Puts a model, and its environments, where the checkpoint was taken.

    Args:
        model: Built from the run's own configuration.
        folder: The checkpoint.

    Returns:
        The sources of chance, for `write_random_state` as the last thing before training goes on.

    Raises:
        CheckpointError: A file is missing, changed or of another version; or the environments do
            not come back to the same observations.
    """
    _check_manifest(folder)
    load_model(model, folder / "model.zip")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        with np.load(folder / "arrays.npz", allow_pickle=False) as file:
            arrays = dict(file)
        for name, value in state["counters"].items():
            setattr(model, name, value)
        model.action_space.np_random.bit_generator.state = state["action_space"]
        _write_arrays(model, arrays)
        _restore_environments(model, state["environments"], folder)
        _write_episodes(model, state["episodes"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error!r}") from error
    chance: dict[str, Any] = state["chance"]
    return chance


def resume_chance(chance: dict[str, Any]) -> None:
    """Puts every source of chance back; the last step before training goes on."""
    write_random_state(chance)


def _read_state(model: BaseAlgorithm) -> dict[str, Any]:
    environment = _environment(model)
    return {
        "counters": {n: getattr(model, n) for n in _COUNTERS if hasattr(model, n)},
        "chance": read_random_state(),
        "action_space": model.action_space.np_random.bit_generator.state,
        "environments": environment.env_method("get_state"),
        "episodes": [dict(item) for item in model.ep_info_buffer or ()],
    }


def _read_arrays(model: BaseAlgorithm) -> Arrays:
    assert model._last_obs is not None, "a checkpoint is taken during training"
    arrays: Arrays = {
        "last_observations": np.asarray(model._last_obs),
        "last_episode_starts": np.asarray(model._last_episode_starts),
    }
    if isinstance(model.env, VecNormalize):
        spread = model.env.ret_rms
        arrays |= {
            "reward_spread": np.array([spread.mean, spread.var, spread.count]),
            "running_returns": model.env.returns,
        }
    for name, tensor in zip(_LSTM, _lstm_states(model), strict=False):
        arrays[name] = tensor.numpy()
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(buffer, ReplayBuffer):
        arrays["buffer_position"] = np.array([buffer.pos, int(buffer.full)])
        filled = buffer.buffer_size if buffer.full else buffer.pos
        arrays |= {f"buffer_{name}": getattr(buffer, name)[:filled] for name in _BUFFER}
    return arrays


def _write_arrays(model: BaseAlgorithm, arrays: Arrays) -> None:
    model._last_obs = model._last_original_obs = arrays["last_observations"]
    model._last_episode_starts = arrays["last_episode_starts"]
    if isinstance(model.env, VecNormalize):
        spread, saved = model.env.ret_rms, arrays["reward_spread"]
        spread.mean, spread.var, spread.count = saved[0], saved[1], float(saved[2])
        model.env.returns = arrays["running_returns"]
    for name, tensor in zip(_LSTM, _lstm_states(model), strict=False):
        tensor.copy_(tensor.new_tensor(arrays[name]))
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(buffer, ReplayBuffer):
        position, full = arrays["buffer_position"].tolist()
        buffer.pos, buffer.full = position, bool(full)
        for name in _BUFFER:
            values = arrays[f"buffer_{name}"]
            getattr(buffer, name)[: len(values)] = values


_LSTM = ("lstm_pi_hidden", "lstm_pi_cell", "lstm_vf_hidden", "lstm_vf_cell")


def _lstm_states(model: BaseAlgorithm) -> list[Any]:
    states = getattr(model, "_last_lstm_states", None)
    return [] if states is None else [*states.pi, *states.vf]


def _restore_environments(model: BaseAlgorithm, states: list[Any], folder: Path) -> None:
    environment = _environment(model)
    if len(states) != environment.num_envs:
        raise CheckpointError(
            f"checkpoint {folder} has {len(states)} environments, this run {environment.num_envs}"
        )
    for index, state in enumerate(states):
        (seen,) = environment.env_method("set_state", state, indices=[index])
        newest = np.asarray(model._last_obs)
        if not state["replays"]:
            newest[index] = seen  # a live engine began its episode afresh
        elif not np.array_equal(seen, newest[index]):
            raise CheckpointError(
                f"checkpoint {folder}: environment {index} does not come back to what it showed; "
                "its code, settings or libraries have changed since"
            )


def _write_episodes(model: BaseAlgorithm, episodes: list[Any]) -> None:
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)


def _environment(model: BaseAlgorithm) -> VecEnv:
    environment = model.get_env()
    assert environment is not None, "a model in training has an environment"
    return environment


def _check_manifest(folder: Path) -> None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version, hashes = manifest["version"], manifest["sha256"]
        if version != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"checkpoint {folder} has version {version}; this is {CHECKPOINT_VERSION}"
            )
        changed = [name for name in _FILES if hashes[name] != _hash(folder / name)]
    except (KeyError, OSError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error!r}") from error
    if changed:
        raise CheckpointError(f"checkpoint {folder} is refused: {changed[0]} has changed")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
