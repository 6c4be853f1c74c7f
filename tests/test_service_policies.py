"""Which policy decides for whom: groups, promotions, canaries, learned policies and their log."""

import asyncio
import fcntl
import json
import re
import threading
import time
from types import SimpleNamespace

import grpc
import pyarrow.parquet as pq
import pytest
from serving import Engine, channel_to, hello, report, run, serving

from batchpilot.agents.artefact import ONNX_FILE
from batchpilot.agents.canary import Canary
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.registry import PolicyRegistry
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.canaries import Trial
from batchpilot.service.groups import Groups, Promotion, is_canary, trial_salt
from batchpilot.service.make_example_policy import write_example
from batchpilot.service.promotions import Promotions
from batchpilot.service.refusals import RefusalError
from batchpilot.service.sessions import SessionTable
from batchpilot.service.settings import CanarySettings, GroupSettings
from batchpilot.service.state import read_promotions, write_promotions
from batchpilot.service.wire import EngineKey

CHAT = {"chat": {"policy": "static"}}


@pytest.fixture(autouse=True)
def untidy(monkeypatch):
    """Canaries are judged when a test says so, and not every second in the middle of it."""
    monkeypatch.setattr("batchpilot.service.server.TIDY_SECONDS", 3600.0)


def stub_of(channel):
    return tuner_pb2_grpc.PolicyServiceStub(channel)


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details()


def promotion(policy, share=None, group="chat", hold=None):
    return pb.PromotePolicyRequest(
        group=group, policy=policy, canary_share=share, hold_seconds=hold
    )


def test_a_group_is_promoted_and_taken_back_without_dropping_a_stream():
    async def test():
        async with serving(groups=CHAT) as service, channel_to(service) as channel:
            engine, policies = Engine(channel), stub_of(channel)
            await engine.begin()
            assert (await engine.ask(1)).limits.max_num_seqs == 256
            await policies.PromotePolicy(promotion("static:max_num_seqs=100"))
            await policies.PromotePolicy(promotion("static:max_num_seqs=90"))
            await engine.send(report=report(2))
            assert (await engine.call.read()).welcome.policy == "static:max_num_seqs=90"
            assert (await engine.call.read()).lease.limits.max_num_seqs == 90
            shown = await policies.GetPolicy(pb.GetPolicyRequest(group="chat"))
            assert shown.group_policy == pb.GroupPolicy(
                group="chat",
                policy="static:max_num_seqs=90",
                history=["static", "static:max_num_seqs=100"],
                engines=1,
            )
            back = pb.RollBackPolicyRequest(group="chat")
            for expected in ("static:max_num_seqs=100", "static"):
                answer = await policies.RollBackPolicy(back)
                assert answer.group_policy.policy == expected
            code, _ = await refused(policies.RollBackPolicy(back))
            assert code is grpc.StatusCode.FAILED_PRECONDITION

    run(test)


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (promotion("memory", group="nobody"), "NOT_FOUND", "no group 'nobody'; there are: 'chat'"),
        (promotion("nonsense"), "NOT_FOUND", "no policy 'nonsense'"),
        (promotion("static:max_num_seqs=0"), "INVALID_ARGUMENT", "must be at least 1"),
        (promotion("static:speed=1"), "INVALID_ARGUMENT", "unknown key 'speed'"),
        (promotion("static:"), "INVALID_ARGUMENT", "is not key=value"),
        (promotion("memory", 0.0), "INVALID_ARGUMENT", "canary_share=0.0"),
        (promotion("memory", 1.5), "INVALID_ARGUMENT", "canary_share=1.5"),
        (promotion("memory", float("nan")), "INVALID_ARGUMENT", "canary_share=nan"),
        (promotion("memory", hold=-1.0), "INVALID_ARGUMENT", "hold_seconds=-1.0"),
        (promotion("memory", hold=1e9), "INVALID_ARGUMENT", "must be 0 to 3600"),
        (promotion("memory", hold=float("nan")), "INVALID_ARGUMENT", "hold_seconds=nan"),
        (promotion("memory", 0.5, hold=9.0), "INVALID_ARGUMENT", "held as a whole"),
        (promotion("nonsense", hold=9.0), "NOT_FOUND", "no policy 'nonsense'"),
        (promotion("learned:absent@1"), "NOT_FOUND", "no policy 'absent@1' in the registry"),
        (promotion("learned:/etc/passwd"), "INVALID_ARGUMENT", "policy name"),
        (promotion("learned:../../x"), "INVALID_ARGUMENT", "policy name"),
    ],
)
def test_what_cannot_be_promoted_is_refused_and_changes_nothing(tmp_path, request_, code, text):
    async def test():
        storage = {"registry": str(tmp_path)}
        async with serving(groups=CHAT, storage=storage) as service, channel_to(service) as channel:
            found, details = await refused(stub_of(channel).PromotePolicy(request_))
            assert (found.name, text in details) == (code, True), details
            assert service.groups.promotions == {}

    run(test)


