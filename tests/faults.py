"""Everything that can go wrong between an engine and its tuning service, on purpose.

A world is one engine that follows a service through a proxy. A fault does something to it for a
while and heals it. What counts is what the engine's users saw: requests lost, tokens per second.
`python tests/chaos.py` (`make chaos`) runs the same faults on a real model.
"""

from __future__ import annotations

import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from tcp_proxy import Proxy
from tuner_double import Authority, Double, Server, lease

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, EngineFacts, Source
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
from batchpilot.scheduler_hook.remote_link import EngineIdentity, RemoteLink, remote_link
from batchpilot.scheduler_hook.settings import HookSettings
from batchpilot.service.process_meter import ServiceProcess

#: The experience log is written so often.
FLUSH_SECONDS = 2.5
#: How long a fault is held at most until the engine has noticed it.
SIGN_SECONDS = 60.0
#: What -1 becomes on the wire.
MINUS = 2**32 - 1


@dataclass(frozen=True)
class Scale:
    """How the faults are sized.

    Attributes:
        local: The engine's local policy.
        served: The service's; empty for the same.
        hold_seconds: How long each fault lasts, at least.
        restart_seconds: How often the service restarts, where it does.
        delay_seconds: Added to every byte, where it is.
        lease_seconds: The engine's longest lease.
        good: Limits that a well-behaved double answers with.
        report_ms: How often a double wants reports.
        look_seconds: How often is looked whether something has come; looking takes time, too.
    """

    local: str = "static:max_num_seqs=24"
    served: str = ""
    hold_seconds: float = 0.8
    restart_seconds: float = 0.5
    delay_seconds: float = 2.0
    lease_seconds: float = 0.5
    good: BatchLimits = BatchLimits(24, 2048)
    report_ms: int = 50
    look_seconds: float = 0.005


@dataclass
class World:
    """One engine, a proxy, and whatever stands behind it.

    Attributes:
        scale: How faults are sized.
        folder: For certificates, tokens and logs.
        proxy: Between engine and service.
        link: The engine's policy and client; None before `follow`.
        service: A real service process; None where a double stands in.
        servers: Doubles that were opened.
        authority: Has signed the good certificates; None without TLS.
        is_local: Whether the engine's newest step was decided by its local policy; where nobody
            watches the engine, it is taken to be.
        signs: Of the fault that strikes now; see `Fault`.
        service_cores: Those that service processes run on; None for any.
    """

    scale: Scale
    folder: Path
    proxy: Proxy = field(default_factory=lambda: Proxy(1))
    link: RemoteLink | None = None
    service: ServiceProcess | None = None
    servers: list[Server] = field(default_factory=list)
    authority: Authority | None = None
    is_local: Callable[[], bool] = lambda: True
    signs: frozenset[str] = frozenset()
    service_cores: frozenset[int] | None = None

    def hold(self, *, until_local: bool = False) -> None:
        """Lets a fault last until the client has noticed it.

        A busy machine takes longer to get so far: that is no reason to heal a fault before.

        Args:
            until_local: And until the local policy has decided a step.
        """
        time.sleep(self.scale.hold_seconds)
        gives_up_at = time.monotonic() + SIGN_SECONDS
        while (self.signs and not self.signs & self.stats_seen()) or (
            until_local and not self.is_local()
        ):
            assert time.monotonic() < gives_up_at, self.why()
            time.sleep(self.scale.look_seconds)

    def serve(self, *arguments: str, policy: str | None = None) -> ServiceProcess:
        """Puts a real service behind the proxy."""
        self.service = ServiceProcess(
            policy or self.scale.served or self.scale.local, *arguments, cores=self.service_cores
        )
        self.service.start()
        self.proxy.upstream = self.service.port
        return self.service

    def stand_in(self, double: Any, credentials: grpc.ServerCredentials | None = None) -> Server:
        """Puts a double behind the proxy; those before keep running, without a way to them."""
        server = Server(double, 0, credentials)
        self.servers.append(server)
        self.proxy.upstream = server.port
        self.proxy.drop()
        return server

    def follow(self, facts: EngineFacts, **settings: Any) -> RemoteLink:
        """The engine's side, through the proxy."""
        scale = self.scale
        given = {
            "service_max_lease_seconds": scale.lease_seconds,
            "service_min_report_seconds": 0.05,
            "service_max_report_seconds": scale.lease_seconds / 4,
            **settings,
        }
        hook = HookSettings(
            mode="remote",
            policy=scale.local,
            service_targets=f"localhost:{self.proxy.port}",
            **given,
        )
        local = PolicySpec.parse(scale.local).build({"itl_slo_ms": 100.0})
        self.link = remote_link(hook, EngineIdentity(facts, "model", 0, "0.32.0"), local)
        return self.link

    def stats_seen(self) -> set[str]:
        """What the engine's client has noticed so far."""
        return noticed(self.link) if self.link is not None else set()

    def good_double(self) -> Double:
        """A double that answers as a service should."""
        limits = self.scale.good
        return Double(
            answer=lambda r: [lease(r, limits.max_num_seqs, limits.max_num_batched_tokens)],
            welcome=wire.Welcome(report_interval_ms=self.scale.report_ms),
        )

    def bad_double(self, answer: Callable[[wire.Report], Any]) -> Double:
        """A double that answers as it should not."""
        return Double(answer=answer, welcome=wire.Welcome(report_interval_ms=self.scale.report_ms))

    def why(self) -> str:
        """All that may tell why something did not happen."""
        stats = None if self.link is None else self.link.client.stats
        files = sorted(path.name for path in self.folder.rglob("*"))
        return f"{stats} {files} {'' if self.service is None else self.service.log()}"

    def close(self) -> None:
        if self.link is not None:
            self.link.client.close()
        if self.service is not None:
            self.service.signal(signal.SIGCONT)
            self.service.kill()
        for server in self.servers:
            server.stop()
        self.proxy.close()


