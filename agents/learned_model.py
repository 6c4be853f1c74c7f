"""Runs a trained policy's network: the one place that knows onnxruntime."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from batchpilot.agents.artefact import Artefact
from batchpilot.agents.manifest import ArtefactError
from batchpilot.agents.parameters import ConfigError

Floats32 = npt.NDArray[np.float32]
logger = logging.getLogger("vllm.batchpilot")

#: Seeds the observations of `check_outputs`.
_PROBE_SEED = 20250305
_PROBES = 32
#: All networks of a process together get no more memory than this.
MOST_MEMORY_BYTES = 64 * 2**20
#: The trial of a network on the fixed observations must be over after so long.
MOST_TRIAL_SECONDS = 5.0


class ModelError(RuntimeError):
    """The network gave nothing that can be used."""


class PolicyModel(Protocol):
    """Gives an output for an observation."""

    def run(self, observation: Floats32) -> Floats32:
        """One decision.

        Args:
            observation: Shape (history * 26,).

        Returns:
            Shape (outputs,), finite.

        Raises:
            ModelError: It could not.
        """

    def clear(self) -> None:
        """Forgets what it carries from one decision to the next."""


class OnnxModel:
    """A policy's network on onnxruntime: one thread, bounded memory, no file but the bytes.

    Args:
        artefact: Checked already.

    Raises:
        ArtefactError: onnxruntime refuses the network, it needs too much memory or time, or its
            outputs are not finite on a fixed set of observations.
        ConfigError: onnxruntime is not installed.
    """

    def __init__(self, artefact: Artefact) -> None:
        """Loads the network and tries it."""
        self._session = _open_session(artefact)
        self._normalisation = artefact.manifest.normalisation
        self._history = artefact.manifest.history
        self._outputs = artefact.manifest.action.output_size
        self._state = np.zeros((1, artefact.manifest.state_size), dtype=np.float32)
        self._names = ["action", "next_state"] if self._state.size else ["action"]
        self._prepare()
        with _deadline(MOST_TRIAL_SECONDS) as self._run_options:
            check_outputs(self, artefact)
        self._run_options = None

    def run(self, observation: Floats32) -> Floats32:
        """One decision; see `PolicyModel`.

        Raises:
            ModelError: onnxruntime failed, or the output is not finite.
        """
        feed = {"observation": self._normalised(observation)[np.newaxis]}
        if self._state.size:
            feed["state"] = self._state
        try:
            outputs = self._session.run(self._names, feed, self._run_options)
        except Exception as error:  # onnxruntime's own exceptions share no base
            self.clear()
            raise ModelError(f"onnxruntime: {error}") from error
        output: Floats32 = outputs[0].reshape(-1)
        if output.size != self._outputs or not all(np.isfinite(part).all() for part in outputs):
            self.clear()
            raise ModelError("the network's output is not finite")
        if self._state.size:
            self._state = outputs[1]
        return output

    def twin(self) -> OnnxModel:
        """Another on the same network, with a memory of its own."""
        twin = copy.copy(self)
        twin.clear()
        return twin

    def clear(self) -> None:
        """Forgets its state, as at the start of an episode."""
        self._state = np.zeros_like(self._state)

    def _prepare(self) -> None:
        norm = self._normalisation
        if norm is not None:
            self._mean = np.tile(np.array(norm.mean, dtype=np.float32), self._history)
            self._std = np.tile(np.array(norm.std, dtype=np.float32), self._history)

    def _normalised(self, observation: Floats32) -> Floats32:
        norm = self._normalisation
        if norm is None:
            return observation
        scaled = (observation - self._mean) / self._std
        return np.clip(scaled, -norm.clip, norm.clip)


def probe_observations(size: int) -> Floats32:
    """A fixed set of observations, the corners of their space among them.

    Returns:
        Shape (probes, size), each value in [-1, 1].
    """
    rng = np.random.default_rng(_PROBE_SEED)
    inside = rng.uniform(-1.0, 1.0, (_PROBES, size))
    corners = rng.choice([-1.0, 1.0], (_PROBES, size))
    edges = np.stack([np.full(size, value) for value in (-1.0, 0.0, 1.0)])
    probes: Floats32 = np.concatenate([edges, inside, corners]).astype(np.float32)
    return probes


def check_outputs(model: PolicyModel, artefact: Artefact) -> None:
    """Tries a network on the fixed observations.

    Raises:
        ArtefactError: An output that is not finite.
    """
    for observation in probe_observations(artefact.manifest.observation_size):
        try:
            model.run(observation)
        except ModelError as error:
            raise ArtefactError(
                f"policy {artefact.label}: tried on fixed inputs: {error}"
            ) from None
    model.clear()


def _open_session(artefact: Artefact) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "a learned policy needs onnxruntime, which is not installed; "
            "try: pip install 'onnxruntime>=1.20'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    _bound_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # A thread that spins between decisions would take a core from the engine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            artefact.onnx, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions share no base
        raise ArtefactError(f"policy {artefact.label}: onnxruntime refuses it: {error}") from None


@lru_cache(maxsize=1)
def _bound_memory() -> None:
    """Gives all sessions of this process one arena that cannot grow beyond `MOST_MEMORY_BYTES`.

    A network of a few bytes can ask for gigabytes, by spreading two vectors to a matrix. It fails
    instead, and is refused when it is tried.
    """
    import onnxruntime

    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    exactly_as_requested = 1
    bounds = {"max_mem": MOST_MEMORY_BYTES, "arena_extend_strategy": exactly_as_requested}
    try:
        onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(bounds))
    except Exception as error:  # onnxruntime's own exceptions share no base
        # Somebody else in this process has registered one, which then serves for all.
        logger.warning("the memory of trained policies is not bounded here: %s", error)


@contextmanager
def _deadline(seconds: float) -> Iterator[Any]:
    """Options for runs that end with an error once the time is up, at their next operator."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    timer = threading.Timer(seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()
