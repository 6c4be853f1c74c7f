"""The wire contract: its generated code is that of the file, and runs on old and new protobuf."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROTO = "batchpilot/v1/tuner.proto"
GENERATED = ("tuner_pb2.py", "tuner_pb2.pyi", "tuner_pb2_grpc.py")
RELEASED = ROOT / "tests" / "data" / "released_contract.binpb"
BUF = Path(sys.executable).parent / "buf"

#: The oldest releases that the package metadata allows.
OLDEST = ("protobuf==5.29.0", "grpcio==1.71.2")

ROUND_TRIP = """
import google.protobuf, grpc
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb, tuner_pb2_grpc
report = pb.Report(sequence=7, window=pb.TelemetryWindow(steps=3), clamps={"none": 2})
request = pb.TuneRequest.FromString(pb.TuneRequest(report=report).SerializeToString())
assert request.WhichOneof("kind") == "report"
assert request.report.window.steps == 3 and request.report.clamps["none"] == 2
assert not pb.EngineHello().HasField("itl_slo_ms")
stub = tuner_pb2_grpc.TunerServiceStub(grpc.insecure_channel("127.0.0.1:1"))
assert callable(stub.Tune)
print(google.protobuf.__version__, grpc.__version__)
"""


def test_the_generated_code_is_what_the_contract_generates(tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "batchpilot/protos=protos"]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *outputs, f"batchpilot/protos/{PROTO}"], cwd=ROOT, check=True)
    for name in GENERATED:
        made = tmp_path / "batchpilot" / "protos" / "batchpilot" / "v1" / name
        kept = ROOT / "protos" / "batchpilot" / "v1" / name
        assert made.read_text() == kept.read_text(), f"{name} is not current: run make protos"


def test_the_generated_code_runs_on_the_newest_protobuf():
    versions = run_round_trip([])
    assert int(versions[0].split(".")[0]) >= 7


def test_the_generated_code_runs_on_the_oldest_protobuf_allowed():
    versions = run_round_trip([oldest_releases()])
    assert versions == ["5.29.0", "1.71.2"]


def run_round_trip(first):
    """The versions of protobuf and grpcio under which messages were made and read."""
    path = ":".join(map(str, [*first, ROOT / "src"]))
    done = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def oldest_releases():
    """A folder with the oldest releases, installed once and kept beside the other caches."""
    folder = ROOT / ".cache" / "oldest-protobuf"
    if not folder.is_dir():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(unfinished), *OLDEST], check=True)
        unfinished.rename(folder)
    return folder


def test_the_contract_keeps_to_the_style_and_breaks_no_released_client():
    assert buf("lint", "protos") == ""
    assert buf("breaking", "protos", "--against", str(RELEASED)) == ""


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("uint64 sequence = 1;", "uint64 number = 1;", 'changed name from "sequence"'),
        ("uint32 lease_ms = 3;", "uint32 lease_ms = 30;", 'field "3" with name "lease_ms"'),
        ("rpc GetLimits(", "rpc FetchLimits(", 'RPC "GetLimits"'),
    ],
)
def test_a_change_that_breaks_a_released_client_is_found(tmp_path, before, after, complaint):
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    proto = tmp_path / "protos" / PROTO
    text = proto.read_text()
    assert before in text
    proto.write_text(text.replace(before, after))
    assert complaint in buf("breaking", str(tmp_path / "protos"), "--against", str(RELEASED))


def buf(*arguments):
    """What buf complains of."""
    done = subprocess.run([BUF, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 100), done.stderr
    return done.stdout
