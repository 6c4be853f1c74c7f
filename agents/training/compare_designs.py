"""Trains every action design at the same small scale, and compares what came of them.

    python -m batchpilot.agents.training.compare_designs --out results/designs
        [--config full] [--steps 20000] [--variants residual:absolute:...]

A variant that is finished is not trained again, and one that was interrupted goes on. The table, on
held-out seeds that chose no model, is printed and written to `designs.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.cli import EXIT_INTERRUPTED, PLAIN_WIDTH, TEST_SEED, finish
from batchpilot.agents.training.progress import show_progress
from batchpilot.agents.training.run_config import RunConfig, make_run_config
from batchpilot.agents.training.run_folder import RunFolder
from batchpilot.agents.training.trainer import train

#: Name: algorithm, and settings of the environment.
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "residual": ("ppo", {"action_design": "residual"}),
    "residual, history 4": ("ppo", {"action_design": "residual", "history": 4}),
    "absolute": ("ppo", {"action_design": "absolute"}),
    "absolute, history 4": ("ppo", {"action_design": "absolute", "history": 4}),
    "grid": ("qrdqn", {"action_design": "grid"}),
    "grid, history 4": ("qrdqn", {"action_design": "grid", "history": 4}),
    "residual, LSTM": ("recurrent_ppo", {"action_design": "residual"}),
    "residual, SAC": ("sac", {"action_design": "residual"}),
}
_FIGURES = ("pooled_attainment", "slo_attainment", "goodput_per_s", "reward", "shielded_share")


class StoppedError(RuntimeError):
    """A training was asked to stop; it has saved."""


def train_variant(folder: Path, config: RunConfig) -> dict[str, dict[str, float]]:
    """Trains in a folder, unless that is done already.

    Args:
        folder: Of the run.
        config: Of the run.

    Returns:
        Figures by policy; the agent's own under `agent`.

    Raises:
        StoppedError: Ctrl-C; the next call goes on.
    """
    done = folder / "evaluation.json"
    if not done.exists():
        run = RunFolder(folder)
        resume = (folder / "config.yaml").exists()
        if not resume:
            run.create(config)
        resume = resume and any(run.checkpoints.glob("step-*"))
        with show_progress(Console(stderr=True), config.run.timesteps) as progress:
            result = train(config, run, progress, resume=resume)
        if not result.finished:
            raise StoppedError(
                f"stopped at {result.steps} steps of {folder}; run it again to go on"
            )
        finish(config, run, result)
    figures: dict[str, dict[str, float]] = json.loads(done.read_text())["figures"]
    return figures


def compare_designs(
    out: Path, base: Mapping[str, Any], config: str, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Trains the variants, and prints the table after each.

    Args:
        out: Folder of all runs.
        base: Plain settings of each run.
        config: Its file or bundled family.
        names: Of the variants.

    Returns:
        Figures by variant and baseline.
    """
    figures: dict[str, dict[str, float]] = {}
    variants = []
    for name in names:
        algo, settings = VARIANTS[name]
        variants.append(make_run_config({**base, "algo": algo}, config, settings))
    out.mkdir(parents=True, exist_ok=True)
    for number, (name, variant) in enumerate(zip(names, variants, strict=True)):
        if number:  # the baselines are the same everywhere
            variant = replace(variant, baselines=())
        folder = out / name.replace(", ", "-").replace(" ", "").lower()
        found = train_variant(folder, variant)
        figures |= {label: values for label, values in found.items() if label != "agent"}
        figures[name] = found["agent"]
        (out / "designs.json").write_text(json.dumps(figures, indent=2) + "\n")
        print_table(figures)
    return figures


def print_table(figures: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the figures by variant and baseline."""
    table = Table(title=f"held-out episodes from seed {TEST_SEED}", title_justify="left")
    for heading in ("design", *(name.replace("_", " ") for name in _FIGURES)):
        table.add_column(heading, justify="left" if heading == "design" else "right")
    for name, values in figures.items():
        table.add_row(name, *(f"{values[figure]:.3f}" for figure in _FIGURES))
    Console(width=PLAIN_WIDTH).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares those that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m batchpilot.agents.training.compare_designs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--config", default="full", help="file or bundled family (default: full)")
    parser.add_argument("--steps", type=int, default=20_000, help="of each variant")
    parser.add_argument("--episodes", type=int, default=40, help="of each comparison")
    known = "; ".join(VARIANTS)
    parser.add_argument(
        "--variants",
        default=":".join(VARIANTS),
        metavar="NAME:NAME:...",
        help=f"which, all if left out: {known}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--n-envs", type=int, default=2, help="environments side by side")
    args = parser.parse_args(argv)
    names = args.variants.split(":")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variant {unknown[0]!r}; known: {known}")
    base = {
        "timesteps": args.steps,
        "seed": args.seed,
        "n_envs": args.n_envs,
        "eval_every": max(1, args.steps // 2),
        "test_episodes": args.episodes,
    }
    try:
        compare_designs(args.out, base, args.config, names)
    except ConfigError as error:
        print(f"compare_designs: {error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        print(f"compare_designs: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
