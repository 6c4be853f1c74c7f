"""The client in the engine against a service that behaves, and one that does not."""

import logging
import multiprocessing
import os
import random
import socket
import threading
import time
from contextlib import closing

import grpc
import pytest
from driving import build_core, drive, random_requests
from tcp_proxy import Proxy
from tuner_double import Authority, Double, Server, lease, until

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, Source, StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
from batchpilot.scheduler_hook import tuner_channel, tuner_client, tuner_session
from batchpilot.scheduler_hook.remote_link import EngineIdentity, remote_link
from batchpilot.scheduler_hook.settings import HookSettings
from batchpilot.scheduler_hook.tuner_client import (
    FIRST_INTERVAL_SECONDS,
    OUTBOX_REPORTS,
    Backoff,
    has_worked,
)
from batchpilot.service.access import certificate_scope
from batchpilot.service.wire import EngineKey

FACTS = EngineFacts(BatchLimits(64, 2048), total_blocks=100, block_size=16)
IDENTITY = EngineIdentity(FACTS, "a-model", 3, "0.32.0")
STEP = StepRecord(0.02, 3, 3, 0)


class NotedBackoff(Backoff):
    """Waits as little as a test can, and notes how often each wait had been doubled."""

    def __init__(self):
        super().__init__(first_seconds=0.01, longest_seconds=0.02)
        self.doublings = []

    def next_seconds(self):
        self.doublings.append(self._attempts)
        return super().next_seconds()


class Engine:
    """An engine's thread, a step at a time, in mode remote."""

    def __init__(self, targets, **settings):
        given = {
            "service_engine": "host-1",
            "service_min_report_seconds": 0.02,
            "service_max_lease_seconds": 20.0,  # no busy machine takes so long to answer
            **settings,
        }
        self.settings = HookSettings(mode="remote", service_targets=targets, **given)
        local = PolicySpec.parse("static:max_num_seqs=3").build()
        self.policy, self.client = remote_link(self.settings, IDENTITY, local)
        self.client._backoff = Backoff(first_seconds=0.02, longest_seconds=0.2)

    def step(self):
        decision = self.policy.decide(EngineSnapshot(FACTS, time.monotonic(), 3, 9))
        self.policy.observe(STEP)
        return decision

    def steps_until(self, condition, seconds=30.0):
        """The first decision that fulfils it; None where there was none in time."""
        for _ in range(int(seconds / 0.005)):
            decision = self.step()
            if condition(decision):
                return decision
            time.sleep(0.005)
        return None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.client.close()


def is_remote(decision):
    return decision.source is Source.REMOTE


