"""Artefacts: what is written is read back; what is poisoned is refused before any of it runs."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, load_from_string, numpy_helper
from policies import FEATURES, constant, linear, manifest, network, policy, write

from batchpilot.agents import learned_model
from batchpilot.agents.actions import ActionDesign
from batchpilot.agents.artefact import (
    LARGEST_MANIFEST_BYTES,
    LARGEST_ONNX_BYTES,
    load_artefact,
    make_artefact,
    sha256_hex,
    write_artefact,
)
from batchpilot.agents.learned_model import ModelError, OnnxModel
from batchpilot.agents.manifest import ArtefactError, Normalisation
from batchpilot.agents.onnx_reader import OnnxError, read_onnx

ZEROS = np.zeros((FEATURES, 2))


def refusal(folder) -> str:
    """Why a folder is refused; nothing may come of it but that."""
    with pytest.raises(ArtefactError) as error:
        OnnxModel(load_artefact(folder))
    assert str(folder) in str(error.value) or "policy test@1" in str(error.value)
    return str(error.value)


def rewrite(folder, **changes):
    """Changes a manifest on disk behind batchpilot's back."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plant(folder, onnx: bytes, **changes):
    """Puts a network there whose hash is right, without any check."""
    folder.mkdir()
    (folder / "policy.onnx").write_bytes(onnx)
    (folder / "manifest.json").write_text(manifest(onnx, **changes).to_text())


def test_what_is_written_is_read_back(tmp_path):
    norm = Normalisation((0.5,) * FEATURES, (2.0,) * FEATURES, clip=10.0)
    made = write(
        tmp_path / "p",
        normalisation=norm,
        action=ActionDesign(seqs_span=3.0),
        training={"timesteps": 1000},
        git_commit="abc",
    )
    read = load_artefact(tmp_path / "p")
    assert read == made
    assert read.label == "test@1"
    assert read.parameters == FEATURES * 2 + 2
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "manifest.json",
        "policy.onnx",
    ]


def test_the_fingerprint_covers_network_and_manifest():
    made = policy()
    assert made.fingerprint == policy().fingerprint
    assert made.fingerprint != policy(constant(0.5, 0.0)).fingerprint
    assert made.fingerprint != policy(decision_interval_s=2.0).fingerprint


def test_a_version_is_never_overwritten_and_nothing_half_written_stays(tmp_path):
    made = write(tmp_path / "p")
    with pytest.raises(ArtefactError, match="exists: a version is never overwritten"):
        write_artefact(tmp_path / "p", made.manifest, made.onnx)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write .*: File exists"):
        write_artefact(tmp_path / "file" / "p", made.manifest, made.onnx)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p"]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_the_network_s_place_is_refused_and_never_loaded(tmp_path):
    proof = tmp_path / "ran"
    plant(tmp_path / "p", pickle.dumps(Payload(proof)))
    assert "policy.onnx: " in refusal(tmp_path / "p")
    (tmp_path / "p" / "manifest.json").write_bytes(pickle.dumps(Payload(proof)))
    assert "manifest: not JSON" in refusal(tmp_path / "p")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()  # the payload works; it was never run


def test_an_exchanged_network_is_refused(tmp_path):
    write(tmp_path / "p")
    (tmp_path / "p" / "policy.onnx").write_bytes(constant(1.0, 1.0))
    assert "the file is damaged or was exchanged" in refusal(tmp_path / "p")


@pytest.mark.parametrize("keep", [0, 1, 20, 200, -1])
def test_a_truncated_network_is_refused(tmp_path, keep):
    whole = constant(0.0, 0.0)
    plant(tmp_path / "p", whole[:keep])
    refusal(tmp_path / "p")


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_a_truncated_manifest_is_refused(tmp_path, keep):
    write(tmp_path / "p")
    path = tmp_path / "p" / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    assert "not JSON, or cut off" in refusal(tmp_path / "p")


