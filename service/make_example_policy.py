"""Writes a small trained-looking policy without training: `memory+sla`, as a network.

python -m batchpilot.service.make_example_policy FOLDER [--shift-seqs X] [--interval S]

The network is a residual one on the base policy `memory+sla` whose output is 0 whatever it sees, so
that its limits are `memory+sla`'s own, step by step and to the last sequence: proof that the path
from artefact to engine changes nothing. `--shift-seqs X` makes it say X instead of 0, an action in
[-1, 1], for a policy that differs. `memory+sla` itself cannot be a map from an observation to
limits: it searches, and remembers where it is.

Needs onnx, which is part of the `train` extra; nothing else does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from batchpilot.agents.actions import ActionDesign
from batchpilot.agents.artefact import Artefact, sha256_hex, utc_now, write_artefact
from batchpilot.agents.features import FEATURE_NAMES, LatencyTargets
from batchpilot.agents.manifest import Manifest
from batchpilot.agents.parameters import ConfigError

#: As wide and as deep as Stable-Baselines3 makes its networks.
HIDDEN = 64
#: ONNX's oldest operator set and file format that have all that is used here.
OPSET, IR_VERSION = 17, 8


def constant_network(output: tuple[float, ...], inputs: int = len(FEATURE_NAMES)) -> bytes:
    """An ONNX network with two hidden layers that says the same whatever it sees.

    Args:
        output: What it says.
        inputs: Numbers it takes in.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "first": rng.normal(0, 0.1, (inputs, HIDDEN)),
        "first_bias": np.zeros(HIDDEN),
        "second": rng.normal(0, 0.1, (HIDDEN, HIDDEN)),
        "second_bias": np.zeros(HIDDEN),
        "last": np.zeros((HIDDEN, len(output))),
        "last_bias": np.array(output),
    }
    nodes = [
        helper.make_node("Gemm", ["observation", "first", "first_bias"], ["first_sums"]),
        helper.make_node("Tanh", ["first_sums"], ["first_hidden"]),
        helper.make_node("Gemm", ["first_hidden", "second", "second_bias"], ["second_sums"]),
        helper.make_node("Tanh", ["second_sums"], ["second_hidden"]),
        helper.make_node("Gemm", ["second_hidden", "last", "last_bias"], ["action"]),
    ]
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, [1, len(output)])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    data: bytes = model.SerializeToString()
    return data


def write_example(
    folder: Path,
    *,
    name: str = "example",
    version: str = "1",
    shift_seqs: float = 0.0,
    interval_s: float = 1.0,
    targets: LatencyTargets | None = None,
) -> Artefact:
    """Writes the policy's folder.

    Raises:
        ConfigError: The folder exists, or a value does not fit.
    """
    onnx = constant_network((shift_seqs, 0.0))
    manifest = Manifest(
        name=name,
        version=version,
        algorithm="none",
        action=ActionDesign(),
        base_policy="memory+sla",
        decision_interval_s=interval_s,
        targets=targets or LatencyTargets(itl_slo_ms=50.0, ttft_slo_ms=2000.0),
        onnx_sha256=sha256_hex(onnx),
        created_at=utc_now(),
        training={"made_by": "batchpilot.service.make_example_policy", "shift_seqs": shift_seqs},
    )
    return write_artefact(folder, manifest, onnx)


def main() -> int:
    """Reads the command line and writes the policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where it goes; must not exist")
    parser.add_argument("--name", default="example")
    parser.add_argument("--version", default="1")
    parser.add_argument("--shift-seqs", type=float, default=0.0, help="action, -1 to 1")
    parser.add_argument("--interval", type=float, default=1.0, help="decision interval, seconds")
    args = parser.parse_args()
    try:
        artefact = write_example(
            args.folder,
            name=args.name,
            version=args.version,
            shift_seqs=args.shift_seqs,
            interval_s=args.interval,
        )
    except ConfigError as error:
        print(f"make_example_policy: {error}", file=sys.stderr)
        return 2
    print(f"wrote {artefact.label} to {args.folder}: {artefact.parameters} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
