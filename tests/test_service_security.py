"""Who may do what: tokens, certificates and their rotation, rates, and what is refused at start."""

import asyncio
import hashlib

import grpc
import pytest
import yaml
from certificates import DAY, Authority
from serving import Engine, channel_to, hello, report, run, serving

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.access import Caller, Role
from batchpilot.service.gate import Gate

STATIC = {"policy": "static"}
TOKENS = {name: f"{name}-token-0123456789" for name in ("fleet", "viewer", "admin", "other")}


def clients(*extra):
    """An engine token bound to the node-* engines of group chat, a viewer and an admin."""
    fleet = {"name": "fleet", "role": "engine", "groups": ["chat"], "engines": ["node-*"]}
    digest = hashlib.sha256(TOKENS["fleet"].encode()).hexdigest()
    return [
        {**fleet, "token_sha256": digest},
        {"name": "viewer", "role": "viewer", "token": TOKENS["viewer"]},
        {"name": "admin", "role": "admin", "token": TOKENS["admin"]},
        *extra,
    ]


def write_clients(path, entries):
    path.write_text(yaml.safe_dump({"clients": entries}))
    path.chmod(0o600)
    return path


@pytest.fixture
def access(tmp_path):
    return {"file": str(write_clients(tmp_path / "access.yaml", clients()))}


def bearer(name):
    return (("authorization", f"Bearer {TOKENS[name]}"),)


