"""The service from start to stop: health, reload, reflection, metrics, signals, two replicas."""

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    PATIENCE_SECONDS,
    Engine,
    channel_to,
    hello,
    report,
    run,
    service_processes,
    serving,
)

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service import server
from batchpilot.service.access import Caller, Role
from batchpilot.service.canaries import Canaries
from batchpilot.service.health import MOST_WATCHERS
from batchpilot.service.meters import MOST_GROUPS, Meters
from batchpilot.service.metrics import ENGINE_GAUGES, PREFIX, ServiceCollector
from batchpilot.service.reload import Reloader, WatchedFile
from batchpilot.service.sessions import SessionTable
from batchpilot.service.wire import engine_key

STATIC = {"policy": "static:max_num_seqs=200"}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "batchpilot.v1.TunerService", "batchpilot.v1.PolicyService")


async def health_of(channel, name=""):
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


def test_who_watches_health_takes_no_place_of_an_engine():
    async def test():
        async with serving() as service, channel_to(service) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch
            watchers = [watch(health_pb2.HealthCheckRequest()) for _ in range(MOST_WATCHERS)]
            for watcher in watchers:
                assert (await watcher.read()).status == SERVING
            one_more = watch(health_pb2.HealthCheckRequest())
            assert await one_more.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert service.meters.refusals["too_many_watchers"] == 1
            watchers[0].cancel()
            assert await health_of(channel) == SERVING
            engine = Engine(channel)
            await engine.begin()
            assert (await engine.ask(1)).sequence == 1

    run(test)


def test_health_turns_before_the_streams_end():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            assert [await health_of(channel, name) for name in NAMES] == [SERVING] * 3
            engine = Engine(channel)
            await engine.begin()
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            # So seldom that nothing unread stands before the end.
            watching = stub.WatchEngine(pb.WatchEngineRequest(interval_ms=60_000))
            await watching.read()
            # Time enough to ask twice, on a busy machine too.
            stopping = asyncio.create_task(service.stop(drain_seconds=3.0))
            while await health_of(channel) != NOT_SERVING:
                await asyncio.sleep(0.01)
            assert (await engine.ask(1)).sequence == 1  # still answered while it drains
            assert not stopping.done()
            code, text = await engine.status()
            assert (code, text) == (grpc.StatusCode.UNAVAILABLE, "the service is shutting down")
            assert await watching.code() is grpc.StatusCode.UNAVAILABLE
            await stopping

    run(test)


def test_a_changed_file_changes_policies_without_dropping_a_stream(tmp_path):
    path = tmp_path / "service.yaml"

    def write(**groups):
        path.write_text(yaml.safe_dump({"default": STATIC, "groups": groups}))

    async def test():
        write()
        async with serving(path, default=STATIC) as service, channel_to(service) as channel:
            chat, code = Engine(channel), Engine(channel)
            await chat.begin()
            await code.begin(hello(group="code"))
            assert (await chat.ask(1)).limits.max_num_seqs == 200
            assert (await code.ask(1)).limits.max_num_seqs == 200
            write(chat={"policy": "static:max_num_seqs=100", "report_interval_ms": 500})
            await chat.send(report=report(2))
            # The file is looked at every second; until then reports are answered as before.
            while (response := await chat.call.read()).WhichOneof("kind") != "welcome":
                await asyncio.sleep(0.05)
                await chat.send(report=report(service_sequence(service) + 1))
            welcome = response.welcome
            assert (welcome.report_interval_ms, welcome.policy) == (500, "static:max_num_seqs=100")
            assert (await chat.call.read()).lease.limits.max_num_seqs == 100
            assert (await code.ask(2)).limits.max_num_seqs == 200
            useless = ("groups: [", "grups: {}", "default: {policy: nonsense}", "canary: true", "")
            for number, text in enumerate(useless, start=1):
                path.write_text(text)
                service.reloader.now()
                while service.meters.reloads["failed"] < number:
                    await asyncio.sleep(0.01)
            last = service_sequence(service)
            assert (await chat.ask(last + 1)).limits.max_num_seqs == 100

    def service_sequence(service):
        return max(s.sequence for s in service.sessions if s.key.group == "chat")

    run(test)


def test_a_changed_setting_that_is_only_read_at_start_is_named(tmp_path, caplog):
    path = tmp_path / "service.yaml"
    path.write_text("default: {policy: memory}\n")

    async def test():
        async with serving(path, server={"bind": "127.0.0.1:0"}) as service:
            path.write_text(
                "server: {bind: '127.0.0.1:0', drain_seconds: 1}\n"
                "limits: {max_sessions: 7, max_watchers: 64}\ndefault: {policy: memory-peak}\n"
            )
            service.reloader.now()
            while not service.meters.reloads["ok"]:
                await asyncio.sleep(0.01)
            assert service.groups.settings("any").policy == "memory-peak"

    with caplog.at_level("WARNING", "batchpilot.service"):
        run(test)
    (record,) = caplog.records
    changed = "server.drain_seconds, limits.max_sessions"
    assert record.getMessage() == f"{path}: only a restart changes {changed}"


