"""`batchpilot groups`: what decides for the groups of a running service is shown and changed."""

import json
import queue
import subprocess
import sys
from concurrent import futures

import grpc
import pytest

from batchpilot.__main__ import main
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.load_engine import hello
from batchpilot.service.process_meter import ServiceProcess


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    config = tmp_path_factory.mktemp("service") / "service.yaml"
    config.write_text("groups: {chat: {policy: memory}, batch: {policy: static}}\n")
    with ServiceProcess("memory", "--config", str(config)) as service:
        yield service


@pytest.fixture
def groups(service, capsys):
    """Runs the command and gives what it says of its groups; what it complains of if refused."""

    def run(*arguments, status=0):
        assert main(["groups", *arguments, "--target", service.target, "--json"]) == status
        said = capsys.readouterr()
        return json.loads(said.out) if status == 0 else said.err

    return run


def group(name="chat", policy="memory", **more):
    """A group as JSON: every field is there, also those that are empty."""
    empty = {
        **{"canary_policy": "", "canary_share": 0.0, "canary_state": "", "canary_problem": ""},
        **{"history": [], "held_policy": "", "held_seconds_left": 0.0, "engines": 0},
    }
    return {"group": name, "policy": policy, **empty, **more}


def test_a_promotion_is_made_shown_and_taken_back(groups):
    assert groups("show", "chat") == [group()]
    promoted = group(policy="static:max_num_seqs=64", history=["memory"])
    assert groups("promote", "chat", " static:max_num_seqs=64") == [promoted]
    assert groups("show", "chat") == [promoted]
    assert groups("rollback", "chat") == [group()]
    assert "has had no other policy" in groups("rollback", "chat", status=1)


def test_the_group_that_engines_join_unasked_is_known_before_any_has_come(groups):
    assert groups("show", "default") == [group("default")]
    promoted = group("default", "static", history=["memory"])
    assert groups("promote", "default", "static") == [promoted]
    assert groups("show", "group-of-nobody", status=1).endswith("'batch', 'chat', 'default'\n")
    assert groups("rollback", "default") == [group("default")]


def test_a_share_tries_it_first(groups):
    (chat,) = groups("promote", "chat", "static", "--canary-share", "0.25")
    assert chat == group(canary_policy="static", canary_share=0.25)
    used = [policy["policy"] for policy in groups("policies", "chat") if policy["in_use"]]
    assert used == ["static", "memory"]
    assert groups("rollback", "chat") == [group()]


def test_a_hold_ends_by_itself_or_is_ended(groups):
    (chat,) = groups("hold", "chat", "static", "--seconds", "900")
    assert 0 < chat["held_seconds_left"] <= 900
    assert chat == group(held_policy="static", held_seconds_left=chat["held_seconds_left"])
    assert groups("release", "chat") == [group()]


def test_without_a_group_all_are_shown_those_that_only_an_engine_names_too(groups, service):
    named = [group("batch", "static"), group("chat"), group("default")]
    assert groups("show") == named
    outbox = queue.SimpleQueue()
    outbox.put(hello(3))
    with grpc.insecure_channel(service.target) as channel:
        call = tuner_pb2_grpc.TunerServiceStub(channel).Tune(iter(outbox.get, None))
        assert next(call).HasField("welcome")
        assert groups("show") == [*named, group("group-3", engines=1)]
        outbox.put(None)
        call.cancel()


def test_the_policies_that_can_be_given_are_listed_with_the_one_in_use(groups):
    listed = {policy["policy"]: policy for policy in groups("policies", "batch")}
    assert [name for name, policy in listed.items() if policy["in_use"]] == ["static"]
    assert listed["predictive"]["summary"]
    assert not any(policy["in_use"] for policy in groups("policies"))


def test_for_the_eye_there_is_a_table_and_a_pipe_gets_a_line_for_each_group(service, capsys):
    target = ["--target", service.target]
    assert main(["groups", "hold", "batch", "static:max_num_seqs=64", *target]) == 0
    assert main(["groups", "show", *target]) == 0
    heading, batch, chat, default = capsys.readouterr().out.splitlines()[-4:]
    assert heading.split()[:3] == ["GROUP", "ENGINES", "POLICY"]
    assert batch.split()[:3] == ["batch", "0", "static"]
    assert "held at static:max_num_seqs=64 for 600 s more" in batch
    assert chat.split() == ["chat", "0", "memory"]
    assert default.split() == ["default", "0", "memory"]
    assert main(["groups", "release", "batch", *target]) == 0


def test_a_narrow_terminal_cuts_no_name_off():
    from rich.console import Console

    from batchpilot.service.groups_command import _group_table

    long = "memory-clt:memory_overflow_probability=0.001"
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(_group_table([pb.GroupPolicy(group="chat", policy=long, held_policy="static")]))
    heading, *lines = console.export_text().splitlines()
    policy = slice(heading.index("POLICY"), heading.index("HOLD"))
    assert "".join(line[policy].strip() for line in lines) == long


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["show", "nobody"], 1, "NOT_FOUND: no group 'nobody'; there are: 'batch', 'chat', "),
        (["policies", "nobody"], 1, "NOT_FOUND: no group 'nobody'"),
        (["promote", "chat", "clever"], 1, "NOT_FOUND: no policy 'clever'; there are: static, "),
        (["promote", "chat", "watermark:0.05"], 1, "NOT_FOUND: no policy 'watermark'; there are: "),
        (["promote", "chat", "static", "--canary-share", "1"], 2, "--canary-share=1.0 must be"),
        (["promote", "chat", "static", "--canary-share", "nan"], 2, "--canary-share=nan must be"),
        (["hold", "chat", "static", "--seconds", "0"], 2, "--seconds=0 must be above 0"),
        (["hold", "chat", "static", "--seconds", "9999"], 2, "at most 3600"),
        (["show", "\udcff"], 2, "holds what cannot be printed"),
    ],
)
def test_what_cannot_be_done_is_refused_and_says_why(groups, arguments, status, message):
    assert message in groups(*arguments, status=status)


def test_no_service_is_said_in_a_line_with_what_may_mend_it(capsys):
    assert main(["groups", "show", "chat", "--target", "localhost:1"]) == 1
    said = capsys.readouterr().err
    assert "localhost:1: UNAVAILABLE" in said
    assert "a service with TLS needs --ca-file" in said


def test_what_is_not_encrypted_goes_through_no_proxy(groups, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert groups("show", "chat") == [group()]


class Silent(tuner_pb2_grpc.PolicyServiceServicer):
    """Makes the change and never says so."""

    def PromotePolicy(self, request, context):
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")


def test_a_change_without_an_answer_may_have_been_made(capsys):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    tuner_pb2_grpc.add_PolicyServiceServicer_to_server(Silent(), server)
    target = f"localhost:{server.add_insecure_port('localhost:0')}"
    server.start()
    try:
        assert main(["groups", "promote", "chat", "static", "--target", target]) == 1
    finally:
        server.stop(None)
    assert "may have been made: see `batchpilot groups show chat`" in capsys.readouterr().err


def test_who_has_read_enough_of_it_gets_no_traceback():
    command = f"{sys.executable} -m batchpilot serve --print-settings | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
