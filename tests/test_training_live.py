"""Fine-tuning on a real vLLM in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import run_in

from batchpilot.agents.artefact import load_artefact
from batchpilot.agents.training.cli import finish
from batchpilot.agents.training.run_config import make_run_config

pytestmark = [pytest.mark.live, pytest.mark.slow]


def test_an_agent_trains_on_a_live_engine_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "cache"))
    settings = {
        "model": "tiny", "workload": "fixed:32:16", "arrivals": "poisson:4", "horizon_s": 3,
        "decision_interval_s": 0.25, "kv_blocks": 64, "max_num_seqs": 8,
        "max_num_batched_tokens": 256, "base_policy": "memory-peak", "capacity_probe_s": 2,
    }  # fmt: skip
    hyperparameters = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "net_arch": "8"}
    content = {"env": "live", "settings": settings, "hyperparameters": hyperparameters,
               "baselines": ["static"]}  # fmt: skip
    (tmp_path / "live.yaml").write_text(json.dumps(content))
    given = {"timesteps": 16, "eval_episodes": 1, "test_episodes": 1, "name": "live"}
    config = make_run_config(given, str(tmp_path / "live.yaml"), {})
    assert config.run.n_envs == 1
    run_in(tmp_path / "run", config)
    longer = replace(config, run=replace(config.run, timesteps=24))
    run, result = run_in(tmp_path / "run", longer, resume=True)
    assert (result.steps, result.finished) == (24, True)
    agent, static = finish(longer, run, result)
    assert agent.episodes[0].inside + agent.episodes[0].missed > 0
    assert static.label == "static"
    assert load_artefact(run.path / "policy").manifest.targets.itl_slo_ms == 100