def test_a_file_that_cannot_be_used_is_named_with_what_is_wrong_in_it(tmp_path, caplog):
    path = tmp_path / "service.yaml"

    async def test():
        async with serving(path) as service:
            path.write_text("default: {policy: clever}\n")
            service.reloader.now()
            while not service.meters.reloads["failed"]:
                await asyncio.sleep(0.01)
            path.write_text("default: {policy: memory}\nserver: {bind: '0.0.0.0:1'}\n")
            service.reloader.now()
            while service.meters.reloads["failed"] < 2:
                await asyncio.sleep(0.01)
            assert service.groups.settings("any").policy == "predictive"

    with caplog.at_level("ERROR", "batchpilot.service"):
        run(test)
    said, exposed = caplog.messages
    assert "0.0.0.0:1" in exposed  # what no restart would take is not taken now
    assert said.startswith(f"what was read before stays in force: {path}: default: unknown policy")


def test_a_fault_in_reading_a_file_is_logged_and_the_next_change_is_taken_up(tmp_path, caplog):
    path, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    faults, read = [ZeroDivisionError("never thought of")], []

    def load():
        if faults:
            raise faults.pop()
        read.append("one")

    async def test():
        meters = Meters()
        files = [WatchedFile(path, load), WatchedFile(other, lambda: read.append("other"))]
        reloader = Reloader(files, meters)
        running = asyncio.create_task(reloader.run())
        reloader.now()
        while not read:
            await asyncio.sleep(0.01)
        assert (read, meters.reloads) == (["other"], {"failed": 1, "ok": 1})
        path.write_text("another")
        while len(read) < 2:  # looked at every second
            await asyncio.sleep(0.01)
        assert (read, meters.reloads) == (["other", "one"], {"failed": 1, "ok": 2})
        assert not running.done()
        running.cancel()

    with caplog.at_level("ERROR", "batchpilot.service"):
        run(test)
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: what was read before stays in force"
    assert record.exc_info[0] is ZeroDivisionError


def test_a_file_that_cannot_be_used_is_tried_at_every_look_and_logged_when_the_reason_changes(
    tmp_path, caplog
):
    path, reasons, read = tmp_path / "one.yaml", [], []

    def load():
        if reasons:
            raise reasons[0]
        read.append("one")

    meters = Meters()
    file = WatchedFile(path, load)
    reloader = Reloader([file], meters)

    def look(times, forced=False):
        caplog.clear()
        for _ in range(times):
            reloader.look(file, forced=forced)
        return [text.rpartition(" ")[2] for text in caplog.messages]

    with caplog.at_level("ERROR", "batchpilot.service"):
        assert look(3) == []  # nothing has changed
        reasons[:] = [ConfigError("mode")]
        path.write_text("another")
        assert look(3) == ["mode"]
        reasons[:] = [ConfigError("rights")]
        assert look(3) == ["rights"]
        assert look(1, forced=True) == ["rights"]  # who sends SIGHUP is answered
        path.write_text("a third one")
        assert look(3) == ["rights"]  # and who edits the file
        reasons[:] = [ZeroDivisionError("never thought of")]
        assert look(3) == ["force"]
        assert (read, meters.reloads) == ([], {"failed": 13})
        reasons.clear()
        assert look(3) == []
        assert (read, meters.reloads) == (["one"], {"failed": 13, "ok": 1})
        reasons[:] = [ConfigError("rights")]
        assert look(1, forced=True) == ["rights"]


def test_a_file_whose_mode_alone_has_changed_is_read_again(tmp_path):
    path, read = tmp_path / "one.yaml", []
    path.write_text("something")
    file = WatchedFile(path, lambda: read.append("one"))
    reloader = Reloader([file], Meters())
    time.sleep(0.05)  # the times of files are as coarse as a tick of the kernel
    path.chmod(0o604)
    for _ in range(2):
        reloader.look(file, forced=False)
    assert read == ["one"]


