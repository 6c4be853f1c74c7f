"""Offline warm start: the agent imitates logged decisions before it acts itself.

The experience log has a row for each report of an engine, and the decision that answered it. Here
the rows of a decision interval become an observation, of a window as long as the agent's own, and
the action that asks for the last one's limits; the policy's mean action is fitted to those by least
squares. `residual` actions are relative to what the engine's own policy would have applied; rows
without it are left out.

Limitations: it imitates, good decisions and bad ones alike, and the value network learns nothing.
The log does not say how many tokens a decode takes: it is taken for one, also beside a draft model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from batchpilot.agents.actions import ActionDesign, ActionScale
from batchpilot.agents.experience import facts_of, targets_of, window_of
from batchpilot.agents.features import observation
from batchpilot.agents.history import ObservationHistory
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.telemetry import TelemetryWindow
from batchpilot.agents.training.export import env_parameters
from batchpilot.agents.training.progress import Progress
from batchpilot.agents.training.run_config import RunConfig

GRADIENT_STEPS = 2_000
BATCH = 256
LEARNING_RATE = 1e-3
#: A share of an interval that is one: reports come a little sooner or later.
_NEARLY = 0.95
Floats = npt.NDArray[np.float32]


class Demonstrations(NamedTuple):
    """What was seen, and what was done.

    Attributes:
        observations: Shape (n, features * history).
        actions: Shape (n, 2), each in [-1, 1].
    """

    observations: Floats
    actions: Floats


def read_demonstrations(
    path: Path, design: ActionDesign, history: int, interval_s: float
) -> Demonstrations:
    """Reads an experience log.

    Args:
        path: A Parquet file, or a folder of them.
        design: What actions mean; not `grid`.
        history: Observations an agent sees at once.
        interval_s: Engine seconds that an observation is of, at least.

    Raises:
        ConfigError: It cannot be read, has other columns, or holds no decision that can be used.
    """
    if design.design == "grid":
        raise ConfigError("a warm start needs action_design residual or absolute, not grid")
    seen: list[Floats] = []
    done: list[tuple[float, float]] = []
    for session in _sessions(path):
        kept = ObservationHistory(history)
        for window, row in _intervals(session, interval_s):
            stacked = kept.push(observation(window, facts_of(row), targets_of(row)))
            action = _action(row, design)
            if action is not None:
                seen.append(stacked)
                done.append(action)
    if not done:
        raise ConfigError(f"{path} holds no decision that could be imitated")
    return Demonstrations(np.stack(seen), np.array(done, np.float32))


def _intervals(
    session: Iterable[Mapping[str, Any]], interval_s: float
) -> Iterator[tuple[TelemetryWindow, Mapping[str, Any]]]:
    """Windows of at least an interval, each with its last row; one begun at the end is left out."""
    joined: TelemetryWindow | None = None
    for row in session:
        window = window_of(row)
        joined = window if joined is None else joined + window
        if joined.seconds >= interval_s * _NEARLY:
            yield joined, row
            joined = None


def warm_start_model(
    model: BaseAlgorithm, path: Path, config: RunConfig, progress: Progress
) -> float:
    """Fits the model's mean action to the log's decisions.

    Returns:
        The mean squared error of actions afterwards.

    Raises:
        ConfigError: As `read_demonstrations`, or an algorithm without a mean action to fit.
    """
    settings = env_parameters(config)
    shown = read_demonstrations(
        path, settings.actions, settings.history, settings.decision_interval_s
    )
    error = fit_mean_action(model, shown, seed=config.run.seed)
    text = f"imitated {len(shown.actions)} logged decisions, mean squared error {error:.2g}"
    progress(0, text)
    return error


def fit_mean_action(model: BaseAlgorithm, shown: Demonstrations, *, seed: int) -> float:
    """Least squares on the policy's mean action.

    Returns:
        The mean squared error afterwards.

    Raises:
        ConfigError: The algorithm is neither PPO, SAC nor TQC.
    """
    seen, wanted = torch.from_numpy(shown.observations), torch.from_numpy(shown.actions)
    networks = _mean_networks(model)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE)
    order = np.random.default_rng(seed)
    for _ in range(GRADIENT_STEPS):
        chosen = torch.from_numpy(order.integers(len(wanted), size=BATCH))
        loss = ((networks(seen[chosen]) - wanted[chosen]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(((networks(seen) - wanted) ** 2).mean())


def _mean_networks(model: BaseAlgorithm) -> torch.nn.Module:
    policy: Any = model.policy
    kind = type(model).__name__
    if kind == "PPO":
        return torch.nn.Sequential(policy.mlp_extractor.policy_net, policy.action_net)
    if kind in ("SAC", "TQC"):
        return torch.nn.Sequential(policy.actor.latent_pi, policy.actor.mu, torch.nn.Tanh())
    raise ConfigError(f"a warm start needs ppo, sac or tqc, not {kind}")


def check_experience(path: Path) -> None:
    """Checks that there is a log.

    Raises:
        ConfigError: There is none.
    """
    if not path.exists():
        raise ConfigError(f"no experience log at {path}")


def _sessions(path: Path) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Each session's rows in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_experience(path)
    try:
        table = pq.read_table(path).sort_by([("session", "ascending"), ("sequence", "ascending")])
        rows = table.to_pylist()
    except (KeyError, OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read experience log {path}: {error}") from error
    session: list[Mapping[str, Any]] = []
    for row in rows:
        if session and row["session"] != session[-1]["session"]:
            yield session
            session = []
        session.append(row)
    if session:
        yield session


def _action(row: Mapping[str, Any], design: ActionDesign) -> tuple[float, float] | None:
    """The action that asks for the row's limits; None where it says too little."""
    facts = facts_of(row)
    limits = BatchLimits(row["limit_max_num_seqs"], row["limit_max_num_batched_tokens"])
    if design.design == "absolute":
        return ActionScale(design.lowest, facts.startup_limits).to_action(limits)
    if row["local_max_num_seqs"] is None or row["local_max_num_batched_tokens"] is None:
        return None
    base = BatchLimits(row["local_max_num_seqs"], row["local_max_num_batched_tokens"])
    decoded = row["window_running"] - row["window_prefill_seqs"]
    return design.residual.to_action(limits, base, decoded)