@pytest.mark.parametrize("name", ["manifest.json", "policy.onnx"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path / "p")
    (tmp_path / "p" / name).unlink()
    assert f"cannot read {name}: No such file" in refusal(tmp_path / "p")


@pytest.mark.parametrize("key", json.loads(policy().manifest.to_text()))
def test_every_key_of_a_manifest_is_required(tmp_path, key):
    write(tmp_path / "p")
    path = tmp_path / "p" / "manifest.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    assert f"manifest: {key} is missing" in refusal(tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2; this batchpilot reads only 1"),
        ({"observation_version": 2}, "observation_version=2: this batchpilot has version 1"),
        ({"action_version": 0}, "action_version=0: this batchpilot has version 3"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"name": "../../etc"}, "policy name '../../etc' must be"),
        ({"name": "a/b"}, "policy name 'a/b' must be"),
        ({"name": "a..b"}, "policy name 'a..b' must be"),
        ({"name": ""}, "policy name '' must be"),
        ({"name": 3}, "policy name 3 must be"),
        ({"version": "."}, "policy version '.' must be"),
        ({"version": "/tmp"}, "policy version '/tmp' must be"),
        ({"base_policy": "learned:x"}, "must be an analytic policy"),
        ({"base_policy": None}, "base_policy=None is not a text"),
        ({"decision_interval_s": 0}, "decision_interval_s=0 must be above 0"),
        ({"decision_interval_s": "1"}, "decision_interval_s='1' must be above 0"),
        ({"decision_interval_s": True}, "decision_interval_s=True must be above 0"),
        ({"history": 0}, "history=0 must be from 1 to 64"),
        ({"history": 10**9}, "must be from 1 to 64"),
        ({"state_size": -1}, "state_size=-1 must be"),
        ({"onnx_sha256": "abc"}, "'abc' is not a SHA-256"),
        ({"created_at": "today"}, "created_at='today' is not YYYY"),
        ({"training": []}, "training is not a JSON object"),
        ({"targets": {"itl_slo_ms": -1, "ttft_slo_ms": None}}, "itl_slo_ms=-1.0 must be greater"),
        ({"targets": 50}, "targets: 50 is not a JSON object"),
        ({"action": {"design": "residual"}}, "action: min_num_seqs is missing"),
        ({"normalisation": {"mean": [], "std": [], "clip": 1}}, "mean must be 26 finite numbers"),
        (
            {"normalisation": {"mean": [0] * 26, "std": [0] * 26, "clip": 1}},
            "std and clip must be above 0",
        ),
        ({"normalisation": {"mean": ["x"], "std": [], "clip": 1}}, "mean is not a list of numbers"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, message):
    write(tmp_path / "p")
    rewrite(tmp_path / "p", **change)
    assert message in refusal(tmp_path / "p")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": NaN}', "NaN is not a number"),
        ('{"schema": 1, "schema": 1}', "schema is given twice"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON, or cut off"),
        ("\xff", "not JSON, or cut off"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path, text, message):
    write(tmp_path / "p")
    (tmp_path / "p" / "manifest.json").write_bytes(text.encode("latin-1"))
    assert message in refusal(tmp_path / "p")


def test_files_of_too_many_bytes_are_not_even_read_whole(tmp_path):
    write(tmp_path / "p")
    os.truncate(tmp_path / "p" / "policy.onnx", LARGEST_ONNX_BYTES + 1)
    assert "policy.onnx is larger than 16,777,216 bytes" in refusal(tmp_path / "p")
    os.truncate(tmp_path / "p" / "manifest.json", LARGEST_MANIFEST_BYTES + 1)
    assert "manifest.json is larger than 1,048,576 bytes" in refusal(tmp_path / "p")


def test_links_and_pipes_are_refused(tmp_path):
    write(tmp_path / "p")
    path = tmp_path / "p" / "policy.onnx"
    path.rename(tmp_path / "elsewhere.onnx")
    path.symlink_to(tmp_path / "elsewhere.onnx")
    assert "cannot read policy.onnx: it is a link" in refusal(tmp_path / "p")
    path.unlink()
    os.mkfifo(path)
    assert "policy.onnx is not a regular file" in refusal(tmp_path / "p")


@pytest.mark.parametrize(
    ("onnx", "message"),
    [
        (linear(np.zeros((3, 2)), (0.0, 0.0)), "its inputs are observation type 1 (1, 3)"),
        (constant(0.0, 0.0, history=2), "must be observation float32 (1, 26)"),
        (constant(0.0, 0.0, 0.0), "its outputs are action type 1 (1, 3)"),
        (linear(ZEROS, (0.0, 0.0), rows=7), "its inputs are observation type 1 (7, 26)"),
        (
            network(
                [helper.make_node("MatMul", ["seen", "w"], ["action"])],
                {"w": ZEROS},
                inputs={"seen": (1, FEATURES)},
            ),
            "its inputs are seen",
        ),
    ],
)
def test_a_network_of_other_shapes_is_refused(tmp_path, onnx, message):
    plant(tmp_path / "p", onnx)
    assert message in refusal(tmp_path / "p")


def test_a_network_with_an_open_batch_size_is_taken(tmp_path):
    plant(tmp_path / "p", linear(ZEROS, (0.25, 0.0), rows="n"))
    model = OnnxModel(load_artefact(tmp_path / "p"))
    assert model.run(np.zeros(FEATURES, np.float32)).tolist() == [0.25, 0.0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    weights = ZEROS.copy()
    weights[7, 1] = value
    plant(tmp_path / "p", linear(weights, (0.0, 0.0)))
    assert "policy.onnx: w: holds NaN or infinity" in refusal(tmp_path / "p")


def test_weights_in_every_encoding_are_examined():
    for field in ("float_data", "raw_data"):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[FEATURES, 2])
        values = np.full(FEATURES * 2, np.nan, np.float32)
        if field == "float_data":
            tensor.float_data.extend(values)
        else:
            tensor.raw_data = values.tobytes()
        model = load_from_string(constant(0.0, 0.0))
        model.graph.initializer[0].CopyFrom(tensor)
        with pytest.raises(OnnxError, match="holds NaN or infinity"):
            read_onnx(model.SerializeToString())


@pytest.mark.parametrize(
    "nodes",
    [
        [
            helper.make_node("MatMul", ["observation", "w"], ["sums"]),
            helper.make_node("Log", ["sums"], ["action"]),  # of 0, or of something below
        ],
        [
            helper.make_node("MatMul", ["observation", "w"], ["sums"]),
            helper.make_node("Div", ["sums", "sums"], ["action"]),
        ],
    ],
)
def test_a_network_that_gives_no_numbers_is_refused_when_it_is_tried(tmp_path, nodes):
    plant(tmp_path / "p", network(nodes, {"w": ZEROS}))
    assert "tried on fixed inputs: the network's output is not finite" in refusal(tmp_path / "p")


def test_a_network_that_fails_only_at_the_extremes_is_refused_too(tmp_path):
    weights = ZEROS.copy()
    weights[:, 0] = 1e38  # overflows where many features are at their ends
    plant(tmp_path / "p", linear(weights, (0.0, 0.0)))
    assert "not finite" in refusal(tmp_path / "p")


def test_data_in_another_file_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(np.zeros(FEATURES * 2, np.float32).tobytes())
    model = load_from_string(constant(0.0, 0.0))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    plant(tmp_path / "p", model.SerializeToString())
    assert "w: its data is in another file (external data)" in refusal(tmp_path / "p")


def _with_loop() -> bytes:
    body = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "body", [], [])
    loop = helper.make_node("Loop", ["observation"], ["action"], body=body)
    return network([loop], {})


