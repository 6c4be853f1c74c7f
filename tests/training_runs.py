"""What tests of training share: an environment that costs little, and runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from batchpilot.agents.training.run_config import RunConfig, make_run_config
from batchpilot.agents.training.run_folder import RunFolder
from batchpilot.agents.training.trainer import TrainingResult, train

#: A handful of requests a second on a tiny cache: an interval takes a few milliseconds.
ENVIRONMENT: dict[str, Any] = {
    "profile": "llama-3.1-8b-rtx4090",
    "workload": "fixed:64:16",
    "arrivals": "gamma:12:2",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_blocks": 48,
    "horizon_s": 3.0,
    "decision_interval_s": 0.25,
    "itl_slo_ms": 25,
    "ttft_slo_ms": 300,
    "noise": 0.05,
    "base_policy": "memory-peak",
}
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 16, "batch_size": 16, "n_epochs": 2},
    "recurrent_ppo": {
        "n_steps": 16,
        "batch_size": 16,
        "n_epochs": 1,
        "policy_kwargs": {"lstm_hidden_size": 4},
    },
    "sac": {"learning_starts": 20, "batch_size": 16, "buffer_size": 500},
    "tqc": {"learning_starts": 20, "batch_size": 16, "buffer_size": 500},
    "dqn": {
        "learning_starts": 20,
        "batch_size": 16,
        "buffer_size": 40,
        "target_update_interval": 8,
    },
    "qrdqn": {
        "learning_starts": 20,
        "batch_size": 16,
        "buffer_size": 500,
        "policy_kwargs": {"n_quantiles": 5},
    },
}


def small_config(
    tmp_path: Path,
    algo: str = "ppo",
    *,
    timesteps: int = 64,
    settings: dict[str, Any] | None = None,
    hyperparameters: dict[str, Any] | None = None,
    **run: Any,
) -> RunConfig:
    """A run on a tiny environment with tiny networks."""
    chosen = {**HYPERPARAMETERS[algo], **(hyperparameters or {})}
    chosen["policy_kwargs"] = {"net_arch": [8], **chosen.get("policy_kwargs", {})}
    path = tmp_path / "given.yaml"
    content = {"env": "virtual", "settings": ENVIRONMENT | (settings or {}),
               "hyperparameters": chosen, "baselines": ["static"]}  # fmt: skip
    path.write_text(json.dumps(content))  # JSON is YAML
    given = {"algo": algo, "timesteps": timesteps, "n_envs": 1, "eval_every": 10**6,
             "eval_episodes": 1, "checkpoint_every": 10**6, **run}  # fmt: skip
    return make_run_config(given, str(path), {})


def silent(step: int, text: str = "") -> None:
    """Hears progress, says nothing."""


def run_in(folder: Path, config: RunConfig, **options: Any) -> tuple[RunFolder, TrainingResult]:
    """Trains in a folder."""
    run = RunFolder(folder)
    if not options.get("resume"):
        run.create(config)
    return run, train(config, run, silent, **options)
