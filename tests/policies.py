"""Makes small trained policies, sound and poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from batchpilot.agents.actions import ActionDesign
from batchpilot.agents.artefact import Artefact, make_artefact, sha256_hex, write_artefact
from batchpilot.agents.features import FEATURE_NAMES, LatencyTargets
from batchpilot.agents.manifest import Manifest

FEATURES = len(FEATURE_NAMES)


def network(
    nodes: Sequence[Any],
    weights: dict[str, Any],
    *,
    inputs: dict[str, Sequence[Any]] | None = None,
    outputs: dict[str, Sequence[Any]] | None = None,
) -> bytes:
    """An ONNX model of these nodes and float32 weights."""
    inputs = inputs or {"observation": (1, FEATURES)}
    outputs = outputs or {"action": (1, 2)}
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def linear(weights: Any, bias: Any, rows: Any = 1) -> bytes:
    """action = observation @ weights + bias."""
    node = helper.make_node("Gemm", ["observation", "w", "b"], ["action"])
    weights = np.asarray(weights)
    return network(
        [node],
        {"w": weights, "b": bias},
        inputs={"observation": (rows, weights.shape[0])},
        outputs={"action": (rows, weights.shape[1])},
    )


def constant(*output: float, history: int = 1) -> bytes:
    """The same action whatever is seen."""
    return linear(np.zeros((FEATURES * history, len(output))), output)


def following(feature: str, factor: float = 1.0) -> bytes:
    """The first action is a feature times a factor, the second 0."""
    weights = np.zeros((FEATURES, 2))
    weights[FEATURE_NAMES.index(feature), 0] = factor
    return linear(weights, (0.0, 0.0))


def manifest(onnx: bytes, **changes: Any) -> Manifest:
    """A manifest for a network."""
    values: dict[str, Any] = {
        "name": "test",
        "version": "1",
        "algorithm": "ppo",
        "action": ActionDesign(),
        "base_policy": "memory-peak",
        "decision_interval_s": 1.0,
        "targets": LatencyTargets(itl_slo_ms=50.0, ttft_slo_ms=2000.0),
        "onnx_sha256": sha256_hex(onnx),
        "created_at": "2026-01-31T12:00:00Z",
    }
    return Manifest(**{**values, **changes})


def policy(onnx: bytes | None = None, **changes: Any) -> Artefact:
    """A checked policy; without a network, the one whose action is 0."""
    onnx = constant(0.0, 0.0) if onnx is None else onnx
    return make_artefact(manifest(onnx, **changes), onnx)


def write(folder: Path, onnx: bytes | None = None, **changes: Any) -> Artefact:
    """A policy on disk."""
    made = policy(onnx, **changes)
    return write_artefact(folder, made.manifest, made.onnx)