def is_fallback(decision):
    return decision.source is Source.FALLBACK


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine is no reason to give up a service that begins, or a thread that ends."""
    monkeypatch.setattr(tuner_session, "WELCOME_SECONDS", 20.0)
    monkeypatch.setattr(tuner_client, "CLOSE_SECONDS", 20.0)


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("vllm.batchpilot")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="vllm.batchpilot")
    yield lambda: [r.getMessage() for r in {id(r): r for r in caplog.records}.values()]
    logger.removeHandler(caplog.handler)


def test_hello_reports_and_leases_go_back_and_forth(log):
    with Server(Double()) as server, Engine(server.target, itl_slo_ms=40) as engine:
        assert is_fallback(engine.step())
        decision = engine.steps_until(is_remote)
        assert (decision.limits, decision.reason) == (BatchLimits(7, 128), "static")
        assert engine.steps_until(lambda _: engine.client.stats.leases["accepted"] >= 3)
        (hello,), double = server.double.hellos, server.double
    assert (hello.id.group, hello.id.engine) == ("default", "host-1")
    assert hello.id.data_parallel_rank == 3
    assert (hello.model_name, hello.vllm_version, hello.itl_slo_ms) == ("a-model", "0.32.0", 40)
    assert not hello.HasField("ttft_slo_ms")
    assert hello.facts.startup_limits.max_num_seqs == 64
    assert [r.sequence for r in double.reports] == list(range(1, len(double.reports) + 1))
    report = double.reports[-1]
    assert report.window.steps > 0
    assert (report.window.running, report.window.waiting) == (3, 9)
    assert report.window.decode_tokens == 3 * report.window.steps
    assert report.window.seconds > 0
    assert report.local_limits.max_num_seqs == 3
    assert 0 < report.lease_remaining_ms <= 20_000
    assert not report.steps
    assert len([line for line in log() if "follows the tuning service" in line]) == 1


def is_ours(thread):
    return not thread.name.startswith("ThreadPoolExecutor")


def test_nothing_is_opened_before_the_first_step_and_nothing_stays_after_the_last():
    before = set(threading.enumerate())
    with Server(Double()) as server:
        started = set(threading.enumerate())
        with Engine(server.target) as engine:
            assert set(threading.enumerate()) <= started  # one of another test may end
            engine.steps_until(is_remote)
            assert any(t.name == "batchpilot-tuner" for t in threading.enumerate())
        assert not any(t.name == "batchpilot-tuner" for t in threading.enumerate())
        assert not engine.client.stats.connected
    # gRPC's own threads of the stream end too; the double's pool is not ours.
    assert until(lambda: not [t for t in set(threading.enumerate()) - before if is_ours(t)])


def test_detail_is_sent_only_when_the_service_asks_for_it():
    double = Double(welcome=wire.Welcome(report_interval_ms=20, detail=wire.DETAIL_STEPS))
    with Server(double) as server, Engine(server.target) as engine:
        assert engine.steps_until(lambda _: any(report.steps for report in double.reports))
    report = next(report for report in double.reports if report.steps)
    assert {step.decode_seqs for step in report.steps} == {3}
    assert report.window.steps == len(report.steps)


@pytest.mark.parametrize(
    ("asked_ms", "seconds"), [(0, 0.25), (1, 0.05), (500, 0.5), (10**6, 2.0), (2**32 - 1, 2.0)]
)
def test_the_report_interval_stays_within_what_the_operator_allows(asked_ms, seconds):
    bounds = {"service_min_report_seconds": 0.05, "service_max_report_seconds": 2.0}
    with Engine("localhost:1", **bounds) as engine:
        engine.client.welcomed("here", wire.Welcome(report_interval_ms=asked_ms))
        assert engine.client.interval_seconds == seconds


def slow_share(own, **welcome):
    """Of the tokens in a report, those counted as slow: every step takes 20 ms."""
    double = Double(welcome=wire.Welcome(report_interval_ms=20, **welcome))
    with Server(double) as server, Engine(server.target, itl_slo_ms=own) as engine:
        assert engine.steps_until(lambda _: double.reports)
        (said,) = double.hellos
    assert said.follows_targets
    assert said.HasField("itl_slo_ms") == (own is not None)
    window = double.reports[0].window
    return window.slow_decode_tokens / window.decode_tokens


@pytest.mark.parametrize(
    ("own", "welcome", "slow"),
    [
        (None, {"itl_slo_ms": 10.0}, 1.0),
        (None, {"itl_slo_ms": 30.0}, 0.0),
        (None, {}, 0.0),  # no target, or an older service
        (30.0, {"itl_slo_ms": 10.0}, 0.0),
        (10.0, {"itl_slo_ms": 30.0}, 1.0),
        (10.0, {}, 1.0),
    ],
)
def test_slow_tokens_are_counted_by_the_service_s_target_where_the_engine_has_none(
    own, welcome, slow
):
    assert slow_share(own, **welcome) == slow


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_a_target_that_cannot_be_meant_is_none(target):
    with Engine("localhost:1") as engine:
        engine.client.welcomed("here", wire.Welcome(itl_slo_ms=50.0))
        assert engine.client.itl_slo_seconds == 0.05
        engine.client.welcomed("here", wire.Welcome(itl_slo_ms=target))
        assert engine.client.itl_slo_seconds is None


def test_a_replica_that_names_no_target_takes_back_that_of_another():
    with Engine("localhost:1") as engine:
        engine.client.welcomed("here", wire.Welcome(itl_slo_ms=50.0))
        engine.client.welcomed("there", wire.Welcome())
        assert engine.client.itl_slo_seconds is None


def test_a_dead_service_costs_one_line_and_leaves_the_local_policy(log):
    with Engine("localhost:1") as engine:
        assert engine.steps_until(lambda _: engine.client.stats.failures["UNAVAILABLE"] >= 3)
        assert is_fallback(engine.step())
    assert len([line for line in log() if "no tuning service" in line]) == 1


def test_what_is_not_encrypted_goes_through_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Server(Double()) as server, Engine(server.target) as engine:
        assert engine.steps_until(is_remote)


def test_the_next_replica_takes_over_when_one_dies():
    with (
        Server(Double()) as first,
        Server(Double()) as second,
        Engine(f"{first.target},{second.target}") as engine,
    ):
        assert engine.steps_until(is_remote)
        one, other = (first, second) if first.double.hellos else (second, first)
        one.stop()
        assert engine.steps_until(lambda _: other.double.reports)
        assert engine.steps_until(lambda _: engine.client.stats.sessions == 2)
        assert engine.steps_until(is_remote)


def test_a_service_that_comes_back_is_followed_again():
    with Server(Double()) as server, closing(Proxy(server.port)) as proxy:
        target = f"localhost:{proxy.port}"  # stays ours while no service is there
        with Engine(target, service_max_lease_seconds=2.0) as engine:
            assert engine.steps_until(is_remote)
            server.stop()
            assert engine.steps_until(is_fallback)
            with Server(Double()) as again:
                proxy.upstream = again.port
                assert engine.steps_until(is_remote)
                assert again.double.hellos


def test_a_service_that_restarts_again_and_again_is_sought_at_once_each_time(log):
    with (
        Server(Double()) as server,
        closing(Proxy(server.port)) as proxy,
        Engine(f"localhost:{proxy.port}") as engine,
    ):
        stats, backoff = engine.client.stats, NotedBackoff()
        engine.client._backoff = backoff
        for restart in (1, 2, 3):
            accepted = stats.leases["accepted"]
            assert engine.steps_until(lambda _, seen=accepted: stats.leases["accepted"] > seen)
            proxy.drop()
            assert engine.steps_until(lambda _, n=restart: stats.failures["UNAVAILABLE"] >= n)
        assert engine.steps_until(lambda _: stats.sessions == 4 and len(log()) == 7)
    # The first wait after each; a busy machine may need another attempt.
    assert backoff.doublings.count(0) == 3
    said = [line.partition(" tuning service")[0] for line in log()]
    assert said == ["batchpilot follows the", "batchpilot has no"] * 3 + ["batchpilot follows the"]


class Replacing(Double):
    """A service where a namesake takes the session as soon as it has a lease."""

    def Tune(self, requests, context):
        answers = super().Tune(requests, context)
        yield next(answers)
        yield next(answers)
        context.abort(grpc.StatusCode.ABORTED, "a new session of default/host-1/3 replaced this")


def test_engines_of_one_name_come_back_ever_more_slowly_and_are_told_what_to_do_once(
    log, monkeypatch
):
    monkeypatch.setattr(tuner_client, "LASTING_SECONDS", 0.0)  # a namesake far away is no better
    with Server(Replacing()) as server, Engine(server.target) as engine:
        backoff = engine.client._backoff = NotedBackoff()
        assert engine.steps_until(lambda _: engine.client.stats.failures["ABORTED"] >= 5)
        assert engine.client.stats.leases["accepted"] >= 5
    assert backoff.doublings[:5] == [0, 1, 2, 3, 4]
    (warning,) = [line for line in log() if "no tuning service" in line]
    assert warning.endswith(
        "(ABORTED: a new session of default/host-1/3 replaced this); the local policy decides "
        "meanwhile, and it tries again; another engine has this one's name: give each a "
        "service_engine of its own"
    )
    assert len([line for line in log() if "follows the tuning service" in line]) == 2


@pytest.mark.parametrize(
    ("code", "lived_seconds", "leases", "worked"),
    [
        ("UNAVAILABLE", 0.5, 1, True),  # it restarts, or another replica is better
        ("UNAVAILABLE", 0.5, 0, False),
        ("UNAVAILABLE", 10.0, 0, True),  # the engine was idle
        ("INVALID_ARGUMENT", 9.9, 40, False),
        ("INVALID_ARGUMENT", 10.0, 40, True),
        ("SILENT", 10.0, 5, True),
        ("SILENT", 64.0, 0, False),  # its policy has failed
        ("ABORTED", 0.5, 1, False),
        ("ABORTED", 86_400.0, 9_999, False),
    ],
)
def test_a_stream_has_worked_that_lasted_or_that_a_restart_cut_short(
    code, lived_seconds, leases, worked
):
    assert has_worked(code, lived_seconds, leases) is worked


def test_engines_without_a_name_differ_where_hostname_and_pid_do_not():
    """As they do in pods on their node's network; vLLM seeds `random` alike in all of them."""
    names = []
    for _ in range(2):
        random.seed(0)
        with Engine("localhost:1", service_engine=None) as engine:
            first, again = engine.client.make_hello().id, engine.client.make_hello().id
        assert first == again  # one name as long as it lives
        names.append(first.engine)
    assert len(set(names)) == 2
    hostname, pid, _ = zip(*(name.rsplit(":", 2) for name in names), strict=True)
    assert (set(hostname), set(pid)) == ({socket.gethostname()}, {str(os.getpid())})
    scope = certificate_scope([socket.gethostname()])
    assert all(scope.allows(EngineKey("default", name, 0)) for name in names)


