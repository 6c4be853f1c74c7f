"""Files of models: only tensors are read, and whatever else is in them never runs."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from batchpilot.agents.training import model_files
from batchpilot.agents.training.algorithms import ALGORITHMS, build_model
from batchpilot.agents.training.model_files import CheckpointError, load_model, write_model


class Spaces(gymnasium.Env[Any, Any]):
    """Nothing but spaces."""

    def __init__(self, discrete: bool) -> None:
        self.observation_space = spaces.Box(-1, 1, (5,), np.float32)
        self.action_space = spaces.Discrete(6) if discrete else spaces.Box(-1, 1, (2,), np.float32)


def fresh_model(name: str = "ppo", seed: int = 0, **values: Any) -> Any:
    kind = ALGORITHMS[name]
    values = {"net_arch": "4", **values}
    if "ppo" not in name:
        values |= {"buffer_size": 10}
    vector = DummyVecEnv([lambda: Spaces(kind.discrete)])
    return build_model(name, kind.hyperparameters(**values), vector, seed)


def parameters(model: Any) -> list[float]:
    return [v for p in model.policy.parameters() for v in p.flatten().tolist()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_model_comes_back(tmp_path: Path, name: str):
    model, other = fresh_model(name, 0), fresh_model(name, 1)
    assert parameters(model) != parameters(other)
    write_model(model, tmp_path / "model.zip")
    load_model(other, tmp_path / "model.zip")
    assert parameters(model) == parameters(other)
    seen = np.zeros((1, 5), np.float32)
    first, second = (m.predict(seen, deterministic=True)[0] for m in (model, other))
    assert first.tolist() == second.tolist()


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_the_bomb_works(tmp_path: Path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def poisoned(tmp_path: Path, member: str, content: bytes) -> Path:
    """A good model's file with one member exchanged or added."""
    good, bad = tmp_path / "good.zip", tmp_path / "bad.zip"
    write_model(fresh_model(), good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            if name != member:
                target.writestr(name, source.read(name))
        target.writestr(member, content)
    return bad


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
@pytest.mark.parametrize("form", ["pickle", "torch", "nested"])
def test_pickle_in_a_member_is_refused_and_does_not_run(tmp_path: Path, member: str, form: str):
    bomb = Bomb(tmp_path / "mark")
    content = {
        "pickle": lambda: pickle.dumps(bomb),
        "torch": lambda: torch_bytes(bomb),
        "nested": lambda: torch_bytes({"weight": torch.zeros(2), "more": [bomb]}),
    }[form]()
    path = poisoned(tmp_path, member, content)
    with pytest.raises(CheckpointError, match="bad.zip is refused: '.*' holds more than tensors"):
        load_model(fresh_model(), path)
    assert not (tmp_path / "mark").exists()


def test_stable_baselines_own_file_is_refused_for_its_pickle(tmp_path: Path):
    """`data` is what `BaseAlgorithm.load` would unpickle."""
    model = fresh_model()
    model.note = Bomb(tmp_path / "mark")
    model.save(tmp_path / "sb3.zip")
    with pytest.raises(CheckpointError, match="member 'data' is not tensors, and could run code"):
        load_model(fresh_model(), tmp_path / "sb3.zip")
    assert not (tmp_path / "mark").exists()
    type(model).load(tmp_path / "sb3.zip")  # the danger is real
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("member", ["../policy.pth", "/policy.pth", "policy.pkl", "POLICY.pth"])
def test_members_of_other_names_are_refused(tmp_path: Path, member: str):
    path = poisoned(tmp_path, member, torch_bytes({}))
    with pytest.raises(CheckpointError, match="is not tensors"):
        load_model(fresh_model(), path)


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_files, "MOST_MEMBER_BYTES", 10)
    write_model(fresh_model(), tmp_path / "model.zip")
    with pytest.raises(CheckpointError, match="unpacks to [0-9]+ bytes, more than 10"):
        load_model(fresh_model(), tmp_path / "model.zip")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float):
    model = fresh_model()
    with torch.no_grad():
        model.policy.action_net.bias[0] = value
    write_model(model, tmp_path / "model.zip")
    with pytest.raises(CheckpointError, match="action_net.bias in 'policy.pth' is not finite"):
        load_model(fresh_model(), tmp_path / "model.zip")


def test_another_shape_or_algorithm_is_refused(tmp_path: Path):
    write_model(fresh_model(), tmp_path / "model.zip")
    for other in (fresh_model(net_arch="8"), fresh_model("sac")):
        with pytest.raises(CheckpointError, match="not of this algorithm and shape"):
            load_model(other, tmp_path / "model.zip")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", None])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "model.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read model"):
        load_model(fresh_model(), path)