def noticed(link: RemoteLink) -> set[str]:
    """What a client has counted that is no success: how streams ended, why answers were refused."""
    stats = link.client.stats
    return {*stats.failures, *stats.leases} - {"accepted"}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: What.
        prepare: Puts a service behind the proxy and returns further settings of the engine.
        strike: Does it, holds it, and heals it.
        signs: What the client must have counted, one of them at least: status codes of streams
            that ended, or why answers were refused. Without any, the fault must leave no trace.
        goes_local: Whether no lease can come while it lasts, so that the local policy decides.
    """

    name: str
    prepare: Callable[[World], dict[str, Any]]
    strike: Callable[[World], None]
    signs: frozenset[str]
    goes_local: bool = True

    def has_struck(self, link: RemoteLink) -> bool:
        """Whether the client noticed what it should have."""
        seen = noticed(link)
        return bool(seen & self.signs) if self.signs else not seen


#: Settings of an engine that no fault touches: nor may a busy machine make an answer late.
PATIENT = {"service_max_lease_seconds": 8.0}


def with_service(*arguments: str) -> Callable[[World], dict[str, Any]]:
    def prepare(world: World) -> dict[str, Any]:
        world.serve(*arguments)
        return {}

    return prepare


def with_experience(world: World) -> dict[str, Any]:
    """A real service that keeps an experience log."""
    config = world.folder / "service.yaml"
    config.write_text(
        f"storage: {{experience: {world.folder / 'experience'}}}\ndefault: {{lease_ms: 20000}}\n"
    )
    world.serve("--config", str(config))
    return PATIENT


def with_double(world: World) -> dict[str, Any]:
    world.stand_in(world.good_double())
    return {}


def with_double_and_patience(world: World) -> dict[str, Any]:
    return with_double(world) | PATIENT


def killed(world: World) -> None:
    world.service.kill()
    world.hold(until_local=True)
    world.service.start()


def stopped(world: World) -> None:
    world.service.signal(signal.SIGSTOP)
    world.hold(until_local=True)
    world.service.signal(signal.SIGCONT)


def restarted(world: World) -> None:
    ends_at = time.monotonic() + world.scale.hold_seconds
    while time.monotonic() < ends_at:
        world.service.kill()
        world.service.start()
        time.sleep(world.scale.restart_seconds)


def cut(world: World) -> None:
    world.proxy.cut()
    world.hold(until_local=True)
    world.proxy.heal()


def frozen(world: World) -> None:
    world.proxy.is_frozen = True
    world.hold(until_local=True)
    world.proxy.heal()


def delayed(world: World) -> None:
    world.proxy.delay_seconds = world.scale.delay_seconds
    world.hold(until_local=True)
    world.proxy.heal()


def garbled(world: World) -> None:
    world.proxy.garbles = True
    world.hold(until_local=True)
    world.proxy.heal()
    world.proxy.drop()


def clock_steps(world: World) -> None:
    """The time of day jumps, in this process; monotonic clocks do not."""
    real = time.time
    try:
        for jump in (86_400.0, -86_400.0):
            time.time = lambda jump=jump: real() + jump
            time.sleep(world.scale.hold_seconds / 2)
    finally:
        time.time = real


def disk_full(world: World) -> None:
    """No file of the service's may grow for a while; then its log must be written again."""
    process, folder = world.service.process.pid, world.folder / "experience"
    _, most = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (0, most))
    time.sleep(max(world.scale.hold_seconds, FLUSH_SECONDS))
    resource.prlimit(process, resource.RLIMIT_FSIZE, (most, most))
    before = {(path.name, path.stat().st_size) for path in folder.glob("*.parquet")}
    deadline = time.monotonic() + 8 * FLUSH_SECONDS
    while {(path.name, path.stat().st_size) for path in folder.glob("*.parquet")} <= before:
        assert time.monotonic() < deadline, world.why()
        time.sleep(0.05)