def test_a_group_is_held_for_a_while_and_remembers_nothing_of_it():
    async def test():
        async with serving(groups=CHAT) as service, channel_to(service) as channel:
            engine, policies = Engine(channel), stub_of(channel)
            await engine.begin()
            for number in (90, 80):
                held = await policies.PromotePolicy(
                    promotion(f"static:max_num_seqs={number}", hold=60.0)
                )
                assert 0 < held.group_policy.held_seconds_left <= 60
            service._promotions.end_holds()  # as every second
            shown = held.group_policy
            assert (shown.policy, shown.held_policy) == ("static", "static:max_num_seqs=80")
            await engine.send(report=report(1))
            assert (await engine.call.read()).welcome.policy == "static:max_num_seqs=80"
            assert (await engine.call.read()).lease.limits.max_num_seqs == 80
            ended = await policies.PromotePolicy(promotion("", hold=0.0))
            assert ended.group_policy == pb.GroupPolicy(group="chat", policy="static", engines=1)

    run(test)


def test_what_nobody_holds_anew_ends_by_itself_at_every_replica(tmp_path):
    storage = {"state": str(tmp_path / "state.json")}

    async def test():
        async with (
            serving(groups=CHAT, storage=storage) as service,
            serving(groups=CHAT, storage=storage) as replica,
            channel_to(service) as channel,
        ):
            await stub_of(channel).PromotePolicy(promotion("memory", hold=60.0))
            replica._promotions.load()
            assert replica.groups.choose(KEYS[0]).policy == "memory"
            await stub_of(channel).PromotePolicy(promotion("memory", hold=0.01))
            await asyncio.sleep(0.02)
            for each in (service, replica):
                each._promotions.load()  # the file still has it
                each._promotions.end_holds()
                assert each.groups.promotion("chat") == Promotion("static", "static")

    run(test)


def replica(path=None, chat="static"):
    """The groups of a replica, and what changes them; `path` is the state file, shared or none."""
    groups = Groups(GroupSettings(policy="static"), {"chat": GroupSettings(policy=chat)})
    promotions = Promotions(groups, SessionTable(9, 9, 9), path)
    promotions.load()
    return groups, promotions


def edit(groups, chat):
    """The settings give group chat another policy."""
    groups.configure(GroupSettings(policy="static"), {"chat": GroupSettings(policy=chat)})


@pytest.fixture
def clocks(monkeypatch):
    """The two clocks of a machine, which stand still."""
    found = SimpleNamespace(wall=1e9, monotonic=100.0)
    faked = SimpleNamespace(time=lambda: found.wall, monotonic=lambda: found.monotonic)
    monkeypatch.setattr("batchpilot.service.promotions.time", faked)
    return found


@pytest.mark.parametrize("step_seconds", [-7200.0, 0.0, 7200.0])
@pytest.mark.parametrize("kept", [True, False])
def test_a_hold_lasts_as_long_as_was_asked_whatever_becomes_of_the_wall_clock(
    tmp_path, clocks, step_seconds, kept
):
    path = tmp_path / "state.json" if kept else None
    groups, promotions = replica(path)
    promotions.hold("chat", "memory", 30.0)
    replicas = [(groups, promotions), *([replica(path)] if kept else [])]
    clocks.wall += step_seconds + 29.0
    clocks.monotonic += 29.0
    for groups, promotions in replicas:
        for passes in range(3):  # every second, and whenever the file changes
            promotions.load()
            promotions.end_holds()
            assert groups.choose(KEYS[0]).policy == "memory", passes
        assert promotions.describe("chat").held_seconds_left == 1.0
    clocks.wall += 1.0
    clocks.monotonic += 1.0
    for groups, promotions in replicas:
        promotions.end_holds()
        for passes in range(3):
            assert groups.promotion("chat") == Promotion("static", "static"), passes
            promotions.load()  # the file still has it
            promotions.end_holds()


@pytest.mark.parametrize(
    ("behind_seconds", "left"), [(0.0, 30.0), (10.0, 40.0), (1e6, 3600.0), (-10.0, 20.0)]
)
def test_a_hold_of_a_replica_with_another_clock_lasts_an_hour_at_most(
    tmp_path, clocks, behind_seconds, left
):
    _, asked = replica(tmp_path / "state.json")
    asked.hold("chat", "memory", 30.0)
    clocks.wall -= behind_seconds
    _, other = replica(tmp_path / "state.json")
    assert other.describe("chat").held_seconds_left == left


def test_a_replica_whose_clock_is_ahead_ends_no_hold_in_the_file(tmp_path, clocks):
    path = tmp_path / "state.json"
    groups, asked = replica(path)
    asked.hold("chat", "memory", 30.0)
    clocks.wall += 60.0
    _, ahead = replica(path)
    assert ahead.policy("chat") == "static"
    ahead.promote("default", "aimd", 1.0)
    asked.load()
    assert (groups.promotion("chat").in_force, asked.policy("default")) == ("memory", "aimd")