def test_a_fault_in_tidying_is_logged_and_the_rest_and_the_next_pass_come(monkeypatch, caplog):
    passes = []

    def sweep(sessions):
        passes.append("sweep")
        raise ZeroDivisionError("never thought of")

    monkeypatch.setattr(server, "TIDY_SECONDS", 0.01)
    monkeypatch.setattr(SessionTable, "sweep", sweep)
    monkeypatch.setattr(Canaries, "judge", lambda canaries: passes.append("judge"))

    async def test():
        async with serving(default=STATIC):
            while len(passes) < 4:
                await asyncio.sleep(0.01)

    run(test)
    assert passes[:4] == ["sweep", "judge", "sweep", "judge"]
    record = next(r for r in caplog.records if r.levelname == "ERROR")
    assert record.getMessage() == "a fault of ours; it is tried again in 0.01 s"
    assert record.exc_info[0] is ZeroDivisionError


def test_reflection_is_off_unless_asked_for():
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def services(channel):
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(request)
        await call.done_writing()
        response = await call.read()
        return {service.name for service in response.list_services_response.service}

    async def test():
        async with serving(server={"reflection": True}) as service, channel_to(service) as channel:
            assert await services(channel) >= set(NAMES[1:])
        async with serving() as service, channel_to(service) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await services(channel)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED

    run(test)


