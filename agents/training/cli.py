"""Train an agent that steers both batch limits, and export it as an ONNX policy.

An agent sees a second of telemetry, and shifts the limits that a base policy decides: doing nothing
is the base policy. It trains on vLLM's own scheduler on virtual GPUs, with another GPU, load and
latency targets in each episode (`--env random`), on one of them (`virtual`), or on a real vLLM in
this process (`live`). Everything that comes of it lies in one folder: configuration, checkpoints,
curves, evaluation on held-out seeds beside the baselines, and the policy.

Ctrl-C saves at the end of the running rollout and stops; `--resume FOLDER` goes on exactly there. A
second Ctrl-C stops at once, and the newest checkpoint stands.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.curves import plot_curves
from batchpilot.agents.training.evaluation import EVALUATION_SEED, Evaluation
from batchpilot.agents.training.export import export_policy
from batchpilot.agents.training.progress import show_progress
from batchpilot.agents.training.recipes import ENV_IDS, build_vector
from batchpilot.agents.training.run_config import (
    RunConfig,
    RunSettings,
    family_names,
    make_run_config,
)
from batchpilot.agents.training.run_folder import RunFolder
from batchpilot.agents.training.trainer import TrainingResult, compare, load_trained, train
from batchpilot.agents.training.tune import TuneSettings, tune
from batchpilot.agents.training.warm_start import check_experience
from batchpilot.env.bench.settings import option

EXIT_INTERRUPTED = 130
PLAIN_WIDTH = 110
#: What a run that goes on may be given anew.
_MAY_CHANGE = ("timesteps", "workers", "test_episodes", "name", "export")
#: What only a run that begins may be given.
_OF_A_NEW_RUN = (
    *("out", "config", "env", "action_design", "base_policy", "history", "horizon_s", "tune"),
)
#: The seeds of the last comparison; those of evaluations during training chose the best model.
TEST_SEED = 2 * EVALUATION_SEED

EXAMPLES = f"""\
algorithms: ppo, recurrent_ppo, sac, tqc (residual or absolute actions), dqn, qrdqn (grid)
bundled files for --config: {", ".join(family_names())}

examples:
  batchpilot train --timesteps 200000 --out results/run
  batchpilot train --config demo --timesteps 8192 --out results/demo-agent
  batchpilot train --resume results/run --timesteps 400000
  batchpilot train --resume results/run --export last    # of a finished run: compares and exports
  batchpilot train --algo qrdqn --n-envs 4 --workers 2 --timesteps 100000 --out results/grid
  batchpilot train --config full --search-episodes 48 --timesteps 20000 --out results/searched
  batchpilot train --config demo --tune --tune-trials 8 --timesteps 4000 --out results/tuned
  batchpilot train --env live --warm-start experience/ --timesteps 2000 --out results/live

see it learn: tensorboard --logdir results/run
use it: batchpilot bench --engine virtual --profile llama-3.1-8b-rtx4090 --workload sharegpt \\
          --arrivals poisson:4 --itl-slo-ms 40 --policies predictive,learned:results/run/policy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option; values are checked by the classes that take them."""
    for item in fields(RunSettings):
        text = str(item.metadata["help"])
        if item.default is not MISSING:
            text += f" (default: {item.default})"
        parser.add_argument(option(item.name), metavar="X", help=text)
    parser.add_argument("--out", metavar="DIR", help="the run's folder; made here")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    parser.add_argument("--config", metavar="FILE", help="a YAML file, or a bundled one's name")
    parser.add_argument("--env", choices=tuple(ENV_IDS), help="what to train on")
    parser.add_argument("--action-design", metavar="X", help="residual, absolute or grid")
    parser.add_argument("--base-policy", metavar="X", help="what residual actions shift")
    parser.add_argument("--history", metavar="X", type=int, help="observations seen at once")
    parser.add_argument("--horizon-s", metavar="X", type=float, help="engine time of an episode")
    parser.add_argument("--warm-start", metavar="PATH", help="experience log to imitate first")
    parser.add_argument("--tune", action="store_true", help="search hyperparameters first")
    for item in fields(TuneSettings):
        text = f"{item.metadata['help']} (default: {item.default})"
        parser.add_argument(option(f"tune_{item.name}"), metavar="X", help=text)
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    """Trains, compares and exports; returns the exit status.

    Raises:
        ConfigError: A setting that cannot be used; nothing has been written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    console = Console(stderr=True)
    folder, config = _prepare(args)
    if args.tune:
        config = _tuned(args, folder, config, console)
    with show_progress(console, config.run.timesteps) as progress:
        experience = Path(args.warm_start) if args.warm_start else None
        result = train(config, folder, progress, resume=bool(args.resume), experience=experience)
    if not result.finished:
        print(f"stopped at {result.steps} steps; go on: batchpilot train --resume {folder.path}",
              file=sys.stderr)  # fmt: skip
        return EXIT_INTERRUPTED
    finish(config, folder, result)
    return 0