def test_a_silent_service_is_given_up_after_the_longest_lease():
    def silent(report):
        return ()

    with (
        Server(Double(answer=silent)) as server,
        Engine(server.target, service_max_lease_seconds=0.2) as engine,
    ):
        assert engine.steps_until(lambda _: engine.client.stats.failures["SILENT"] >= 2)
        assert is_fallback(engine.step())
        assert engine.client.stats.leases == {}


def test_a_service_whose_policy_has_failed_is_given_up_with_its_own_words(caplog):
    welcome = wire.Welcome(report_interval_ms=20, problem="policy 'sla': itl_slo_ms is required")
    with (
        Server(Double(answer=lambda report: (), welcome=welcome)) as server,
        caplog.at_level("WARNING", "vllm.batchpilot"),
        Engine(server.target, service_max_lease_seconds=0.2) as engine,
    ):
        assert engine.steps_until(lambda _: engine.client.stats.failures["SILENT"] >= 1)
    assert "the service says: policy 'sla': itl_slo_ms is required" in caplog.text


def test_a_service_that_only_takes_reports_is_left_ever_more_slowly():
    with (
        Server(Double(answer=lambda report: ())) as server,
        Engine(server.target, service_max_lease_seconds=0.5) as engine,
    ):
        client, patience = engine.client, [engine.client.patience_seconds]
        lost = client._lost

        def noted(target, why):
            patience.append(client.patience_seconds)
            lost(target, why)

        client._lost = noted
        assert engine.steps_until(lambda _: client.stats.failures["SILENT"] >= 2)
        assert patience[:3] == [0.5, 1.0, 2.0]
        server.double.answer = lambda report: [lease(report)]
        assert engine.steps_until(is_remote)
        server.stop()
        assert engine.steps_until(lambda _: client.patience_seconds == 0.5)