async def code_of(call):
    """The status a unary call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code()


CALLS = {
    "Tune": "engine admin",
    "GetLimits": "engine viewer admin",
    "ListEngines": "viewer admin",
    "WatchEngine": "viewer admin",
    "ListPolicies": "viewer admin",
    "GetPolicy": "viewer admin",
    "PromotePolicy": "admin",
    "RollBackPolicy": "admin",
}


async def try_call(channel, method, metadata):
    """Makes a call that would succeed but for the caller; returns its status."""
    tuner = tuner_pb2_grpc.TunerServiceStub(channel)
    policies = tuner_pb2_grpc.PolicyServiceStub(channel)
    if method == "Tune":
        call = tuner.Tune(metadata=metadata)
        try:
            await call.write(pb.TuneRequest(hello=hello(engine="node-2:1")))
            await call.read()
            await call.done_writing()
        except grpc.aio.AioRpcError as error:
            return error.code()
        return await call.code()
    if method == "WatchEngine":
        watching = tuner.WatchEngine(pb.WatchEngineRequest(), metadata=metadata)
        try:
            await watching.read()
        except grpc.aio.AioRpcError as error:
            return error.code()
        watching.cancel()
        return grpc.StatusCode.OK
    requests = {
        "GetLimits": (tuner, pb.GetLimitsRequest(id=hello().id)),
        "ListEngines": (tuner, pb.ListEnginesRequest()),
        "ListPolicies": (policies, pb.ListPoliciesRequest()),
        "GetPolicy": (policies, pb.GetPolicyRequest(group="chat")),
        "PromotePolicy": (policies, pb.PromotePolicyRequest(group="chat", policy="memory")),
        "RollBackPolicy": (policies, pb.RollBackPolicyRequest(group="chat")),
    }
    stub, request = requests[method]
    try:
        await getattr(stub, method)(request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", CALLS)
def test_each_role_may_make_its_own_calls_only(access, method):
    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            channel_to(service) as channel,
        ):
            present = Engine(channel, TOKENS["fleet"])
            await present.begin()
            admin = tuner_pb2_grpc.PolicyServiceStub(channel)
            promote = pb.PromotePolicyRequest(group="chat", policy="memory")
            await admin.PromotePolicy(promote, metadata=bearer("admin"))
            for role, name in (("engine", "fleet"), ("viewer", "viewer"), ("admin", "admin")):
                code = await try_call(channel, method, bearer(name))
                allowed = role in CALLS[method].split()
                expected = grpc.StatusCode.OK if allowed else grpc.StatusCode.PERMISSION_DENIED
                assert code is expected, (method, role)
            for metadata in (None, bearer("other"), (("authorization", "Basic xyz"),)):
                code = await try_call(channel, method, metadata)
                assert code is grpc.StatusCode.UNAUTHENTICATED

    run(test)


@pytest.mark.parametrize(
    ("group", "engine"), [("chat", "host-1"), ("code", "node-1:7"), ("chat", "x-node-1")]
)
def test_an_engine_cannot_speak_for_another(access, group, engine):
    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            channel_to(service) as channel,
        ):
            stranger = Engine(channel, TOKENS["fleet"])
            await stranger.send(hello=hello(engine=engine, group=group))
            code, text = await stranger.status()
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert text == f"fleet may not speak for engine {group}/{engine}/0"
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            key = hello(engine=engine, group=group).id
            for request in (
                pb.GetLimitsRequest(id=key),
                pb.GetLimitsRequest(id=key, hello=hello(engine, group), report=report(1)),
            ):
                call = stub.GetLimits(request, metadata=bearer("fleet"))
                assert await code_of(call) is grpc.StatusCode.PERMISSION_DENIED

    run(test)


def test_a_token_that_is_taken_away_ends_its_streams_and_no_others(tmp_path, access):
    second = {"name": "second", "role": "engine", "token": TOKENS["other"]}
    path = write_clients(tmp_path / "access.yaml", clients(second))

    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            channel_to(service) as channel,
        ):
            first, other = Engine(channel, TOKENS["fleet"]), Engine(channel, TOKENS["other"])
            await first.begin()
            await other.begin(hello(engine="node-2:1"))
            write_clients(path, clients())
            service.reloader.now()
            code, text = await other.status()
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert text == "second is no longer known, or known otherwise"
            assert (await first.ask(1)).sequence == 1
            write_clients(path, [{"name": "half"}])  # refused: what was read before stays
            service.reloader.now()
            while not service.meters.reloads["failed"]:
                await asyncio.sleep(0.01)
            assert (await first.ask(2)).sequence == 2

    run(test)


def test_a_file_that_is_put_right_as_the_log_asks_counts_at_once(tmp_path, access, caplog):
    path = tmp_path / "access.yaml"

    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            channel_to(service) as channel,
        ):
            engine = Engine(channel, TOKENS["fleet"])
            await engine.begin()
            for number, text in enumerate(("", "# clients: []\n"), start=1):
                path.write_text(text)
                service.reloader.now()
                while service.meters.reloads["failed"] < number:
                    await asyncio.sleep(0.01)
            assert (await engine.ask(1)).sequence == 1  # an emptied file ends nothing
            write_clients(path, clients()[1:]).chmod(0o644)
            while f"try: chmod 600 {path}, or keep" not in caplog.text:
                await asyncio.sleep(0.01)
            assert (await engine.ask(2)).sequence == 2
            path.chmod(0o600)
            code, text = await engine.status()
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert text == "fleet is no longer known, or known otherwise"

    run(test)


async def watching(channel, name):
    """A WatchEngine stream that has begun."""
    stub = tuner_pb2_grpc.TunerServiceStub(channel)
    request = pb.WatchEngineRequest(interval_ms=200)
    call = stub.WatchEngine(request, metadata=bearer(name))
    await call.read()
    return call


def test_a_watcher_whose_token_is_taken_away_or_means_less_is_ended_and_no_other(tmp_path, access):
    second = {"name": "second", "role": "viewer", "token": TOKENS["other"]}
    path = write_clients(tmp_path / "access.yaml", clients(second))
    less = [{**c, "role": "engine"} if c["name"] == "admin" else c for c in clients()]

    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            channel_to(service) as channel,
        ):
            viewer, second, admin = [
                await watching(channel, name) for name in ("viewer", "other", "admin")
            ]
            write_clients(path, less)
            service.reloader.now()
            for call, name in ((second, "second"), (admin, "admin")):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                assert await call.details() == f"{name} is no longer known, or known otherwise"
            await Engine(channel, TOKENS["fleet"]).begin()
            assert [e.id.engine for e in (await viewer.read()).engines] == ["node-1:77"]
            assert len(service._tuner.watchers) == 1

    run(test)


def test_a_watcher_that_does_not_read_is_ended_too(tmp_path, access):
    path = tmp_path / "access.yaml"
    narrow = [("grpc.http2.bdp_probe", 0)]  # little is under way to who does not read

    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            grpc.aio.insecure_channel(str(service.address), options=narrow) as channel,
        ):
            for number in range(1000):
                message = hello(engine=f"node-{number}", model_name="m" * 120)
                service.sessions.open(message, Caller("fleet", Role.ENGINE), None)
            watcher = await watching(channel, "viewer")
            await asyncio.sleep(0.5)
            write_clients(path, [c for c in clients() if c["name"] != "viewer"])
            service.reloader.now()
            while service._tuner.watchers:
                await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                while await watcher.read() is not grpc.aio.EOF:
                    pass
            assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED

    run(test)


def test_a_token_taken_away_before_the_hello_opens_no_session(tmp_path, access, monkeypatch):
    admitted = []
    admit = Gate.admit

    def noted(*args, **options):
        admitted.append(admit(*args, **options))
        return admitted[-1]

    monkeypatch.setattr(Gate, "admit", noted)

    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            channel_to(service) as channel,
        ):
            late = Engine(channel, TOKENS["fleet"])
            while not admitted:
                await asyncio.sleep(0.01)
            write_clients(tmp_path / "access.yaml", clients()[1:])
            service.reloader.now()
            while not service.meters.reloads["ok"]:
                await asyncio.sleep(0.01)
            await late.send(hello=hello())
            code, text = await late.status()
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert text == "fleet is no longer known, or known otherwise"
            assert len(service.sessions) == 0

    run(test)


def test_a_file_of_clients_that_makes_no_sense_does_not_keep_the_next_from_counting(
    tmp_path, access
):
    path = tmp_path / "access.yaml"

    async def test():
        async with (
            serving(default=STATIC, access=access) as service,
            channel_to(service) as channel,
        ):
            watcher = await watching(channel, "viewer")
            for number, text in enumerate(("1: x\nclient: []", "clients: 2026-13-45"), start=1):
                path.write_text(text)
                service.reloader.now()
                while service.meters.reloads["failed"] < number:
                    await asyncio.sleep(0.01)
            write_clients(path, [c for c in clients() if c["name"] != "viewer"])
            service.reloader.now()
            assert await watcher.code() is grpc.StatusCode.UNAUTHENTICATED

    run(test)


def test_calls_faster_than_allowed_are_refused_before_the_token_is_looked_at(access):
    async def test():
        limits = {"call_burst": 3, "calls_per_second": 0.001}
        async with (
            serving(default=STATIC, access=access, limits=limits) as service,
            channel_to(service) as channel,
        ):
            codes = [await try_call(channel, "ListEngines", bearer("other")) for _ in range(4)]
            expected = [grpc.StatusCode.UNAUTHENTICATED] * 3
            assert codes == [*expected, grpc.StatusCode.RESOURCE_EXHAUSTED]

    run(test)


@pytest.fixture
def pki(tmp_path):
    """A service's TLS settings, and who has signed them."""
    authority = Authority()
    certificate, key = authority.sign("localhost").write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    files = {"certificate": str(certificate), "key": str(key)}
    return authority, files, {**files, "client_ca": str(tmp_path / "ca.pem")}