def test_the_contract_can_be_explored_from_a_shell():
    async def test():
        async with (
            serving(server={"reflection": True}, default=STATIC) as service,
            channel_to(service) as channel,
        ):
            engine = Engine(channel)
            await engine.begin()
            await engine.ask(1)
            buf = Path(sys.executable).parent / "buf"
            url = f"http://{service.address}/batchpilot.v1.TunerService/ListEngines"
            options = ["--protocol", "grpc", "--http2-prior-knowledge", "--data", "{}"]
            process = await asyncio.create_subprocess_exec(
                buf, "curl", *options, url, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await process.communicate()
            (listed,) = json.loads(output)["engines"]
            assert listed["id"] == {"group": "chat", "engine": "node-1:77"}
            assert listed["lease"]["limits"]["maxNumSeqs"] == 200

    run(test)


def scrape(service):
    """The metrics page as {name: {labels: value}}."""
    url = f"http://{service._page.address}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name.removeprefix(PREFIX), {})[labels] = sample.value
    return found


METRICS = {"bind": "127.0.0.1:0", "max_engines": 1}


def test_the_metrics_page_tells_what_every_engine_and_the_service_do():
    async def test():
        policy = {"policy": "static:max_num_seqs=8", "min_num_seqs": 12}
        async with (
            serving(default=policy, metrics=METRICS, canary={"judged": False}) as service,
            channel_to(service) as channel,
        ):
            engine = Engine(channel)
            await engine.begin(hello(itl_slo_ms=40.0))
            await engine.ask(1)
            await Engine(channel).begin(hello(engine="node-2:1"))
            service.meters.canary_problems = {"chat": True}
            refused = Engine(channel)
            await refused.send(report=report(1))
            await refused.status()
            page = await asyncio.to_thread(scrape, service)
            me = (("engine", "node-1:77"), ("group", "chat"), ("rank", "0"))
            expected = {
                "desired_max_num_seqs": 8,
                "leased_max_num_seqs": 12,
                "applied_max_num_seqs": 64,
                "desired_max_num_batched_tokens": 8192,
                "leased_max_num_batched_tokens": 8192,
                "applied_max_num_batched_tokens": 8192,
                "running": 50,
                "waiting": 5,
                "kv_cache_usage": 0.5,
                "itl_seconds": 0.025,
                "itl_target_seconds": 0.04,
                "canary": 0,
            }
            assert set(expected) == set(ENGINE_GAUGES)
            assert {name: page[name] for name in expected} == {
                name: {me: value} for name, value in expected.items()
            }
            assert page["bound"] == {(("binding", "max_num_seqs"), *me): 1}
            assert 0 <= page["report_age_seconds"][me] < PATIENCE_SECONDS
            assert page["has_lease"].get(me, 1) == 1  # a stall may outlast it
            session = service.sessions.get(engine_key(hello().id))
            session.leased_at -= 600  # as of an idle engine
            assert me not in (await asyncio.to_thread(scrape, service)).get("has_lease", {})
            session.problem = "it raised"
            assert (await asyncio.to_thread(scrape, service))["has_lease"][me] == 0
            assert page["sessions"] == {(("group", "chat"),): 2}
            assert page["engines_without_series"] == {(): 1}
            assert page["canary_problem"] == {(("group", "chat"),): 1}
            assert page["leases_total"] == {(("group", "chat"),): 1}
            assert page["clamps_total"] == {(("group", "chat"), ("reason", "below_lower_bound")): 1}
            errors = {(("code", "INVALID_ARGUMENT"), ("method", "Tune")): 1}
            assert page["errors_total"] == errors
            assert page["refusals_total"] == {(("reason", "invalid_message"),): 1}
            assert page["decision_seconds_count"] == {(): 1}
            engine.call.cancel()
            while len(service.sessions) > 1:
                await asyncio.sleep(0.01)
            page = await asyncio.to_thread(scrape, service)
            assert me not in page["report_age_seconds"]

    run(test)


def test_groups_that_engines_make_up_do_not_fill_the_page():
    meters = Meters()
    for number in range(MOST_GROUPS + 50):
        meters.leased(f"group-{number}")
    assert len(meters.leases) == MOST_GROUPS + 1
    assert meters.leases["other"] == 50
    sessions = SessionTable(MOST_GROUPS + 50, 1.0, 1)
    for number in range(MOST_GROUPS + 50):
        sessions.open(hello(group=f"group-{number}"), Caller("anyone", Role.ENGINE), None)
    collector = ServiceCollector(meters, sessions, max_engines=0)
    (streams,) = (found for found in collector.collect() if found.name == f"{PREFIX}sessions")
    counts = {sample.labels["group"]: sample.value for sample in streams.samples}
    assert (len(counts), counts["other"]) == (MOST_GROUPS + 1, 50)


def test_the_metrics_page_counts_the_rows_of_the_experience_log(tmp_path):
    async def test():
        storage = {"experience": str(tmp_path / "experience")}
        async with (
            serving(metrics=METRICS, storage=storage) as service,
            channel_to(service) as channel,
        ):
            engine = Engine(channel)
            await engine.begin()
            await engine.ask(1)
            written, dropped = (("result", "written"),), (("result", "dropped"),)
            rows = {written: 0}
            while not rows[written]:
                rows = (await asyncio.to_thread(scrape, service))["experience_rows_total"]
            assert rows == {written: 1, dropped: 0}

    run(test)


@pytest.fixture
def service_process():
    with service_processes() as start:
        yield start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_gracefully_and_its_log_is_json(service_process, tmp_path, number):
    path = tmp_path / "service.yaml"
    path.write_text("server: {drain_seconds: 0.2}\ndefault: {policy: static}\n")
    process, address = service_process("--config", str(path))
    with grpc.insecure_channel(address) as channel:
        requests = iter([pb.TuneRequest(hello=hello())])
        answers = tuner_pb2_grpc.TunerServiceStub(channel).Tune(forever(requests))
        assert next(answers).welcome.policy == "static"
        path.write_text("server: {drain_seconds: 0.2}\ndefault: {policy: memory}\n")
        process.send_signal(signal.SIGHUP)
        wait_for_line(process, "service.yaml is in force")
        process.send_signal(number)
        with pytest.raises(grpc.RpcError) as ended:
            next(answers)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    last = [json.loads(line) for line in process.stderr][-1]
    assert (last["level"], last["logger"]) == ("info", "batchpilot.service")
    assert last["message"] == "stopped"


def forever(requests):
    """Requests of a stream that its client does not end."""
    yield from requests
    import threading

    threading.Event().wait(timeout=PATIENCE_SECONDS)


def wait_for_line(process, text):
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the log ended without {text!r}")


# A call that a killed replica took with it fails as UNAVAILABLE, and is made again at the next one.
MADE_AGAIN = {
    "methodConfig": [
        {
            "name": [{"service": "batchpilot.v1.TunerService", "method": "GetLimits"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def test_engines_of_a_replica_that_is_killed_go_on_at_another(service_process):
    """One target with two addresses, as a DNS name with two records gives a client."""
    processes, addresses = {}, []
    for number in (60, 70):
        processes[number], address = service_process("--policy", f"static:max_num_seqs={number}")
        addresses.append(address)
    target = f"ipv4:{','.join(addresses)}"
    options = [("grpc.service_config", json.dumps(MADE_AGAIN))]
    with grpc.insecure_channel(target, options) as channel:
        stub = tuner_pb2_grpc.TunerServiceStub(channel)
        key = hello().id
        asked = pb.GetLimitsRequest(id=key, hello=hello(), report=report(1))
        before = stub.GetLimits(asked, wait_for_ready=True, timeout=PATIENCE_SECONDS)
        dies = before.lease.limits.max_num_seqs  # the first, unless it took long to answer
        (stays,) = {60, 70} - {dies}
        processes[dies].kill()
        processes[dies].wait()
        asked.report.sequence = 2  # the other has never heard of this engine
        after = stub.GetLimits(asked, wait_for_ready=True, timeout=PATIENCE_SECONDS)
        assert after.lease.limits.max_num_seqs == stays


def test_an_address_in_use_is_an_error_that_says_so(service_process):
    _, address = service_process()
    command = [sys.executable, "-m", "batchpilot", "serve", "--bind", address]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"batchpilot serve: bind={address}: cannot be opened; is it in use?" in refused.stderr
