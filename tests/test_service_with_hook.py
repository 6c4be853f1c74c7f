"""The service and the hook's own client together: many replicas, certificates, every step told."""

import logging
import threading
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml
from certificates import Authority
from serving import service_processes

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, Source, StepRecord
from batchpilot.scheduler_hook.remote_link import EngineIdentity, remote_link
from batchpilot.scheduler_hook.settings import HookSettings

FACTS = EngineFacts(BatchLimits(256, 8192), total_blocks=1000, block_size=16)
SECONDS = 60.0


class Engine:
    """An engine in mode remote that takes a step every 10 ms, in a thread of its own."""

    def __init__(self, targets, name, **settings):
        identity = EngineIdentity(FACTS, "a-model", 0, "0.32.0")
        given = HookSettings(
            mode="remote", service_targets=targets, service_engine=name, **settings
        )
        local = PolicySpec.parse("static:max_num_seqs=5").build()
        self.policy, self._client = remote_link(given, identity, local)
        self.latest = None
        self.sources = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.wait(0.01):
            self.latest = self.policy.decide(EngineSnapshot(FACTS, time.monotonic(), 3, 9))
            self.sources[self.latest.source] += 1
            self.policy.observe(StepRecord(0.01, 3, 3, 0))

    def close(self):
        self._stop.set()
        self._thread.join()
        self._client.close()


@pytest.fixture
def engines():
    """Starts engines and ends them."""
    started = []

    def start(*arguments, **settings):
        started.append(Engine(*arguments, **settings))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.fixture
def service_process():
    with service_processes() as start:
        yield start


def wait_until(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def limit(engine):
    """The sequence limit that a service supplies now; None without one."""
    decision = engine.latest
    if decision is None or decision.source is not Source.REMOTE:
        return None
    return decision.limits.max_num_seqs


def test_engines_of_a_killed_replica_move_to_the_other_before_their_leases_end(
    service_process, engines, tmp_path
):
    """Leases last longer than a slow machine needs: not one decision is the local policy's."""
    addresses, processes = [], {}
    for number in (60, 70):
        path = tmp_path / f"{number}.yaml"
        policy = f"static:max_num_seqs={number}"
        path.write_text(yaml.safe_dump({"default": {"policy": policy, "lease_ms": 20_000}}))
        process, address = service_process("--config", str(path))
        processes[number] = process
        addresses.append(address)
    targets, longest = ",".join(addresses), {"service_max_lease_seconds": 20.0}
    fleet = [engines(targets, f"node-{number}", **longest) for number in range(6)]
    wait_until(lambda: all(limit(engine) in (60, 70) for engine in fleet))
    dies = limit(fleet[0])  # an engine begins at any of them
    (stays,) = {60, 70} - {dies}
    before = [engine.sources[Source.FALLBACK] for engine in fleet]
    processes[dies].kill()
    wait_until(lambda: all(limit(engine) == stays for engine in fleet))
    assert [engine.sources[Source.FALLBACK] for engine in fleet] == before


def test_the_group_s_target_is_what_the_engine_counts_by_and_what_is_recorded(
    service_process, engines, tmp_path
):
    """Steps take 10 ms, the group allows 5, and the engine itself states nothing."""
    path, folder = tmp_path / "service.yaml", tmp_path / "experience"
    default = {"policy": "memory+sla", "itl_slo_ms": 5.0, "report_interval_ms": 100}
    settings = {"default": default, "storage": {"experience": str(folder)}}
    path.write_text(yaml.safe_dump(settings))
    _, address = service_process("--config", str(path))
    engines(address, "node-1")
    wait_until(lambda: list(folder.glob("*.parquet")))
    rows = pq.read_table(folder).to_pylist()
    assert {row["itl_slo_ms"] for row in rows} == {5.0}
    assert all(row["window_slow_decode_tokens"] == row["window_decode_tokens"] for row in rows)
    assert any(row["window_decode_tokens"] for row in rows)


def test_reports_that_bring_nothing_new_go_unanswered_and_the_lease_never_ends(
    service_process, engines, tmp_path
):
    path = tmp_path / "service.yaml"
    default = {"policy": "static", "lease_ms": 6000, "report_interval_ms": 100}
    path.write_text(yaml.safe_dump({"default": default}))
    _, address = service_process("--config", str(path))
    engine = engines(address, "node-1", service_max_lease_seconds=6.0)
    wait_until(lambda: limit(engine) == 256)
    local, stats = engine.sources[Source.FALLBACK], engine._client.stats
    wait_until(lambda: stats.leases["accepted"] >= 4)  # one every three seconds
    assert stats.reports_sent > 5 * stats.leases["accepted"]
    assert engine.sources[Source.FALLBACK] == local
    assert not stats.failures


def test_the_hook_is_let_in_by_its_certificate_under_its_own_name_only(
    service_process, engines, tmp_path
):
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    certificate, key = map(str, authority.sign("localhost").write(tmp_path, "server"))
    own_certificate, own_key = map(str, authority.sign("node-1").write(tmp_path, "engine"))
    ca = str(tmp_path / "ca.pem")
    tls = {"certificate": certificate, "key": key, "client_ca": ca}
    path = tmp_path / "service.yaml"
    path.write_text(yaml.safe_dump({"default": {"policy": "static"}, "tls": tls}))
    _, address = service_process("--config", str(path))
    target = f"localhost:{address.rpartition(':')[2]}"
    files = {
        "service_ca_file": ca,
        "service_cert_file": own_certificate,
        "service_key_file": own_key,
    }
    allowed = engines(target, "node-1:4711", **files)
    denied = engines(target, "node-2:4711", **files)
    wait_until(lambda: limit(allowed) == 256)
    wait_until(lambda: denied._client.stats.failures["PERMISSION_DENIED"] > 0)
    assert limit(denied) is None
    assert denied.latest.limits.max_num_seqs == 5


def test_engines_of_one_name_take_turns_ever_more_slowly_and_each_is_told_once(
    service_process, engines, caplog, monkeypatch
):
    logger = logging.getLogger("vllm.batchpilot")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    _, address = service_process("--policy", "static")
    twins = [engines(address, "node-1") for _ in range(2)]
    stats = [twin._client.stats for twin in twins]
    wait_until(lambda: all(s.failures["ABORTED"] >= 4 and s.leases["accepted"] for s in stats))
    for twin in twins:
        twin.close()
    # Not one stream of theirs was taken for a success, after which the waits begin anew.
    assert [twin._client._backoff._attempts for twin in twins] == [
        s.failures.total() for s in stats
    ]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    replaced = [w for w in warnings if "a new session of default/node-1/0 has replaced" in w]
    # Once each; and once more after each other failure, such as silence on a busy machine.
    assert 2 <= len(replaced) <= len(warnings) <= 2 + 2 * (len(warnings) - len(replaced))
    assert all(w.endswith("give each a service_engine of its own") for w in replaced)


def test_a_policy_that_learns_lengths_is_told_every_step(service_process, engines):
    _, address = service_process("--policy", "memory-peak")
    engine = engines(address, "node-1")
    wait_until(lambda: limit(engine) is not None)
    assert engine.latest.reason