def _with_custom_operator() -> bytes:
    return network([helper.make_node("Run", ["observation"], ["action"], domain="com.example")], {})


def _with_hidden_graph() -> bytes:
    body = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "body", [], [])
    node = helper.make_node("Relu", ["observation"], ["action"])
    node.attribute.append(helper.make_attribute("then_branch", body))
    return network([node], {})


def _with_functions() -> bytes:
    model = load_from_string(constant(0.0, 0.0))
    node = helper.make_node("Relu", ["x"], ["y"])
    ids = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "F", ["x"], ["y"], [node], ids))
    return model.SerializeToString()


def _with_text() -> bytes:
    model = load_from_string(constant(0.0, 0.0))
    model.graph.initializer.append(numpy_helper.from_array(np.array(["x"], object), "t"))
    return model.SerializeToString()


def _too_long() -> bytes:
    nodes = [helper.make_node("Identity", [f"x{i}"], [f"x{i + 1}"]) for i in range(600)]
    return network(nodes, {})


@pytest.mark.parametrize(
    ("onnx", "message"),
    [
        (_with_loop(), "operator 'Loop' is not one that a policy may use"),
        (_with_custom_operator(), "operator 'com.example.Run' is not one"),
        (_with_hidden_graph(), "operator 'Relu' holds a graph"),
        (_with_functions(), "the model holds functions"),
        (_with_text(), "t: data type 8 is not one"),
        (_too_long(), "the model has 600 nodes; 1 to 500 are allowed"),
        (network([], {}), "the model has 0 nodes"),
        (b"\x08\x08", "it has no graph"),
        (b"", "it has no graph"),
    ],
)
def test_what_a_policy_has_no_use_for_is_refused(tmp_path, onnx, message):
    plant(tmp_path / "p", onnx)
    assert message in refusal(tmp_path / "p")


def test_a_shape_larger_than_its_data_is_refused():
    model = load_from_string(constant(0.0, 0.0))
    model.graph.initializer[0].dims[0] = 2**40
    with pytest.raises(OnnxError, match="bytes of data for shape"):
        read_onnx(model.SerializeToString())