def finish(config: RunConfig, folder: RunFolder, result: TrainingResult) -> list[Evaluation]:
    """Compares the best model, or the last, with the baselines, plots, exports and prints.

    Returns:
        The agent's evaluation, then the baselines'.
    """
    model = folder.path / config.run.export / "model.zip"
    best = folder.best_step() if config.run.export == "best" else None
    steps = result.steps if best is None else best
    compared = compare(
        config,
        model,
        episodes=config.run.test_episodes,
        seed=TEST_SEED,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    figures = {item.label: item.figures() for item in compared}
    folder.write_json("evaluation.json", {"first_seed": TEST_SEED, "figures": figures})
    plot_curves(
        folder,
        {item.label: item.mean("slo_attainment") for item in compared},
        folder.path / "curves.png",
    )
    policy = folder.path / "policy"
    if config.recipe.kind != "live" or not policy.exists():
        _export(config, folder, steps, model, figures["agent"])
    print_comparison(compared, steps)
    print(f"policy: {policy}  curves: {folder.path / 'curves.png'}", file=sys.stderr)
    return compared


def print_comparison(compared: Sequence[Evaluation], steps: int) -> None:
    """Prints the table of the last comparison."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    count = len(compared[0].episodes)
    table = Table(title=f"{count} held-out episodes, agent after {steps:,} steps",
                  title_justify="left")  # fmt: skip
    columns = ("policy", "in target", "episode mean", "goodput/s", "reward", "tokens/s", "shielded")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for item in compared:
        table.add_row(
            item.label,
            f"{item.pooled_attainment:.1%}",
            f"{item.mean('slo_attainment'):.1%}",
            f"{item.mean('goodput_per_s'):.3f}",
            f"{item.mean('reward'):.2f}",
            f"{item.mean('tokens_per_s'):.0f}",
            f"{item.mean('shielded_share'):.1%}",
        )
    console.print(table)


def _prepare(args: argparse.Namespace) -> tuple[RunFolder, RunConfig]:
    """The run's folder and configuration, new or found."""
    if args.resume:
        return _resumed(args)
    if not args.out:
        raise ConfigError("--out DIR is required (or --resume DIR)")
    if args.warm_start:
        check_experience(Path(args.warm_start))
    given = {item.name: getattr(args, item.name) for item in fields(RunSettings)}
    names = ("env", "action_design", "base_policy", "history", "horizon_s")
    config = make_run_config(given, args.config, {name: getattr(args, name) for name in names})
    config.recipe.build().close()  # refuses bad settings before anything is written
    folder = RunFolder(Path(args.out))
    folder.create(config)
    folder.note_command()
    return folder, config


def _resumed(args: argparse.Namespace) -> tuple[RunFolder, RunConfig]:
    for name in _OF_A_NEW_RUN:
        if getattr(args, name):
            raise ConfigError(f"{option(name)} cannot be given when a run goes on")
    folder = RunFolder(Path(args.resume))
    config = folder.read_config()
    given = {item.name: getattr(args, item.name) for item in fields(RunSettings)}
    changed = {name: value for name, value in given.items() if value is not None}
    for name in changed:
        if name not in _MAY_CHANGE:
            raise ConfigError(f"{option(name)} cannot change when a run goes on")
    run = RunSettings.from_mapping({**asdict(config.run), **changed}, where="train")
    if run.timesteps < folder.steps:
        raise ConfigError(
            f"--timesteps {run.timesteps} is less than the {folder.steps} steps that {folder.path} "
            "has behind it: give more, or leave it out"
        )
    config = replace(config, run=run)
    folder.write_config(config)
    folder.note_command()
    return folder, config


def _tuned(
    args: argparse.Namespace, folder: RunFolder, config: RunConfig, console: Console
) -> RunConfig:
    names = {item.name: getattr(args, f"tune_{item.name}") for item in fields(TuneSettings)}
    settings = TuneSettings(**{key: value for key, value in names.items() if value is not None})
    with show_progress(console, settings.trials) as progress:
        config = tune(config, settings, folder, progress)
    folder.write_config(config)
    return config


def _export(
    config: RunConfig,
    folder: RunFolder,
    steps: int,
    path: Path,
    figures: dict[str, Any],
) -> None:
    vector = build_vector(config.recipe, 1)
    try:
        model = load_trained(config, path, vector)
        export_policy(
            model,
            config,
            folder.fresh_policy(),
            name=config.run.name,
            version=str(steps),
            steps=steps,
            evaluation=figures,
        )
    finally:
        vector.close()