def answers(
    answer: Callable[[wire.Report], Any], *, until_local: bool = True
) -> Callable[[World], None]:
    """Another service takes over for a while, and what it says makes no sense."""

    def strike(world: World) -> None:
        before = world.proxy.upstream
        world.stand_in(world.bad_double(answer))
        world.hold(until_local=until_local)
        world.proxy.upstream = before
        world.proxy.drop()

    return strike


def late_and_early(world: World) -> None:
    """Another service takes over that answers in the wrong order; some answers are good."""
    good = world.scale.good
    in_disorder = out_of_order((good.max_num_seqs, good.max_num_batched_tokens))
    answers(in_disorder, until_local=False)(world)


def out_of_order(
    seqs_and_tokens: tuple[int, int],
) -> Callable[[wire.Report], Iterator[wire.TuneResponse]]:
    """Answers four reports at once, the newest first and the older ones with other limits."""
    held: list[wire.Report] = []

    def answer(report: wire.Report) -> Iterator[wire.TuneResponse]:
        if held and report.sequence <= held[-1].sequence:
            held.clear()  # another stream, where older reports are other ones
        held.append(report)
        if len(held) >= 4:
            for late in (held[3], *held[:3]):
                good = late is held[3]
                yield lease(late, *(seqs_and_tokens if good else (1, 64)))
            held.clear()

    return answer