def shifted(by):
    return lambda report: [lease(report, sequence=max(0, report.sequence + by))]


NONSENSE = {
    "zero": (lambda r: [lease(r, seqs=0)], "out_of_range"),
    "minus one": (lambda r: [lease(r, seqs=2**32 - 1)], "out_of_range"),
    "huge": (lambda r: [lease(r, tokens=2**31)], "out_of_range"),
    "no limits": (lambda r: [wire.TuneResponse(lease={"sequence": r.sequence})], "no_limits"),
    "no lease": (lambda r: [lease(r, ms=0)], "no_lease"),
    "from the future": (shifted(10**6), "unknown_report"),
    "of no report": (lambda r: [lease(r, sequence=0)], "unknown_report"),
    "empty": (lambda r: [wire.TuneResponse()], "empty"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_counted_by_reason_and_never_applied(kind):
    answer, reason = NONSENSE[kind]
    with Server(Double(answer=answer)) as server, Engine(server.target) as engine:
        assert engine.steps_until(lambda _: engine.client.stats.leases[reason] >= 3)
        assert is_fallback(engine.step())
        assert engine.client.stats.leases["accepted"] == 0


def test_answers_out_of_order_count_once():
    held = []

    def swapped(report):
        held.append(report)
        if len(held) == 2:
            newer, older = held.pop(), held.pop()
            yield lease(newer, seqs=9)
            yield lease(older, seqs=1)

    with Server(Double(answer=swapped)) as server, Engine(server.target) as engine:
        assert engine.steps_until(lambda _: engine.client.stats.leases["stale"] >= 3)
        assert engine.step().limits.max_num_seqs == 9


def test_too_many_reports_drop_the_oldest_and_the_rest_go_as_one():
    with Engine("localhost:1", service_min_report_seconds=0.02) as engine:
        engine.client.start = lambda: None
        engine.client.interval_seconds = 0.0
        for _ in range(OUTBOX_REPORTS + 11):
            engine.step()
        assert len(engine.client.outbox) == OUTBOX_REPORTS
        assert engine.client.stats.reports_dropped == 10
        del engine.client.start
        with Server(Double()) as server:
            engine.client._targets = tuner_channel.rotation((server.target,))
            engine.client.interval_seconds = 60.0
            assert engine.steps_until(lambda _: server.double.reports)
    first = server.double.reports[0]
    assert first.window.steps >= OUTBOX_REPORTS - 1
    assert first.dropped_reports >= 10


def test_however_often_the_service_is_sought_in_vain_no_more_reports_wait_than_are_meant():
    with Engine("localhost:1") as engine:
        client = engine.client
        client._backoff = Backoff(first_seconds=0.001, longest_seconds=0.001)
        client.interval_seconds = 0.0
        assert engine.steps_until(lambda _: client.stats.failures.total() > 3 * OUTBOX_REPORTS)
        assert engine.steps_until(lambda _: client.stats.reports_dropped)
        assert len(client.outbox) == OUTBOX_REPORTS
        with Server(Double()) as server:
            client._targets = tuner_channel.rotation((server.target,))
            assert until(lambda: server.double.reports)  # without a step that could come between
            assert engine.steps_until(is_remote)
    first = server.double.reports[0]
    assert 1 <= first.window.steps <= OUTBOX_REPORTS  # a step each
    assert first.dropped_reports > 0


def test_what_waits_when_a_stream_ends_goes_to_the_next():
    double = Double(token="another")
    with Server(double) as server, Engine(server.target) as engine:
        client = engine.client
        client.interval_seconds = 0.0
        client.start, start = lambda: None, client.start
        for _ in range(6):  # the first has seen nothing yet, and reports nothing
            engine.step()
        waiting = list(client.outbox)
        start()
        assert until(lambda: client.stats.failures["UNAUTHENTICATED"] >= 3)
        assert (list(client.outbox), client.stats.reports_dropped) == (waiting, 0)
        double.token = None
        assert until(lambda: double.reports)
    assert (double.reports[0].window.steps, len(waiting)) == (5, 5)


def test_after_an_outage_no_message_holds_more_steps_than_the_service_takes(monkeypatch):
    monkeypatch.setattr(tuner_session, "MOST_JOINED_STEPS", 2)
    double = Double(token="another")
    with Server(double) as server, Engine(server.target) as engine:
        client = engine.client
        client.interval_seconds = 0.0
        client.start, start = lambda: None, client.start
        for _ in range(6):
            engine.step()
        start()
        assert until(lambda: client.stats.failures["UNAUTHENTICATED"] >= 1)
        double.token = None
        assert until(lambda: len(double.reports) >= 3)
    assert [report.window.steps for report in double.reports[:3]] == [2, 2, 1]


def test_reports_and_the_end_wake_the_sender_at_once(monkeypatch):
    monkeypatch.setattr(tuner_session, "LOOK_SECONDS", 600.0)
    with Server(Double()) as server:
        before = set(threading.enumerate())
        with Engine(server.target) as engine:
            assert engine.steps_until(lambda _: len(server.double.reports) >= 5)
        assert until(lambda: not [t for t in set(threading.enumerate()) - before if is_ours(t)])


def test_mutual_tls_and_a_token_read_afresh_at_every_attempt(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("engine")
    token = tmp_path / "token"
    token.write_text("yesterday\n")
    files = {
        "service_ca_file": authority.ca_file,
        "service_cert_file": certificate,
        "service_key_file": key,
        "service_token_file": str(token),
    }
    double = Double(token="today")
    credentials = authority.server_credentials("service")
    with (
        Server(double, credentials=credentials) as server,
        Engine(server.target, **files) as engine,
    ):
        assert engine.steps_until(lambda _: engine.client.stats.failures["UNAUTHENTICATED"])
        assert double.refused
        token.write_text("today\n")
        assert engine.steps_until(is_remote)


@pytest.mark.parametrize("wrong", ["service expired", "service unknown", "engine unknown", "plain"])
def test_a_wrong_certificate_leaves_the_engine_on_its_local_policy(tmp_path, wrong):
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs", "another")
    server_side = theirs if wrong == "service unknown" else ours
    days = -1 if wrong == "service expired" else 1
    certificate, key = (theirs if wrong == "engine unknown" else ours).issue("engine")
    files = {
        "service_ca_file": ours.ca_file,
        "service_cert_file": certificate,
        "service_key_file": key,
    }
    credentials = None
    if wrong != "plain":
        credentials = server_side.server_credentials("service", days=days)
    with Server(Double(), 0, credentials) as server, Engine(server.target, **files) as engine:
        assert engine.steps_until(lambda _: engine.client.stats.failures["UNAVAILABLE"] >= 2)
        assert is_fallback(engine.step())
        assert not server.double.hellos


def test_the_time_of_day_plays_no_part(monkeypatch):
    with Server(Double()) as server, Engine(server.target) as engine:
        engine.steps_until(is_remote)
        real = time.time()
        for jump in (-3600.0, 86400.0 * 365, 0.0):
            monkeypatch.setattr(time, "time", lambda jump=jump: real + jump)
            accepted = engine.client.stats.leases["accepted"]
            assert engine.steps_until(
                lambda _, before=accepted: engine.client.stats.leases["accepted"] > before + 2
            )
            assert is_remote(engine.step())
        assert engine.client.stats.sessions == 1


def test_closing_is_quick_whatever_the_service_does():
    with Server(Double(answer=lambda report: ())) as server:
        engine = Engine(server.target, service_max_lease_seconds=60.0)
        assert engine.steps_until(lambda _: engine.client.stats.reports_sent)
        engine.client.close()
        assert not engine.client._thread.is_alive()  # it has not waited for an answer
        engine.client.close()
        assert is_fallback(engine.step())  # a late step finds the local policy


def in_a_child(engine, results):
    results.put(engine.client.stats.connected)
    results.put(bool(engine.steps_until(is_remote)))
    results.put(len([t for t in threading.enumerate() if t.name == "batchpilot-tuner"]))
    engine.client.close()


def test_a_fork_before_the_first_step_leaves_the_service_to_the_child():
    with Server(Double()) as server, Engine(server.target) as engine:
        fork = multiprocessing.get_context("fork")
        # The server's threads do not survive a fork, so it stays with the parent.
        results = fork.Queue()
        child = fork.Process(target=in_a_child, args=(engine, results))
        child.start()
        assert [results.get(timeout=60) for _ in range(3)] == [False, True, 1]
        child.join(30)
        assert engine.client._thread is None


def test_a_hook_built_by_vllm_in_mode_remote_serves_every_request_and_closes(monkeypatch):
    answer = lambda report: [lease(report, seqs=5, tokens=100)]  # noqa: E731
    with Server(Double(answer=answer)) as server:
        monkeypatch.setenv("BATCHPILOT_MODE", "remote")
        monkeypatch.setenv("BATCHPILOT_POLICY", "memory")
        monkeypatch.setenv("BATCHPILOT_SERVICE_TARGETS", server.target)
        monkeypatch.setenv("BATCHPILOT_SERVICE_MAX_LEASE_SECONDS", "20")
        core = build_core()
        requests = random_requests(5, count=200)

        def before_step(step):
            time.sleep(0.002)
            if step == 100:  # a report goes with this step, and is answered before the next
                assert until(lambda: server.double.hellos)
                time.sleep(FIRST_INTERVAL_SECONDS)
            elif step > 100:
                assert until(lambda: core.hook.policy._leases.current)

        run = drive(core, requests, before_step=before_step)
        assert run.output_tokens == {r.request_id: r.output_tokens for r in requests}
        assert core.hook.stats.decisions[Source.REMOTE] > 50
        assert core.hook.stats.decisions[Source.FALLBACK] > 0
        assert core.hook.passthrough_reason is None
        reported = sum(report.window.steps for report in server.double.reports)
        assert 0 < reported <= len(run.steps)
        core.scheduler.shutdown()
        assert not any(t.name == "batchpilot-tuner" for t in threading.enumerate())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "service_targets is required in mode remote, such as localhost:50061"),
        ({"service_targets": "host"}, "'host' is not HOST:PORT, dns:///HOST:PORT or unix:/PATH"),
        ({"service_targets": "host:0"}, "'host:0' is not HOST:PORT"),
        ({"service_targets": "a:1,http://b:2"}, "'http://b:2' is not HOST:PORT"),
        ({"service_cert_file": "/dev/null"}, "service_cert_file and service_key_file go together"),
        ({"service_ca_file": "/nowhere/ca.pem"}, "service_ca_file: cannot read /nowhere/ca.pem"),
        (
            {"service_targets": "tuner:1", "service_token_file": "/dev/null"},
            "the token would go to tuner:1 in clear; set service_ca_file to use TLS",
        ),
        (
            {"service_targets": "127.evil.example:1", "service_token_file": "/dev/null"},
            "in clear",
        ),
        ({"service_group": "a b"}, "service_group='a b' must be 1 to 128 letters, digits"),
        ({"service_max_lease_seconds": 0}, "service_max_lease_seconds=0.0 must be at least 0.1"),
        (
            {"service_min_report_seconds": 3, "service_max_report_seconds": 2},
            "service_max_report_seconds=2.0 must be at least service_min_report_seconds=3.0",
        ),
    ],
)
def test_what_can_never_work_is_refused_at_start(settings, message):
    settings = {"service_targets": "" if not settings else "localhost:1"} | settings
    with pytest.raises(ConfigError) as refusal:
        HookSettings(mode="remote", **settings)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "targets",
    ["localhost:1", "dns:///tuner.internal:50051", "[::1]:5, 10.0.0.2:80", "unix:/run/tuner.sock"],
)
def test_what_can_work_is_accepted(targets):
    assert HookSettings(mode="remote", service_targets=targets).mode == "remote"


def test_engines_start_at_different_replicas_and_try_them_all():
    targets = tuple(f"replica-{n}:1" for n in range(4))
    firsts = {next(tuner_channel.rotation(targets)) for _ in range(200)}
    assert firsts == set(targets)
    turn = tuner_channel.rotation(targets)
    assert {next(turn) for _ in range(4)} == set(targets)


def test_waits_double_up_to_a_cap_and_are_never_in_step():
    backoff = Backoff(first_seconds=0.2, longest_seconds=10.0)
    waits = [backoff.next_seconds() for _ in range(50)]
    for number, wait in enumerate(waits):
        whole = min(10.0, 0.2 * 2**number)
        assert 0.5 * whole <= wait <= 1.5 * whole
    assert len(set(waits)) == 50
    backoff.reset()
    assert backoff.next_seconds() <= 0.3
