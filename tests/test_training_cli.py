"""`batchpilot train`: one whole run, going on with it, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import ENVIRONMENT, HYPERPARAMETERS
from tuner_double import until

from batchpilot.__main__ import main
from batchpilot.agents.artefact import load_artefact
from batchpilot.agents.training.cli import EXIT_INTERRUPTED


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    hyperparameters = {**HYPERPARAMETERS["ppo"], "policy_kwargs": {"net_arch": [8]}}
    content = {"env": "virtual", "settings": ENVIRONMENT, "hyperparameters": hyperparameters,
               "baselines": ["static", "memory-peak"]}  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


def train(*words: Any) -> int:
    return main(["train", *map(str, words)])


def best_step(out: Path) -> int:
    return int(json.loads((out / "best" / "figures.json").read_text())["step"])


def test_a_run_leaves_everything_behind_and_goes_on(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    every = ("--eval-every", 32, "--eval-episodes", 1, "--checkpoint-every", 32)
    ends = ("--test-episodes", 2, "--name", "tiny")
    words = ("--config", config_file, "--timesteps", 48, "--n-envs", 1, *every, *ends)
    assert train(*words, "--out", out) == 0
    printed = capsys.readouterr().out
    for name in ("agent", "static", "memory-peak"):
        assert f" {name} " in printed
    artefact = load_artefact(out / "policy")
    assert artefact.label == f"tiny@{best_step(out)}"  # the best one's steps, not the run's
    figures = json.loads((out / "evaluation.json").read_text())["figures"]
    assert artefact.manifest.evaluation == figures["agent"]
    assert set(figures) == {"agent", "static", "memory-peak"}
    expected = {
        *("config.yaml", "command.txt", "environment.json", "checkpoints", "best", "last"),
        *("episodes.csv", "evaluations.csv", "evaluation.json", "curves.png", "tensorboard"),
        "policy",
    }
    assert {path.name for path in out.iterdir()} == expected
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    environment = json.loads((out / "environment.json").read_text())
    assert len(environment["git_commit"]) in (0, 40)
    assert environment["stable-baselines3"]

    assert train("--resume", out, "--timesteps", 64) == 0
    assert load_artefact(out / "policy").label == f"tiny@{best_step(out)}"
    steps = [line.split(",")[0] for line in (out / "evaluations.csv").read_text().splitlines()]
    assert steps == ["step", "0", "32", "48", "64"]
    assert len((out / "command.txt").read_text().splitlines()) == 2

    # A run with no step left is compared and exported again, and nothing else.
    (out / "evaluation.json").unlink()
    assert train("--resume", out) == 0
    assert json.loads((out / "evaluation.json").read_text())["figures"]["agent"]["episodes"] == 2

    # So is the last model, where it is asked for.
    (out / "best" / "model.zip").write_bytes(b"damaged, and not looked at")
    (out / "evaluation.json").unlink()
    assert train("--resume", out, "--export", "last") == 0
    assert (out / "evaluation.json").exists()
    assert load_artefact(out / "policy").label == "tiny@64"
    again = [line.split(",")[0] for line in (out / "evaluations.csv").read_text().splitlines()]
    assert again == steps


def test_tensorboard_shows_how_requests_are_served(config_file: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("--config", config_file, "--timesteps", 32, "--n-envs", 1, "--eval-every", 16)
    assert train(*words, "--eval-episodes", 1, "--test-episodes", 1, "--out", tmp_path / "run") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"serving/slo_attainment", "serving/shielded_share", "serving/reward_shaping"} <= tags
    assert {"rollout/ep_rew_mean", "train/value_loss", "eval/slo_attainment"} <= tags


@pytest.mark.slow
def test_a_search_ends_with_its_best_hyperparameters(config_file: Path, tmp_path: Path):
    out = tmp_path / "run"
    tuning = ("--tune", "--tune-trials", 3, "--tune-steps", 64, "--tune-startup", 1)
    words = ("--config", config_file, "--timesteps", 32, "--n-envs", 1, "--eval-episodes", 1)
    assert train(*words, *tuning, "--test-episodes", 1, "--out", out) == 0
    found = json.loads((out / "tune.json").read_text())
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2]
    used = yaml.safe_load((out / "config.yaml").read_text())["hyperparameters"]
    assert used["gamma"] == found["best"]["gamma"]
    # The first trial has the configuration's own values.
    assert found["trials"][0]["n_steps"] == HYPERPARAMETERS["ppo"]["n_steps"]
    complete = [t["attainment"] for t in found["trials"] if t["state"] == "COMPLETE"]
    assert found["best"]["attainment"] == max(complete)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--timesteps", "10"), "--out DIR is required"),
        (("--out", "{tmp}", "--timesteps", "few"), "timesteps='few' is not a whole number"),
        (("--out", "{tmp}", "--algo", "pp"), "unknown algorithm 'pp'; known: ppo"),
        (("--out", "{tmp}", "--base-policy", "luck"), "unknown policy 'luck'"),
        (("--out", "{tmp}", "--timesteps", "9", "--warm-start", "nosuch"), "no experience log at"),
        (("--out", "{tmp}", "--history", "0"), "history=0 must be at least 1"),
        (("--resume", "{tmp}/nowhere"), "nowhere is no run.s folder"),
    ],
)
def test_what_it_refuses_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], error: str
):
    import re

    assert train(*(word.format(tmp=tmp_path / "run") for word in words)) == 2
    assert re.search(error, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("/dev/null", "Not a directory"),
        ("/proc/run", "No such file or directory"),
        ("{tmp}/file", "Not a directory"),
        ("{tmp}/used", "Is a directory"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_in_a_line(
    tmp_path: Path,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    out: str,
    reason: str,
):
    (tmp_path / "file").touch()
    (tmp_path / "used" / "environment.json").mkdir(parents=True)
    out = out.format(tmp=tmp_path)
    assert train("--config", config_file, "--timesteps", 10, "--out", out) == 2
    error = f"--out={out} cannot be written ({reason}); choose another"
    assert error in capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_not_overwritten_nor_changed_when_it_goes_on(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("")
    assert train("--config", config_file, "--timesteps", 10, "--out", out) == 2
    assert "holds a run; go on with it" in capsys.readouterr().err
    from batchpilot.agents.training.run_config import make_run_config

    config = make_run_config({"timesteps": 10}, str(config_file), {})
    (out / "config.yaml").write_text(config.to_text())
    assert train("--resume", out, "--seed", 4) == 2
    assert "--seed cannot change when a run goes on" in capsys.readouterr().err
    for words in (("--action-design", "grid"), ("--config", "demo"), ("--tune",)):
        assert train("--resume", out, *words) == 2
        error = f"{words[0]} cannot be given when a run goes on"
        assert error in capsys.readouterr().err
    assert train("--resume", out, "--timesteps", "few") == 2
    assert "timesteps='few' is not a whole number" in capsys.readouterr().err
    (out / "checkpoints" / "step-0000000010").mkdir(parents=True)
    assert train("--resume", out, "--timesteps", 8) == 2
    assert "--timesteps 8 is less than the 10 steps that" in capsys.readouterr().err
    assert yaml.safe_load((out / "config.yaml").read_text())["timesteps"] == 10


def test_a_signal_to_the_whole_group_saves_too(tmp_path: Path, config_file: Path):
    out = tmp_path / "run"
    words = ("--config", config_file, "--timesteps", 10**6, "--n-envs", 2, "--out", out)
    with subprocess.Popen(
        [sys.executable, "-m", "batchpilot", "train", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert until((out / "episodes.csv").exists, 600)
            os.killpg(process.pid, signal.SIGTERM)
            _, errors = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "saves and stops at the end of this rollout" in errors
    (checkpoint,) = (out / "checkpoints").iterdir()
    steps = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped at {steps} steps; go on: batchpilot train --resume {out}" in errors