class Bytes(grpc.GenericRpcHandler):
    """Answers every report with bytes that are no message."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        chance = random.Random(0)

        def tune(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            for _ in requests:
                yield chance.randbytes(chance.randrange(200))

        return grpc.stream_stream_rpc_method_handler(tune)


def no_messages(world: World) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(4), handlers=(Bytes(),))
    before, world.proxy.upstream = world.proxy.upstream, server.add_insecure_port("127.0.0.1:0")
    server.start()
    world.proxy.drop()
    world.hold(until_local=True)
    world.proxy.upstream = before
    server.stop(0).wait()


def with_certificates(world: World) -> dict[str, Any]:
    """A double behind mutual TLS; the engine has a certificate and a token."""
    authority = world.authority = Authority(world.folder / "good")
    double = world.good_double()
    double.token = "good"
    world.stand_in(double, authority.server_credentials("service"))
    certificate, key = authority.issue("engine")
    token = world.folder / "token"
    token.write_text("good")
    return {
        "service_ca_file": authority.ca_file,
        "service_cert_file": certificate,
        "service_key_file": key,
        "service_token_file": str(token),
    }


def certificate(kind: str) -> Callable[[World], None]:
    """A service with another certificate takes over for a while."""

    def strike(world: World) -> None:
        before = world.proxy.upstream
        # The right authority for the expired one: only its dates are wrong.
        authority = world.authority if kind == "expired" else Authority(world.folder / "wrong")
        credentials = authority.server_credentials(kind, days=-1 if kind == "expired" else 1)
        world.stand_in(world.good_double(), credentials)
        world.hold(until_local=True)
        world.proxy.upstream = before
        world.proxy.drop()

    return strike


def wrong_token(world: World) -> None:
    token = world.folder / "token"
    token.write_text("wrong")
    world.proxy.drop()
    world.hold(until_local=True)
    token.write_text("good")


def conflicting(world: World) -> None:
    """The engine is thrown from one service to another that says something else, and back."""
    ports, good = [world.proxy.upstream], world.scale.good
    others = (good.max_num_seqs - 1, good.max_num_batched_tokens)
    world.stand_in(world.bad_double(lambda report: [lease(report, *others)]))
    ports.append(world.proxy.upstream)
    ends_at = time.monotonic() + world.scale.hold_seconds
    turn = 0
    while time.monotonic() < ends_at:
        turn += 1
        world.proxy.upstream = ports[turn % 2]
        world.proxy.drop()
        time.sleep(world.scale.restart_seconds)
    world.proxy.upstream = ports[0]
    world.proxy.drop()


WITHOUT_LEASE = frozenset({"SILENT", "no_limits"})


def without_policy(world: World) -> None:
    """A service whose policy cannot be built: it takes reports and gives no lease."""
    before, good = world.proxy.upstream, world.service
    bad = world.serve(policy="sla")
    world.proxy.drop()
    world.hold(until_local=True)
    world.service, world.proxy.upstream = good, before
    bad.kill()
    world.proxy.drop()


def signs(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOST = signs("UNAVAILABLE SILENT INTERNAL UNKNOWN CANCELLED")
BAD_RANGE = signs("out_of_range")

FAULTS = (
    Fault("killed with -9, started again", with_service(), killed, signs("UNAVAILABLE")),
    Fault("stopped with SIGSTOP", with_service(), stopped, signs("SILENT")),
    Fault("restarted again and again", with_service(), restarted, signs("UNAVAILABLE"), False),
    Fault("network cut and healed", with_service(), cut, signs("UNAVAILABLE")),
    Fault("network silent and healed", with_service(), frozen, signs("SILENT")),
    Fault("answers delayed", with_service(), delayed, signs("SILENT late")),
    Fault("answers' bytes spoiled", with_service(), garbled, LOST),
    Fault("answers that are no messages", with_double, no_messages, signs("INTERNAL")),
    Fault("limits of 0", with_double, answers(lambda r: [lease(r, 0, 0)]), BAD_RANGE),
    Fault("limits of -1", with_double, answers(lambda r: [lease(r, MINUS, MINUS)]), BAD_RANGE),
    Fault("huge limits", with_double, answers(lambda r: [lease(r, 10**6, 10**8)]), BAD_RANGE),
    Fault(
        "limits for no report",
        with_double,
        answers(lambda r: [lease(r, 1, 64, sequence=r.sequence + 10**6)]),
        signs("unknown_report"),
    ),
    Fault("stale limits, out of order", with_double, late_and_early, signs("stale"), False),
    Fault("wrong certificate", with_certificates, certificate("wrong"), signs("UNAVAILABLE")),
    Fault("expired certificate", with_certificates, certificate("expired"), signs("UNAVAILABLE")),
    Fault("wrong token", with_certificates, wrong_token, signs("UNAUTHENTICATED")),
    Fault("disk full under the experience log", with_experience, disk_full, signs(""), False),
    Fault("the clock steps", with_double_and_patience, clock_steps, signs(""), False),
    Fault("two services in conflict", with_double, conflicting, signs("UNAVAILABLE"), False),
    Fault("service without a policy", with_service(), without_policy, WITHOUT_LEASE),
)


@contextmanager
def striking(world: World, fault: Fault) -> Iterator[FaultLog]:
    """The fault strikes in a thread of its own once the engine follows the service."""
    log = FaultLog(world, fault)
    thread = threading.Thread(target=log.run, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        log.abandon.set()
        thread.join(60)


class FaultLog:
    """When a fault began, when it was over, and when the engine followed the service again."""

    def __init__(self, world: World, fault: Fault) -> None:
        self.world = world
        self.fault = fault
        self.abandon = threading.Event()
        self.struck_at = self.healed_at = self.back_at = 0.0
        self.error: BaseException | None = None

    @property
    def over(self) -> bool:
        """Whether everything is as it was, or never will be."""
        return bool(self.back_at) or self.error is not None

    def run(self) -> None:
        try:
            self._await_leases(0.0)
            self.struck_at = time.monotonic()
            self.world.signs = self.fault.signs
            self.fault.strike(self.world)
            self.healed_at = time.monotonic()
            self._await_leases(self.healed_at)
            self.back_at = time.monotonic()
        except BaseException as error:
            self.error = error

    def _await_leases(self, since: float) -> None:
        """Waits for a lease whose report was sent after `since`, from a welcome service."""
        link = self.world.link
        assert link is not None
        while not self.abandon.wait(self.world.scale.look_seconds):
            held = link.client.leases.current
            if held is not None and held.sent_at > since and link.client.stats.connected:
                return
        raise TimeoutError(f"{self.fault.name}: the engine never came back to the service")


def remote_share(decisions: dict[Source, int]) -> float:
    """Of all decisions, those that the service made."""
    return decisions[Source.REMOTE] / max(1, sum(decisions.values()))
