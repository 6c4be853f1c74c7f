"""`batchpilot groups`: what decides for the groups of a running service is shown and changed."""

import json
import queue

import grpc
import pytest

from batchpilot.__main__ import main
from batchpilot.protos.batchpilot.v1.tuner_pb2_grpc import TunerServiceStub
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
    """Runs the command and gives what it says of its groups; nothing where it is refused."""

    def run(*arguments, status=0):
        assert main(["groups", *arguments, "--target", service.target, "--json"]) == status
        said = capsys.readouterr()
        return json.loads(said.out) if status == 0 else said.err

    return run


def test_a_promotion_is_made_shown_and_taken_back(groups):
    assert groups("show", "chat") == [{"group": "chat", "policy": "memory"}]
    promoted = {"group": "chat", "policy": "static:max_num_seqs=64", "history": ["memory"]}
    assert groups("promote", "chat", "static:max_num_seqs=64") == [promoted]
    assert groups("show", "chat") == [promoted]
    assert groups("rollback", "chat") == [{"group": "chat", "policy": "memory"}]
    assert "has had no other policy" in groups("rollback", "chat", status=1)


def test_a_share_tries_it_first(groups):
    (chat,) = groups("promote", "chat", "static", "--canary-share", "0.25")
    assert (chat["policy"], chat["canary_policy"], chat["canary_share"]) == (
        *("memory", "static"),
        0.25,
    )
    assert groups("rollback", "chat") == [{"group": "chat", "policy": "memory"}]


def test_a_hold_ends_by_itself_or_is_ended(groups):
    (chat,) = groups("hold", "chat", "static", "--seconds", "900")
    assert (chat["policy"], chat["held_policy"]) == ("memory", "static")
    assert 0 < chat["held_seconds_left"] <= 900
    assert groups("release", "chat") == [{"group": "chat", "policy": "memory"}]


def test_without_a_group_each_that_has_engines_is_shown(groups, service):
    assert groups("show") == []
    outbox = queue.SimpleQueue()
    outbox.put(hello(3))
    with grpc.insecure_channel(service.target) as channel:
        call = TunerServiceStub(channel).Tune(iter(outbox.get, None))
        assert next(call).HasField("welcome")
        assert groups("show") == [{"group": "group-3", "policy": "memory"}]
        outbox.put(None)
        call.cancel()


def test_the_policies_that_can_be_given_are_listed_with_the_one_in_use(groups):
    listed = {policy["policy"]: policy for policy in groups("policies", "batch")}
    assert [name for name, policy in listed.items() if policy.get("in_use")] == ["static"]
    assert listed["predictive"]["summary"]


def test_for_the_eye_there_is_a_table(service, capsys):
    assert main(["groups", "show", "batch", "--target", service.target]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["GROUP", "POLICY"]
    assert row.split() == ["batch", "static"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["show", "nobody"], 1, "NOT_FOUND: no group 'nobody'; there are: batch, chat"),
        (["promote", "chat", "clever"], 1, "NOT_FOUND: no policy 'clever'; there are: static, "),
        (["promote", "chat", "static", "--canary-share", "1"], 2, "--canary-share=1 must be above"),
        (["hold", "chat", "static", "--seconds", "0"], 2, "--seconds=0 must be above 0"),
        (["hold", "chat", "static", "--seconds", "9999"], 1, "hold_seconds=9999.0 must be 0 to"),
    ],
)
def test_what_cannot_be_done_is_refused_and_says_why(groups, arguments, status, message):
    assert message in groups(*arguments, status=status)


def test_no_service_is_said_in_a_line(capsys):
    assert main(["groups", "show", "chat", "--target", "localhost:1"]) == 1
    assert "localhost:1: UNAVAILABLE" in capsys.readouterr().err