def test_what_onnxruntime_refuses_is_refused_in_our_words(tmp_path):
    node = helper.make_node("Gemm", ["observation", "nowhere", "b"], ["action"])
    plant(tmp_path / "p", network([node], {"b": (0.0, 0.0)}))
    assert "onnxruntime refuses it" in refusal(tmp_path / "p")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_networks_never_do_more_than_be_refused(data):
    whole = bytearray(constant(0.25, -0.5))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    onnx = bytes(whole)
    try:
        made = make_artefact(replace(manifest(onnx), onnx_sha256=sha256_hex(onnx)), onnx)
        OnnxModel(made)
    except ArtefactError:
        return


@given(st.binary(max_size=200))
def test_bytes_at_random_are_refused(onnx):
    with pytest.raises(OnnxError):
        read_onnx(onnx)


def test_a_small_file_that_asks_for_gigabytes_is_refused_at_once(tmp_path):
    nodes = [
        helper.make_node("Add", ["column", "row"], ["square"]),
        helper.make_node("ReduceMax", ["square"], ["most"], keepdims=0),
        helper.make_node("MatMul", ["observation", "w"], ["sums"]),
        helper.make_node("Add", ["sums", "most"], ["action"]),
    ]
    weights = {"column": np.zeros((30_000, 1)), "row": np.zeros((1, 30_000)), "w": ZEROS}
    plant(tmp_path / "p", network(nodes, weights))  # 3.6 GB
    assert "Available memory of" in refusal(tmp_path / "p")
    OnnxModel(policy())  # and a sound one goes on working


def test_a_network_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(learned_model, "MOST_TRIAL_SECONDS", 0.05)
    size = 700
    products = [helper.make_node("MatMul", [f"m{at}", "m0"], [f"m{at + 1}"]) for at in range(400)]
    nodes = [
        *products,
        helper.make_node("ReduceMax", ["m400"], ["most"], keepdims=0),
        helper.make_node("MatMul", ["observation", "w"], ["sums"]),
        helper.make_node("Add", ["sums", "most"], ["action"]),
    ]
    # Depends on the observation, so that nothing is worked out when it is loaded.
    first = helper.make_node("ReduceMax", ["observation"], ["seen"], keepdims=0)
    start = helper.make_node("Mul", ["matrix", "seen"], ["m0"])
    weights = {"matrix": np.zeros((size, size)), "w": ZEROS}
    plant(tmp_path / "p", network([first, start, *nodes], weights))
    assert "terminate flag" in refusal(tmp_path / "p")


def test_normalisation_comes_before_the_network():
    norm = Normalisation((0.5,) * FEATURES, (0.25,) * FEATURES, clip=3.0)
    weights = np.zeros((FEATURES, 2))
    weights[0, 0] = weights[1, 1] = 1.0
    model = OnnxModel(policy(linear(weights, (0.0, 0.0)), normalisation=norm))
    seen = np.zeros(FEATURES, np.float32)
    seen[0], seen[1] = 1.0, -1.0
    assert model.run(seen).tolist() == [2.0, -3.0]


def with_memory() -> bytes:
    """next_state = state + 1, action = both states."""
    nodes = [
        helper.make_node("Add", ["state", "one"], ["next_state"]),
        helper.make_node("MatMul", ["observation", "w"], ["zero"]),
        helper.make_node("Add", ["zero", "next_state"], ["action"]),
    ]
    return network(
        nodes,
        {"one": [[1.0, 0.5]], "w": ZEROS},
        inputs={"observation": (1, FEATURES), "state": (1, 2)},
        outputs={"action": (1, 2), "next_state": (1, 2)},
    )


def test_a_network_with_a_memory_keeps_its_state_until_it_is_cleared():
    model = OnnxModel(policy(with_memory(), state_size=2))
    seen = np.zeros(FEATURES, np.float32)
    assert [model.run(seen).tolist() for _ in range(2)] == [[1.0, 0.5], [2.0, 1.0]]
    model.clear()
    assert model.run(seen).tolist() == [1.0, 0.5]


def test_a_network_that_fails_later_says_so_and_forgets_its_state():
    model = OnnxModel(policy(with_memory(), state_size=2))
    model.run(np.zeros(FEATURES, np.float32))
    with pytest.raises(ModelError, match="not finite"):
        model.run(np.full(FEATURES, np.nan, np.float32))
    assert model.run(np.zeros(FEATURES, np.float32)).tolist() == [1.0, 0.5]
