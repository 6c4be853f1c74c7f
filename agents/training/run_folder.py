"""A run's folder: everything needed to understand it, go on with it and use what came of it.

config.yaml          the whole configuration
command.txt          the command lines that started it and went on with it
environment.json     versions, hardware, git commit
search/, search.json episodes of a search over steady actions, and what it found
checkpoints/step-N/  the newest three, for --resume
best/, last/         model.zip, the figures of its evaluation; best by SLO attainment
episodes.csv         every training episode
evaluations.csv      every evaluation on held-out seeds
evaluation.json      the last one, beside the baselines'
curves.png           both over time
tensorboard/         for `tensorboard --logdir`
policy/              the ONNX policy and its manifest
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import batchpilot
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.run_config import RunConfig, read_run_config
from batchpilot.env.bench.environment import read_environment

KEPT_CHECKPOINTS = 3
EPISODES = ("step", "environment", "reward", "intervals", "slo_attainment", "shielded_share")
EVALUATIONS = ("step", "reward", "slo_attainment", "goodput_per_s", "shielded_share")
_LIBRARIES = ("stable-baselines3", "sb3-contrib", "gymnasium", "numpy", "torch", "ray", "onnx")


class RunFolder:
    """Reads and writes the folder of a run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        """Names it; nothing is made."""
        self.path = path
        self.checkpoints = path / "checkpoints"

    def create(self, config: RunConfig) -> None:
        """Makes it, and writes down what is known before the first step.

        Raises:
            ConfigError: It is there already and holds a run, or cannot be written.
        """
        try:
            self._create(config)
        except OSError as error:
            raise ConfigError(
                f"--out={self.path} cannot be written ({error.strerror}); choose another"
            ) from None

    def _create(self, config: RunConfig) -> None:
        if (self.path / "config.yaml").exists():
            raise ConfigError(f"{self.path} holds a run; go on with it (--resume {self.path}), or "
                              "choose another --out")  # fmt: skip
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.write_config(config)
        environment = read_environment() | {name: version(name) for name in _LIBRARIES}
        self.write_json("environment.json", {**environment, "git_commit": git_commit()})

    def write_config(self, config: RunConfig) -> None:
        """Writes the configuration."""
        (self.path / "config.yaml").write_text(config.to_text(), encoding="utf-8")

    def read_config(self) -> RunConfig:
        """The configuration it was made with.

        Raises:
            ConfigError: There is none, or it cannot be used.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"{self.path} is no run's folder: there is no config.yaml in it")
        return read_run_config(file)

    def note_command(self) -> None:
        """Adds the command line of this process."""
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        with open(self.path / "command.txt", "a", encoding="utf-8") as file:
            file.write(shlex.join(words) + "\n")

    def write_json(self, name: str, values: Any) -> None:
        """Writes a file of JSON."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.checkpoints / f"step-{step:010d}"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        return any(self.checkpoints.glob("step-*"))

    @property
    def steps(self) -> int:
        """Environment steps behind its newest checkpoint; 0 without one."""
        return (
            int(self.newest_checkpoint().name.removeprefix("step-")) if self.has_checkpoint else 0
        )

    def newest_checkpoint(self) -> Path:
        """The newest whole checkpoint.

        Raises:
            ConfigError: There is none.
        """
        found = sorted(self.checkpoints.glob("step-*"))
        if not found:
            raise ConfigError(f"{self.path} has no checkpoint to go on from")
        return found[-1]

    def prune_checkpoints(self) -> None:
        """Removes all but the newest few."""
        for old in sorted(self.checkpoints.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def best_attainment(self) -> float | None:
        """SLO attainment of the best model so far; None before the first."""
        figures = self._best_figures()
        return None if figures is None else float(figures["slo_attainment"])

    def best_step(self) -> int | None:
        """Steps that the best model so far had behind it; None before the first."""
        figures = self._best_figures()
        return None if figures is None else int(figures["step"])

    def _best_figures(self) -> dict[str, Any] | None:
        path = self.path / "best" / "figures.json"
        if not path.exists():
            return None
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def fresh_policy(self) -> Path:
        """Where the exported policy goes; an older one is removed."""
        path = self.path / "policy"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def add_rows(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Adds lines to a table, and the heading to an empty one."""
        path = self.path / name
        fresh = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([header, *rows] if fresh else rows)

    def read_rows(self, name: str) -> list[dict[str, float]]:
        """A table's lines as numbers; none where there is no table."""
        path = self.path / name
        if not path.exists():
            return []
        with open(path, newline="", encoding="utf-8") as file:
            return [{key: float(text) for key, text in row.items()} for row in csv.DictReader(file)]

    def forget_rows_after(self, name: str, step: int) -> None:
        """Removes what an interrupted run wrote after the checkpoint it goes on from."""
        path = self.path / name
        if not path.exists():
            return
        heading, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if int(row.partition(",")[0]) <= step]
        path.write_text("".join([heading, *kept]), encoding="utf-8")


def git_commit() -> str:
    """The commit of batchpilot's sources; empty where they are no repository."""
    folder = Path(os.path.realpath(batchpilot.__file__)).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as they go into a table."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}