def credentials(authority, pair=None):
    key, certificate = (pair.key, pair.certificate) if pair else (None, None)
    return grpc.ssl_channel_credentials(authority.certificate, key, certificate)


async def first_answer(service, who, engine="node-1:77", token=None):
    """The status of a Tune stream after its hello: OK where it was welcomed."""
    async with channel_to(service, who) as channel:
        stream = Engine(channel, token)
        try:
            welcome = await stream.begin(hello(engine=engine))
        except grpc.aio.AioRpcError as error:
            return error.code()
        assert welcome.policy == "static"
        return grpc.StatusCode.OK


def test_a_certificate_names_the_engine_it_may_be(pki):
    authority, _, tls = pki

    async def test():
        async with serving(default=STATIC, tls=tls) as service:
            me = credentials(authority, authority.sign("node-1"))
            assert await first_answer(service, me, "node-1") is grpc.StatusCode.OK
            assert await first_answer(service, me, "node-1:4711") is grpc.StatusCode.OK
            denied = grpc.StatusCode.PERMISSION_DENIED
            assert await first_answer(service, me, "node-11") is denied
            assert await first_answer(service, me, "node-2:4711") is denied

    run(test)


def test_without_a_certificate_of_its_authority_nobody_gets_in(pki):
    authority, _, tls = pki
    expired, foreign = authority.sign("node-1", lifetime=-DAY), Authority().sign("node-1")

    async def test():
        async with serving(default=STATIC, tls=tls) as service:
            for pair in (None, expired, foreign):
                who = credentials(authority, pair)
                assert await first_answer(service, who) is grpc.StatusCode.UNAVAILABLE
            async with channel_to(service) as plain:
                assert await try_call(plain, "ListEngines", None) is grpc.StatusCode.UNAVAILABLE

    run(test)