def test_whoever_promotes_or_rolls_back_ends_what_holds_a_group():
    held = Promotion("static", "static", "sla", 0.5, ("memory",)).held("aimd", 1e12)
    assert held.promoted("trtllm").in_force == "trtllm"
    assert held.promoted("static").in_force == "static"
    assert held.with_canary("memory", 0.1).in_force == "static"
    assert held.rolled_back() == Promotion("static", "static", "sla", 0.5, ("memory",))
    groups = Groups(GroupSettings(policy="static"), {})
    groups.set_promotions({"chat": held})
    assert {groups.choose(key).policy for key in KEYS} == {"aimd"}  # the canary's engines too


def test_promotions_outlive_the_service_and_reach_other_replicas(tmp_path):
    storage = {"state": str(tmp_path / "state.json")}

    async def test():
        async with (
            serving(groups=CHAT, storage=storage) as one,
            serving(groups=CHAT, storage=storage) as two,
            channel_to(one) as channel,
        ):
            await stub_of(channel).PromotePolicy(promotion("memory"))
            two.reloader.now()
            while two.groups.promotion("chat").policy != "memory":
                await asyncio.sleep(0.01)
        async with serving(groups=CHAT, storage=storage) as later:
            assert later.groups.promotion("chat").policy == "memory"
        changed = {"chat": {"policy": "memory-clt"}}
        async with serving(groups=changed, storage=storage) as overruled:
            assert overruled.groups.promotion("chat").policy == "memory-clt"

    run(test)


def reload(groups, promotions, path):
    promotions.load()
    return groups


def promote_another_group(groups, promotions, path):
    promotions.promote("default", "aimd", 1.0)
    return groups


def start_again(groups, promotions, path):
    return replica(path)[0]


@pytest.mark.parametrize("then", [reload, promote_another_group, start_again])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_an_edit_overruled_does_not_come_back_with_the_policy_before(tmp_path, share, then):
    path = tmp_path / "state.json"
    groups, promotions = replica(path)
    promotions.promote("chat", "memory", share)
    edit(groups, "memory-peak")
    assert read_promotions(path) == {}
    edit(groups, "static")
    assert then(groups, promotions, path).promotion("chat") == Promotion("static", "static")


def test_an_edit_takes_nothing_from_other_groups_nor_from_replicas_with_newer_settings(tmp_path):
    path = tmp_path / "state.json"
    groups, promotions = replica(path)
    promotions.promote("default", "aimd", 1.0)
    promotions.promote("chat", "memory", 1.0)
    newer_groups, newer = replica(path, chat="memory-peak")
    assert newer_groups.promotion("chat").policy == "memory-peak"
    newer.promote("default", "sla", 1.0)
    promotions.load()
    assert (promotions.policy("chat"), promotions.policy("default")) == ("memory", "sla")
    newer.promote("chat", "predictive", 1.0)
    edit(groups, "memory-peak")  # before it has seen what was promoted
    promotions.load()
    assert (promotions.policy("chat"), promotions.policy("default")) == ("predictive", "sla")


def test_what_is_overruled_while_the_file_cannot_be_written_is_taken_out_later(
    tmp_path, monkeypatch, caplog
):
    path = tmp_path / "state.json"
    groups, promotions = replica(path)
    promotions.promote("chat", "memory", 1.0)

    def full_disk(path, promotions):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("batchpilot.service.promotions.write_promotions", full_disk)
        edit(groups, "memory-peak")
        edit(groups, "static")
        for _ in range(3):  # every second
            promotions.load()
            promotions.end_holds()
        assert groups.promotion("chat") == Promotion("static", "static")
        assert read_promotions(path)["chat"].policy == "memory"
    promotions.end_holds()
    assert read_promotions(path) == {}
    said = f"what is forgotten is still in {path}: no space left on device"
    assert caplog.messages.count(said) == 1


