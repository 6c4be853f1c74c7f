"""Turns a trained model into a policy: its deterministic action as ONNX, and a manifest."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from batchpilot.agents.artefact import Artefact, sha256_hex, utc_now, write_artefact
from batchpilot.agents.features import FEATURE_NAMES, LatencyTargets
from batchpilot.agents.learned_model import OnnxModel, probe_observations
from batchpilot.agents.manifest import Manifest
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training.run_config import RunConfig
from batchpilot.agents.training.run_folder import git_commit
from batchpilot.env.env_parameters import EnvParameters, VirtualEnvParameters
from batchpilot.env.live_batch_limits_env import LiveEnvParameters

OPSET = 18
#: Greatest difference between torch's actions and ONNX's.
PARITY = 1e-5


class ExportedPolicy(nn.Module):  # type: ignore[misc, unused-ignore]
    """The deterministic action of a model: what `predict(deterministic=True)` gives.

    Grid designs give one number an action, of which the greatest is meant. Nothing but the path
    from observation to action is in it: no value network, no noise.

    Args:
        model: PPO, SAC, TQC, DQN or QR-DQN; a recurrent one is `ExportedRecurrentPolicy`'s.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        """Takes over the networks, in evaluation mode."""
        super().__init__()
        policy: Any = model.policy
        self._kind = type(model).__name__
        if self._kind == "PPO":
            self._body, self._head = policy.mlp_extractor.policy_net, policy.action_net
        elif self._kind in ("SAC", "TQC"):
            self._body, self._head = policy.actor.latent_pi, policy.actor.mu
        elif self._kind == "DQN":
            self._body, self._head = nn.Identity(), policy.q_net.q_net
        elif self._kind == "QRDQN":
            self._body, self._head = nn.Identity(), policy.quantile_net.quantile_net
            self._quantiles = int(policy.quantile_net.n_quantiles)
        else:
            raise ConfigError(f"{self._kind} cannot be exported")
        self.eval()

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations (1, n) to actions (1, m)."""
        found: torch.Tensor = self._head(self._body(observation))
        if self._kind == "PPO":
            return torch.clamp(found, -1.0, 1.0)
        if self._kind in ("SAC", "TQC"):
            return torch.tanh(found)
        if self._kind == "QRDQN":
            return found.reshape(1, self._quantiles, -1).mean(dim=1)
        return found


class ExportedRecurrentPolicy(nn.Module):  # type: ignore[misc, unused-ignore]
    """RecurrentPPO's: its LSTM's state goes in and comes out as one row of numbers.

    The LSTM is written out for one step, gate by gate; torch orders gates input, forget, cell,
    output.

    Args:
        model: RecurrentPPO with one LSTM layer.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        """Takes over the networks."""
        super().__init__()
        policy: Any = model.policy
        lstm = policy.lstm_actor
        self.hidden = int(lstm.hidden_size)
        self._input = nn.Linear(lstm.input_size, 4 * self.hidden)
        self._recurrent = nn.Linear(self.hidden, 4 * self.hidden)
        with torch.no_grad():
            self._input.weight.copy_(lstm.weight_ih_l0)
            self._input.bias.copy_(lstm.bias_ih_l0)
            self._recurrent.weight.copy_(lstm.weight_hh_l0)
            self._recurrent.bias.copy_(lstm.bias_hh_l0)
        self._body, self._head = policy.mlp_extractor.policy_net, policy.action_net
        self.eval()

    def forward(
        self, observation: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Observations (1, n) and state (1, 2 h) to actions (1, 2) and the next state."""
        hidden, cell = state[:, : self.hidden], state[:, self.hidden :]
        gates = self._input(observation) + self._recurrent(hidden)
        size = self.hidden
        take = torch.sigmoid(gates[:, :size])
        forget = torch.sigmoid(gates[:, size : 2 * size])
        new = torch.tanh(gates[:, 2 * size : 3 * size])
        give = torch.sigmoid(gates[:, 3 * size :])
        cell = forget * cell + take * new
        hidden = give * torch.tanh(cell)
        action = torch.clamp(self._head(self._body(hidden)), -1.0, 1.0)
        return action, torch.cat([hidden, cell], dim=1)


def export_policy(
    model: BaseAlgorithm,
    config: RunConfig,
    folder: Path,
    *,
    name: str,
    version: str,
    steps: int,
    evaluation: dict[str, Any] | None = None,
) -> Artefact:
    """Writes the policy's folder, after its actions have been compared with the model's.

    Args:
        model: Trained.
        config: Of its run.
        folder: Must not exist.
        name: Of the policy.
        version: Of this artefact of it.
        steps: Environment steps it was trained for.
        evaluation: Figures for the manifest.

    Raises:
        ConfigError: The folder exists, the model is of a kind that cannot be exported, or ONNX's
            actions differ from torch's by more than `PARITY`.
    """
    recurrent = type(model).__name__ == "RecurrentPPO"
    exported = ExportedRecurrentPolicy(model) if recurrent else ExportedPolicy(model)
    settings = env_parameters(config)
    onnx = onnx_bytes(exported, len(FEATURE_NAMES) * settings.history)
    text = config.to_text()
    manifest = Manifest(
        name=name,
        version=version,
        algorithm=config.run.algo,
        action=settings.actions,
        base_policy="memory+sla" if settings.action_design == "absolute" else settings.base_policy,
        decision_interval_s=settings.decision_interval_s,
        targets=_targets(config, settings),
        onnx_sha256=sha256_hex(onnx),
        created_at=utc_now(),
        git_commit=git_commit(),
        config_sha256=sha256_hex(text.encode()),
        training={"steps": steps, "seed": config.run.seed, "environment": config.recipe.kind},
        evaluation=evaluation or {},
        history=settings.history,
        state_size=2 * exported.hidden if isinstance(exported, ExportedRecurrentPolicy) else 0,
    )
    artefact = write_artefact(folder, manifest, onnx)
    difference = greatest_difference(exported, artefact)
    if difference > PARITY:
        raise ConfigError(f"{folder}: ONNX's actions differ from torch's by {difference:g}")
    return artefact


def env_parameters(config: RunConfig) -> EnvParameters:
    """The environment's settings, those left out at their defaults."""
    kind = LiveEnvParameters if config.recipe.kind == "live" else VirtualEnvParameters
    settings = {k: v for k, v in config.recipe.settings.items() if k != "scenarios"}
    return cast(EnvParameters, kind.from_mapping(settings, where="settings"))


def _targets(config: RunConfig, settings: EnvParameters) -> LatencyTargets:
    """The targets it was trained for; none where each episode drew its own.

    They stand in for those that an operator leaves out, in the base policy too.
    """
    if config.recipe.kind == "random":
        return LatencyTargets()
    return LatencyTargets(settings.itl_slo_ms, settings.ttft_slo_ms)


def onnx_bytes(exported: nn.Module, observation_size: int) -> bytes:
    """The module as an ONNX file."""
    arguments = [torch.zeros(1, observation_size)]
    inputs, outputs = ["observation"], ["action"]
    if isinstance(exported, ExportedRecurrentPolicy):
        arguments.append(torch.zeros(1, 2 * exported.hidden))
        inputs, outputs = [*inputs, "state"], [*outputs, "next_state"]
    buffer = io.BytesIO()
    with _quiet():
        program = torch.onnx.export(
            exported,
            tuple(arguments),
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        program.save(buffer)
    return buffer.getvalue()


def greatest_difference(exported: nn.Module, artefact: Artefact) -> float:
    """How far ONNX's outputs are from torch's, over a fixed series of observations."""
    onnx = OnnxModel(artefact)
    state = torch.zeros(1, artefact.manifest.state_size)
    greatest = 0.0
    for observation in probe_observations(artefact.manifest.observation_size):
        with torch.no_grad():
            seen = torch.from_numpy(observation)[None]
            if isinstance(exported, ExportedRecurrentPolicy):
                found, state = exported(seen, state)
            else:
                found = exported(seen)
        difference = np.abs(found.numpy().reshape(-1) - onnx.run(observation))
        greatest = max(greatest, float(difference.max()))
    return greatest


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what the exporter says of itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