def test_a_certificate_gives_no_other_role_than_engine_unless_the_file_says_so(pki, tmp_path):
    authority, _, tls = pki
    entry = {"name": "grafana", "role": "viewer", "certificate": "grafana.example"}
    path = write_clients(tmp_path / "access.yaml", [entry])

    async def test():
        async with serving(default=STATIC, tls=tls, access={"file": str(path)}) as service:
            for name, expected in (
                ("node-1", grpc.StatusCode.PERMISSION_DENIED),
                ("grafana.example", grpc.StatusCode.OK),
            ):
                who = credentials(authority, authority.sign(name))
                async with channel_to(service, who) as channel:
                    assert await try_call(channel, "ListEngines", None) is expected

    run(test)


def test_with_token_and_certificate_an_engine_must_be_allowed_by_both(pki, access):
    authority, _, tls = pki

    async def test():
        async with serving(default=STATIC, tls=tls, access=access) as service:
            for name, expected in (
                ("node-1", grpc.StatusCode.OK),
                ("node-2", grpc.StatusCode.PERMISSION_DENIED),
            ):
                who = credentials(authority, authority.sign(name))
                token = TOKENS["fleet"]
                assert await first_answer(service, who, "node-1:1", token) is expected

    run(test)


def test_certificates_rotate_without_a_restart_and_without_dropping_a_stream(pki, tmp_path):
    authority, tls, _ = pki

    async def test():
        async with (
            serving(default=STATIC, tls=tls) as service,
            channel_to(service, credentials(authority)) as channel,
        ):
            standing = Engine(channel)
            await standing.begin(hello(engine="node-9:1"))
            successor = Authority("successor")
            pair = successor.sign("localhost")
            # Between the two files the pair does not fit: the old one stays in use.
            (tmp_path / "server.pem").write_bytes(pair.certificate)
            assert await first_answer(service, credentials(authority)) is grpc.StatusCode.OK
            pair.write(tmp_path, "server")
            assert await first_answer(service, credentials(successor)) is grpc.StatusCode.OK
            old = await first_answer(service, credentials(authority))
            assert old is grpc.StatusCode.UNAVAILABLE
            assert (await standing.ask(1)).sequence == 1

    run(test)


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"server": {"bind": "0.0.0.0:0"}}, "has no TLS"),
        ({"server": {"bind": "[::]:0"}}, "has no TLS"),
        ({"server": {"bind": "example.org:0"}}, "has no TLS"),
        ({"metrics": {"bind": "0.0.0.0:0"}}, "set metrics.allow_remote"),
        ({"tls": {"certificate": "a.pem"}}, "certificate and key come together"),
        ({"tls": {"client_ca": "a.pem"}}, "client_ca needs certificate and key"),
        ({"tls": {"certificate": "no.pem", "key": "no.key"}}, "no.pem: No such file"),
    ],
)
def test_an_unsafe_or_unusable_address_is_refused_at_start(sections, complaint):
    async def test():
        with pytest.raises(ConfigError, match=complaint):
            async with serving(**sections):
                pass

    run(test)


def test_beyond_loopback_tls_alone_is_not_enough(pki):
    _, tls, mutual = pki

    async def test():
        with pytest.raises(ConfigError, match="anybody could be an admin"):
            async with serving(server={"bind": "0.0.0.0:0"}, tls=tls):
                pass
        async with serving(server={"bind": "0.0.0.0:0"}, tls=mutual) as service:
            assert service.address.port > 0
        async with serving(server={"bind": "0.0.0.0:0", "insecure_bind": True}) as service:
            assert service.address.port > 0

    run(test)
