"""A run's learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from batchpilot.agents.training.run_folder import RunFolder

_EPISODES_IN_MEAN = 20


def plot_curves(folder: RunFolder, compared: Mapping[str, float], path: Path) -> None:
    """Draws attainment and reward over steps, and beside them what was compared at the end.

    The two are of different episodes, so that no bar may be read off a curve's axis.

    Args:
        folder: Of the run.
        compared: SLO attainment in the last comparison, by who decided.
        path: The picture; its suffix decides the format.
    """
    episodes, evaluations = folder.read_rows("episodes.csv"), folder.read_rows("evaluations.csv")
    figure = Figure(figsize=(13, 4), layout="constrained")
    attainment, reward, comparison = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    for axes, name in ((attainment, "slo_attainment"), (reward, "reward")):
        _mean_line(axes, episodes, name)
        steps = [row["step"] for row in evaluations]
        axes.plot(steps, [row[name] for row in evaluations], "o-", label="held-out seeds")
        axes.set_xlabel("environment steps")
        axes.set_title(name.replace("_", " "), loc="left")
        axes.grid(alpha=0.3)
    bars = comparison.barh(list(compared), list(compared.values()), color="C2")
    comparison.bar_label(bars, fmt="{:.3f}", padding=3)
    comparison.margins(x=0.25)
    comparison.invert_yaxis()
    comparison.set_title("the same on other seeds", loc="left")
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