def test_replicas_that_promote_at_the_same_moment_lose_nothing(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    replicas = [replica(path)[1] for _ in range(2)]

    def read_slowly(path):
        found = read_promotions(path)
        time.sleep(0.05)
        return found

    monkeypatch.setattr("batchpilot.service.promotions.read_promotions", read_slowly)
    threads = [
        threading.Thread(target=each.promote, args=(group, "memory", 1.0))
        for each, group in zip(replicas, ("chat", "batch"), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_promotions(path)) == {"chat", "batch"}


def test_a_replica_changes_what_the_file_says_and_not_what_it_last_saw(tmp_path):
    path = tmp_path / "state.json"
    (groups, one), (_, other) = replica(path), replica(path)
    one.promote("chat", "memory", 1.0)
    other.promote("chat", "aimd", 1.0)
    assert read_promotions(path)["chat"].history == ("static", "memory")
    assert one.roll_back("chat") == "aimd"
    assert groups.promotion("chat") == Promotion("static", "memory", history=("static",))
    other.hold("chat", "sla", 60.0)
    one.hold("chat", "", 0.0)
    assert read_promotions(path)["chat"] == groups.promotion("chat")
    assert groups.promotion("chat").held_policy == ""


def test_what_two_replicas_end_at_the_same_moment_ends_once(tmp_path):
    path = tmp_path / "state.json"
    _, one = replica(path)
    one.promote("chat", "memory", 1.0)
    one.promote("chat", "aimd", 0.5)
    _, other = replica(path)
    assert [each.roll_back("chat") for each in (one, other)] == ["aimd", "aimd"]
    assert one.policy("chat") == other.policy("chat") == "memory"  # and not static, before it
    one.hold("chat", "sla", 60.0)
    other.load()
    assert [each.roll_back("chat") for each in (one, other)] == ["sla", "sla"]
    assert read_promotions(path)["chat"] == Promotion("static", "memory", history=("static",))


def test_a_trial_that_is_taken_back_leaves_alone_a_hold_that_has_begun_elsewhere(tmp_path):
    path = tmp_path / "state.json"
    _, judge = replica(path)
    judge.promote("chat", "aimd", 0.5)
    _, other = replica(path)
    other.hold("chat", "sla", 60.0)
    judge.roll_back("chat")
    found = read_promotions(path)["chat"]
    assert (found.held_policy, found.canary_policy) == ("sla", "aimd")


def test_a_replica_that_hangs_with_the_file_in_its_hands_keeps_no_other_from_serving(tmp_path):
    path = tmp_path / "state.json"
    _, promotions = replica(path)
    with (tmp_path / ".state.json.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = time.monotonic()
        with pytest.raises(RefusalError) as refused:
            promotions.promote("chat", "memory", 1.0)
        assert time.monotonic() - before < 10.0
    assert (refused.value.code, promotions.policy("chat")) == (
        grpc.StatusCode.UNAVAILABLE,
        "static",
    )
    promotions.promote("chat", "memory", 1.0)
    assert read_promotions(path)["chat"].policy == "memory"


def test_a_promotion_that_cannot_be_kept_is_not_made(tmp_path):
    async def test():
        folder = tmp_path / "gone"
        folder.mkdir()
        storage = {"state": str(folder / "state.json")}
        async with serving(groups=CHAT, storage=storage) as service, channel_to(service) as channel:
            folder.rmdir()
            code, _ = await refused(stub_of(channel).PromotePolicy(promotion("memory")))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert service.groups.promotion("chat").policy == "static"

    run(test)


def test_a_state_file_whose_folder_is_not_there_is_said_at_the_start(tmp_path):
    async def test():
        storage = {"state": str(tmp_path / "nowhere" / "state.json")}
        with pytest.raises(ConfigError, match="nowhere/state.json: its folder is not there"):
            async with serving(groups=CHAT, storage=storage):
                pass

    run(test)


def test_a_state_file_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / ".locked.json.lock").mkdir()

    async def test():
        for path, reason in (
            (tmp_path / "locked.json", "Is a directory"),
            ("/proc/state.json", "No such file or directory"),
        ):
            problem = re.escape(f"{path}: it or its lock file cannot be written ({reason})")
            with pytest.raises(ConfigError, match=problem):
                async with serving(groups=CHAT, storage={"state": str(path)}):
                    pass

    run(test)


@pytest.mark.parametrize("has_lock", [True, False])
def test_trying_whether_the_state_file_can_be_written_leaves_nothing_behind(tmp_path, has_lock):
    if has_lock:
        (tmp_path / ".state.json.lock").touch()
    before = list(tmp_path.iterdir())
    replica(tmp_path / "state.json")
    assert list(tmp_path.iterdir()) == before


def test_a_policy_is_refused_that_an_engine_of_the_group_has_no_target_for():
    async def test():
        async with serving(groups=CHAT) as service, channel_to(service) as channel:
            await Engine(channel).begin(hello(itl_slo_ms=40.0))
            await stub_of(channel).PromotePolicy(promotion("memory+sla"))
            await Engine(channel).begin(hello(engine="node-2:1"))
            code, text = await refused(stub_of(channel).PromotePolicy(promotion("sla")))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert text.endswith("itl_slo_ms is required: set it for group chat or in its engines")
            assert service.groups.promotion("chat").policy == "memory+sla"

    run(test)


@pytest.mark.parametrize("content", ["{", "[]", '{"groups": {"chat": {}}}', '{"groups": 3}'])
def test_a_damaged_state_file_is_named(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="state.json"):
        read_promotions(path)


def test_promotions_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "state.json"
    promotions = {"chat": Promotion("static", "memory", "sla", 0.25, ("static", "memory-clt"))}
    promotions["batch"] = Promotion("static", "static").held("memory", 1e12)
    write_promotions(path, promotions)
    assert read_promotions(path) == promotions
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


KEYS = [EngineKey("chat", f"node-{number}", 0) for number in range(2000)]


def canaries(share, policy="memory"):
    tried = Promotion("static", "static", policy, share)
    return {key for key in KEYS if is_canary(key, tried)}


def test_a_canary_reaches_its_share_of_the_engines_always_the_same_ones():
    tenth, half = canaries(0.1), canaries(0.5)
    assert 160 <= len(tenth) <= 240
    assert 940 <= len(half) <= 1060
    assert tenth < half
    assert canaries(1e-9) == set()
    assert canaries(0.1, policy="memory-clt") != tenth
    one = next(iter(tenth))
    assert is_canary(one._replace(rank=7), Promotion("static", "static", "memory", 0.1))


def test_a_canary_decides_for_its_engines_only_until_it_is_promoted_or_ended():
    groups = Groups(GroupSettings(policy="static"), {})
    tried = groups.promotion("chat").with_canary("memory", 0.1)
    groups.set_promotions({"chat": tried})
    chosen = {key: groups.choose(key) for key in KEYS}
    assert {key for key, choice in chosen.items() if choice.canary} == canaries(0.1)
    assert {(c.policy, c.canary) for c in chosen.values()} == {("static", False), ("memory", True)}
    ended = tried.rolled_back()
    assert ended == Promotion("static", "static")
    assert tried.promoted("memory") == Promotion("static", "memory", history=("static",))
    assert tried.promoted("static") == Promotion("static", "static")


JUDGED = {"min_windows": 5, "windows": 20, "median_busy_seconds": 2}


async def trial(service, channel, late_on_canary):
    """A canary for half of 12 engines: reports until it has ended by itself; its verdict."""
    await stub_of(channel).PromotePolicy(promotion("static:max_num_seqs=100", 0.5))
    service._canaries.judge()
    engines = [Engine(channel) for _ in range(12)]
    for number, engine in enumerate(engines):
        await engine.begin(hello(engine=f"node-{number}:1"))
    for sequence in range(1, 30):
        for engine, session in zip(engines, service.sessions, strict=True):
            late = 250 if late_on_canary and session.choice.canary else 5 + sequence % 3
            await engine.ask(sequence, window={"slow_decode_tokens": late})
        service._canaries.judge()
        if service.meters.verdicts:
            return next(iter(service.meters.verdicts))
    raise AssertionError("the trial has not ended")


@pytest.mark.parametrize(
    ("late", "verdict", "policy"),
    [
        (True, "roll_back", "static"),
        (False, "promote", "static:max_num_seqs=100"),
    ],
)
def test_a_canary_goes_back_when_its_engines_fare_worse_and_on_when_they_do_not(
    late, verdict, policy
):
    async def test():
        async with serving(groups=CHAT, canary=JUDGED) as service, channel_to(service) as channel:
            assert await trial(service, channel, late) == ("chat", verdict)
            now = service.groups.promotion("chat")
            assert (now.policy, now.canary_policy) == (policy, "")
            assert service._canaries.trials == {}

    run(test)


def test_many_engines_do_not_promote_a_policy_that_none_has_tried_for_long():
    async def test():
        judged = {**JUDGED, "median_busy_seconds": 300}
        async with serving(groups=CHAT, canary=judged) as service, channel_to(service) as channel:
            with pytest.raises(AssertionError, match="the trial has not ended"):
                await trial(service, channel, late_on_canary=False)
            compared = service._canaries.trials["chat"].canary
            assert compared.canary.windows > 20
            assert compared.canary.median_busy_seconds == 29 * 0.25

    run(test)


ALL_TRY = (
    "with a share of 0.5 all 2 servers here try it, and there is nothing to compare them with: "
    "promote it with a smaller share"
)
NONE_TRIES = (
    "with a share of 0.25 none of the 3 servers here tries it: promote it with a greater share"
)
ALONE = (
    "there is only one server here, and nothing to compare it with: promote the policy without a "
    "share, or start more servers"
)


def canary_of(share):
    """A trial, and names of servers that try the policy and of those that do not."""
    tried = Promotion("static", "static", "memory", share)
    canary = Canary(CanarySettings(share=share), trial_salt("chat", tried))
    names = {key.engine for key in KEYS}
    new = sorted(filter(canary.is_canary, names))
    return Trial(tried, canary), new, sorted(names - set(new))


@pytest.mark.parametrize(
    ("share", "tries", "does_not", "problem", "verdict"),
    [
        (0.5, 2, 0, ALL_TRY, "roll_back"),
        (0.25, 0, 3, NONE_TRIES, "wait"),
        (0.5, 1, 0, ALONE, "roll_back"),
        (0.5, 0, 1, ALONE, "wait"),
        (0.5, 1, 1, "", "wait"),
        (0.5, 0, 0, "", "wait"),
    ],
)
def test_a_trial_that_all_servers_are_in_or_none_is_none_after_a_minute(
    share, tries, does_not, problem, verdict
):
    compared, new, old = canary_of(share)
    servers = {*new[:tries], *old[:does_not]}
    compared.look_at_sides(servers, 100.0, 60.0)
    compared.look_at_sides(servers, 159.9, 60.0)
    assert (compared.problem, compared.verdict()[0]) == ("", "wait")
    compared.look_at_sides(servers, 160.0, 60.0)
    assert (compared.problem, compared.verdict()[0]) == (problem, verdict)
    if problem and verdict == "roll_back":
        assert compared.verdict()[1] == problem


def test_the_minute_begins_anew_when_a_side_gets_a_server_or_loses_its_last():
    compared, new, old = canary_of(0.5)
    compared.look_at_sides({old[0]}, 0.0, 60.0)
    compared.look_at_sides({old[0]}, 60.0, 60.0)
    assert compared.problem == ALONE
    compared.look_at_sides({old[0], new[0]}, 61.0, 60.0)
    assert compared.problem == ""
    for now, problem in ((62.0, ""), (121.0, ""), (122.0, ALL_TRY)):
        compared.look_at_sides({new[0], new[1]}, now, 60.0)
        assert compared.problem == problem


async def minutes_later(service, minutes=1.0):
    """The service's clock runs ahead, and it judges before and after."""
    service._canaries.judge()
    service.sessions.clock = lambda: time.monotonic() + 60 * minutes
    service._canaries.judge()


def test_a_canary_on_every_server_is_rolled_back_and_the_log_says_why(caplog):
    async def test():
        async with serving(groups=CHAT) as service, channel_to(service) as channel:
            await stub_of(channel).PromotePolicy(promotion("memory", 0.5))
            _, new, _ = canary_of(0.5)
            for name in new[:2]:
                assert (await Engine(channel).begin(hello(engine=name))).policy == "memory"
            await minutes_later(service)
            assert service.groups.promotion("chat") == Promotion("static", "static")
            assert service.meters.verdicts == {("chat", "roll_back"): 1}
            assert service.meters.canary_problems == {}
            assert f"group chat: roll_back of canary memory: {ALL_TRY}" in caplog.messages

    run(test)


def test_a_canary_on_no_server_goes_on_and_is_shown_and_logged_once(caplog):
    async def test():
        async with serving(groups=CHAT) as service, channel_to(service) as channel:
            await stub_of(channel).PromotePolicy(promotion("memory", 0.25))
            _, new, old = canary_of(0.25)
            for name in old[:3]:
                await Engine(channel).begin(hello(engine=name))
            await minutes_later(service)
            service._canaries.judge()
            asked = pb.GetPolicyRequest(group="chat")
            shown = (await stub_of(channel).GetPolicy(asked)).group_policy
            assert (shown.canary_policy, shown.canary_problem) == ("memory", NONE_TRIES)
            assert shown.canary_state == "too few windows: 0 with it, 0 without"
            assert service.meters.canary_problems == {"chat": True}
            assert caplog.messages.count(f"group chat: canary memory: {NONE_TRIES}") == 1
            await Engine(channel).begin(hello(engine=new[0]))
            service._canaries.judge()
            assert (await stub_of(channel).GetPolicy(asked)).group_policy.canary_problem == ""
            assert service.meters.canary_problems == {"chat": False}
            another = service.groups.promotion("chat").with_canary("memory-peak", 0.25)
            service.groups.set_promotions({"chat": another})
            assert service._canaries.of_promotion("chat") is None

    run(test)


def test_a_trial_rests_while_its_group_is_held_and_goes_on_afterwards():
    async def test():
        async with serving(groups=CHAT, canary=JUDGED) as service, channel_to(service) as channel:
            await stub_of(channel).PromotePolicy(promotion("memory", 0.5))
            service._canaries.judge()
            _, new, _ = canary_of(0.5)
            engine = Engine(channel)
            assert (await engine.begin(hello(engine=new[0]))).policy == "memory"
            await engine.ask(1)
            service._canaries.judge()
            await stub_of(channel).PromotePolicy(promotion("memory-peak", hold=600.0))
            await engine.send(report=report(2))
            assert (await engine.call.read()).welcome.policy == "memory-peak"
            assert (await engine.call.read()).lease.sequence == 2
            await minutes_later(service)  # by now a trial on every server would have gone back
            held = service.groups.promotion("chat")
            assert (held.held_policy, held.canary_policy) == ("memory-peak", "memory")
            service._canaries.failed(next(iter(service.sessions)))
            compared = service._canaries.trials["chat"].canary
            assert (compared.canary.windows, compared.control.windows) == (1, 0)
            assert service._canaries.of_promotion("chat") is not None
            await stub_of(channel).PromotePolicy(promotion("", hold=0.0))
            service._canaries.judge()
            assert service.groups.promotion("chat") == Promotion("static", "static")
            assert service.meters.verdicts == {("chat", "roll_back"): 1}

    run(test)


def test_every_change_of_hands_is_logged_and_asking_again_is_not(caplog):
    async def test():
        async with serving(groups=CHAT) as service, channel_to(service) as channel:
            for policy in ("memory", "memory", "memory-peak"):
                await stub_of(channel).PromotePolicy(promotion(policy, hold=60.0))
            await stub_of(channel).PromotePolicy(promotion("", hold=0.0))
            await stub_of(channel).PromotePolicy(promotion("aimd"))
            await stub_of(channel).RollBackPolicy(pb.RollBackPolicyRequest(group="chat"))
            assert service.groups.promotion("chat").policy == "static"

    with caplog.at_level("INFO", "batchpilot.service"):
        run(test)
    assert [text for text in caplog.messages if "anyone" in text] == [
        "anyone holds group chat at memory for 60 s",
        "anyone holds group chat at memory-peak for 60 s",
        "anyone lets go of group chat, held at memory-peak",
        "anyone gives group chat policy aimd for a share of 1.0",
        "anyone takes group chat back from aimd",
    ]


def test_what_an_edit_of_the_settings_makes_forgotten_is_logged(caplog):
    groups = Groups(GroupSettings(policy="static"), {})
    tried = Promotion("static", "memory", "sla", 0.5, ("static",)).held("aimd", 1e12)
    groups.set_promotions({"chat": tried})
    groups.configure(GroupSettings(policy="static"), {"other": GroupSettings()})
    assert caplog.messages == []
    groups.configure(GroupSettings(policy="memory-peak"), {})
    assert caplog.messages == [
        "group chat has policy memory-peak of the settings; forgotten is memory, held at aimd, "
        "trying sla on a share of 0.5, after static"
    ]


def test_a_refusal_is_short_enough_for_a_status():
    async def test():
        named = {f"a-group-with-a-long-name-{number}": {} for number in range(500)}
        async with serving(groups=named) as service, channel_to(service) as channel:
            assert len(service.groups.names) == 500
            asked = stub_of(channel).GetPolicy(pb.GetPolicyRequest(group="nobody"))
            code, text = await refused(asked)
            assert (code, text[:21]) == (grpc.StatusCode.NOT_FOUND, "no group 'nobody'; th")
            assert len(text) < 1100

    run(test)


def test_windows_that_an_engine_spent_on_its_local_policy_are_not_counted():
    async def test():
        async with serving(groups=CHAT, canary=JUDGED) as service, channel_to(service) as channel:
            await stub_of(channel).PromotePolicy(promotion("memory", 0.5))
            service._canaries.judge()
            engine = Engine(channel)
            await engine.begin()
            await engine.ask(1, source="fallback")
            await engine.ask(2)
            compared = service._canaries.trials["chat"].canary
            assert compared.canary.windows + compared.control.windows == 1

    run(test)


def test_trials_are_left_alone_where_the_settings_say_so():
    async def test():
        judged = {"judged": False}
        async with serving(groups=CHAT, canary=judged) as service, channel_to(service) as channel:
            await stub_of(channel).PromotePolicy(promotion("memory", 0.5))
            service._canaries.judge()
            assert service._canaries.trials == {}
            assert service.groups.promotion("chat").canary_policy == "memory"

    run(test)


@pytest.fixture
def registry(tmp_path):
    """A registry with two versions of a policy: 1 follows memory+sla, 2 wants a little more."""
    folder = tmp_path / "registry"
    for version, shift in (("1", 0.0), ("2", 0.05)):
        made = tmp_path / f"made-{version}"
        write_example(made, version=version, shift_seqs=shift)
        PolicyRegistry(folder).add(made)
    return folder


def learned(registry, version="1"):
    name = PolicyRegistry(registry).names()[0]
    return f"learned:{name}@{version}"


def test_a_learned_policy_decides_from_the_registry(registry):
    async def test():
        groups = {"chat": {"policy": learned(registry), "itl_slo_ms": 50.0}}
        async with (
            serving(groups=groups, storage={"registry": str(registry)}) as service,
            channel_to(service) as channel,
        ):
            one, two = Engine(channel), Engine(channel)
            welcome = await one.begin()
            assert (welcome.policy, welcome.detail) == (learned(registry), pb.DETAIL_STEPS)
            await two.begin(hello(engine="node-2:1"))
            steps = [pb.StepRecord(seconds=0.025, running=50, decode_seqs=50)] * 10
            assert (await one.ask(1, steps=steps)).source == "learned"
            assert (await two.ask(1, steps=steps)).source == "learned"
            assert len(service._source._networks) == 1
            listed = await stub_of(channel).ListPolicies(pb.ListPoliciesRequest(group="chat"))
            mine = [p for p in listed.policies if p.in_use]
            assert [(p.policy, len(p.sha256), p.problem) for p in mine] == [
                (learned(registry), 64, "")
            ]

    run(test)


def test_a_learned_policy_that_is_damaged_is_refused_and_named(registry):
    async def test():
        groups, storage = {"chat": {"policy": "memory"}}, {"registry": str(registry)}
        (damaged,) = registry.glob(f"*/2/{ONNX_FILE}")
        damaged.write_bytes(damaged.read_bytes()[:-1])
        async with (
            serving(groups=groups, storage=storage) as service,
            channel_to(service) as channel,
        ):
            call = stub_of(channel).PromotePolicy(promotion(learned(registry, "2")))
            code, details = await refused(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            listed = await stub_of(channel).ListPolicies(pb.ListPoliciesRequest())
            problems = {p.policy: p.problem for p in listed.policies if p.problem}
            assert list(problems) == [learned(registry, "2")]
            assert problems[learned(registry, "2")] == details

    run(test)


def test_a_policy_that_the_settings_name_must_be_there_at_start(registry):
    async def test():
        groups = {"chat": {"policy": "learned:absent@1"}}
        with pytest.raises(ConfigError, match="group chat: no version '1' of policy 'absent'"):
            async with serving(groups=groups, storage={"registry": str(registry)}):
                pass

    run(test)


def test_every_answered_report_goes_to_the_experience_log(tmp_path):
    folder = tmp_path / "experience"

    async def test():
        storage = {"experience": str(folder)}
        default = {"policy": "static:max_num_seqs=8", "min_num_seqs": 12}
        async with (
            serving(default=default, storage=storage) as service,
            channel_to(service) as channel,
        ):
            engine = Engine(channel)
            await engine.begin(hello(itl_slo_ms=40.0))
            local = pb.BatchLimits(max_num_seqs=33, max_num_batched_tokens=4096)
            await engine.ask(1)
            await engine.ask(2, local_limits=local)

    run(test)
    first, second = pq.read_table(folder).to_pylist()
    assert [first["sequence"], second["sequence"]] == [1, 2]
    assert (first["engine_group"], first["engine"], first["itl_slo_ms"]) == (
        "chat",
        "node-1:77",
        40.0,
    )
    assert first["window_decode_tokens"] == 500
    assert (first["proposed_max_num_seqs"], first["limit_max_num_seqs"]) == (8, 12)
    assert (first["clamp"], first["policy"]) == ("below_lower_bound", "static:max_num_seqs=8")
    assert (first["local_max_num_seqs"], second["local_max_num_seqs"]) == (None, 33)


def test_a_row_names_the_target_that_its_slow_tokens_were_counted_by(tmp_path):
    folder = tmp_path / "experience"

    async def test():
        groups = {"chat": {"policy": "static", "itl_slo_ms": 30.0, "ttft_slo_ms": 900.0}}
        storage = {"experience": str(folder)}
        async with (
            serving(groups=groups, storage=storage) as service,
            channel_to(service) as channel,
        ):
            for name, more in {
                "a-follows": {"follows_targets": True},
                "b-has-its-own": {"follows_targets": True, "itl_slo_ms": 40.0},
                "c-older": {},
                "d-older-with-its-own": {"itl_slo_ms": 40.0},
            }.items():
                engine = Engine(channel)
                await engine.begin(hello(engine=name, **more))
                await engine.ask(1)

    run(test)
    rows = pq.read_table(folder).to_pylist()
    assert [row["itl_slo_ms"] for row in rows] == [30.0, 40.0, None, 40.0]
    assert {row["ttft_slo_ms"] for row in rows} == {900.0}


def test_of_a_fleet_a_share_can_be_recorded_with_all_its_reports(tmp_path):
    folder = tmp_path / "experience"

    async def test():
        storage = {"experience": str(folder), "experience_share": 0.5}
        async with serving(groups=CHAT, storage=storage) as service, channel_to(service) as channel:
            for number in range(20):
                engine = Engine(channel)
                await engine.begin(hello(engine=f"node-{number}"))
                await engine.ask(1)
                await engine.ask(2)

    run(test)
    rows = pq.read_table(folder).to_pylist()
    engines = {row["engine"] for row in rows}
    assert 4 <= len(engines) <= 16
    assert len(rows) == 2 * len(engines)


def test_the_state_file_is_readable_by_people(tmp_path):
    path = tmp_path / "state.json"
    write_promotions(path, {"chat": Promotion("static", "memory")})
    assert json.loads(path.read_text())["groups"]["chat"]["policy"] == "memory"
