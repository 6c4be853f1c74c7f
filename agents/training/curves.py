"""A run's learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from batchpilot.agents.training.run_folder import RunFolder

_EPISODES_IN_MEAN = 20


def plot_curves(folder: RunFolder, baselines: Mapping[str, float], path: Path) -> None:
    """Draws attainment and reward over steps.

    Args:
        folder: Of the run.
        baselines: SLO attainment on the evaluation's seeds, by policy.
        path: The picture; its suffix decides the format.
    """
    episodes, evaluations = folder.read_rows("episodes.csv"), folder.read_rows("evaluations.csv")
    figure = Figure(figsize=(10, 4), layout="constrained")
    attainment, reward = figure.subplots(1, 2)
    for axes, name in ((attainment, "slo_attainment"), (reward, "reward")):
        _mean_line(axes, episodes, name)
        steps = [row["step"] for row in evaluations]
        axes.plot(steps, [row[name] for row in evaluations], "o-", label="held-out seeds")
        axes.set_xlabel("environment steps")
        axes.set_title(name.replace("_", " "), loc="left")
        axes.grid(alpha=0.3)
    for index, (label, value) in enumerate(baselines.items()):
        attainment.axhline(value, linestyle="--", linewidth=1, color=f"C{index + 2}", label=label)
    attainment.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _mean_line(axes: Any, episodes: list[dict[str, float]], name: str) -> None:
    """The running mean of training episodes, once there are enough."""
    if len(episodes) < 2:
        return
    count = min(_EPISODES_IN_MEAN, len(episodes))
    values = np.array([row[name] for row in episodes])
    means = np.convolve(values, np.full(count, 1 / count), mode="valid")
    steps = [row["step"] for row in episodes][count - 1 :]
    axes.plot(steps, means, alpha=0.6, label=f"training, mean of {count} episodes")
