"""A trained model as a policy: the same actions in torch, in ONNX, and in an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import small_config

from batchpilot.agents.artefact import load_artefact
from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.learned_model import OnnxModel, probe_observations
from batchpilot.agents.training import export
from batchpilot.agents.training.algorithms import ALGORITHMS, build_model
from batchpilot.agents.training.export import export_policy
from batchpilot.agents.training.recipes import build_vector
from batchpilot.agents.training.run_config import make_run_config
from batchpilot.env.batch_limits_env import BatchLimitsEnv

FAST = ("ppo", "sac", "dqn")


def exported(tmp_path: Path, algo: str, **settings: Any) -> Any:
    """A model whose weights are far from zero, its policy's folder, and its configuration."""
    config = small_config(tmp_path, algo, settings=settings)
    vector = build_vector(config.recipe, 1)
    model = build_model(algo, config.hyperparameters, vector, seed=1)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(3.0).add_(0.05)
    export_policy(model, config, tmp_path / "policy", name="tiny", version="7", steps=12)
    vector.close()
    return model, tmp_path / "policy", config


@pytest.mark.parametrize(
    "algo",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS],
)
def test_onnx_gives_the_actions_of_the_model(tmp_path: Path, algo: str):
    """What Stable-Baselines3 predicts, not only what our own module computes."""
    model, folder, _ = exported(tmp_path, algo, history=2)
    artefact = load_artefact(folder)
    onnx, state, chosen = OnnxModel(artefact), None, []
    for seen in probe_observations(artefact.manifest.observation_size):
        expected, state = model.predict(seen[None], state=state, deterministic=True)
        found = artefact.manifest.action.chosen(onnx.run(seen).tolist())
        np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-5)
        chosen.append(found)
    assert len(set(chosen)) > 1


def test_the_manifest_says_how_it_was_trained(tmp_path: Path):
    _, folder, config = exported(tmp_path, "ppo", history=2, seqs_span=3.0)
    manifest = load_artefact(folder).manifest
    assert (manifest.name, manifest.version, manifest.algorithm) == ("tiny", "7", "ppo")
    assert (manifest.history, manifest.decision_interval_s) == (2, 0.25)
    assert (manifest.base_policy, manifest.action.seqs_span) == ("memory-peak", 3.0)
    assert manifest.targets.itl_slo_ms == 25
    assert manifest.training == {"steps": 12, "seed": 0, "environment": "virtual"}
    assert manifest.config_sha256 == export.sha256_hex(config.to_text().encode())


def test_a_policy_trained_on_drawn_targets_stands_in_for_none(tmp_path: Path):
    """What an operator leaves out stays out, for the base policy too."""
    drawn = make_run_config({}, None, {})
    assert (drawn.recipe.kind, export._targets(drawn, export.env_parameters(drawn))) == (
        "random",
        LatencyTargets(None, None),
    )


def test_the_policy_acts_in_an_engine_as_the_agent_did_in_training(tmp_path: Path):
    """No training-serving skew: the same limits in every interval of an episode."""
    model, folder, config = exported(
        tmp_path, "ppo", history=2, kv_blocks=24, arrivals="gamma:20:2"
    )
    directed = BatchLimitsEnv(**config.recipe.settings)
    seen, _ = directed.reset(seed=3)
    expected = []
    over = False
    while not over:
        action, _ = model.predict(seen, deterministic=True)
        seen, _, _, over, info = directed.step(action)
        expected.append(info["applied_limits"])
    served = BatchLimitsEnv(**config.recipe.settings)
    served.reset(seed=3)
    served._opened.engine.set_policy(PolicySpec.parse(f"learned:{folder}").build())
    found, over = [], False
    while not over:
        _, _, _, over, info = served.step(np.zeros(2, np.float32))
        found.append(info["applied_limits"])
    directed.close(), served.close()
    assert len({json.dumps(limits) for limits in expected}) > 2
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    assert same >= 0.8 * len(expected)


def test_actions_that_differ_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "greatest_difference", lambda *_: 2e-5)
    with pytest.raises(ValueError, match="ONNX's actions differ from torch's by 2e-05"):
        exported(tmp_path, "ppo")
