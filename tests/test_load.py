"""The load generator: a small fleet against a real service process."""

import asyncio
import json

import pytest

from batchpilot.service import load, load_stream
from batchpilot.service.process_meter import ServiceProcess


def test_every_engine_reports_at_its_rate_and_always_has_a_lease(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["--engines", "8", "--seconds", "3", "--policy", "memory", "--json", str(figures)]
    assert load.main(arguments) == 0
    (result,) = json.loads(figures.read_text())
    assert result["load"]["engines"] == 8
    assert 8 * 4 * 3 - 24 <= result["reports"] <= 8 * 4 * 3 + 8  # the last ones may be late
    assert (result["errors"], result["expired"]) == (0, 0)
    assert 1 / 8 <= result["answered"] < 1
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["worst_ms"]
    assert 10 < result["service_rss_mib"] < 500
    assert "engines  reports/s" in capsys.readouterr().out


def test_a_service_that_is_not_there_is_an_error_of_every_stream():
    with ServiceProcess("memory") as service:
        fleet = load.Fleet("127.0.0.1:1", load.Load(3, 4.0, 0.2, "memory"))
        result = asyncio.run(fleet.run(service))
    assert fleet.tally.errors == {"ConnectionRefusedError": 3}
    assert (result.errors, result.reports) == (3, 0)


def test_a_stream_that_the_service_ends_is_an_error(tmp_path):
    config = tmp_path / "service.yaml"
    config.write_text("limits: {reports_per_second: 1, report_burst: 9}\n")
    with ServiceProcess("memory", "--config", str(config)) as service:
        fleet = load.Fleet(service.target, load.Load(2, 8.0, 2.0, "memory"))
        result = asyncio.run(fleet.run(service))
        assert "too_many_reports" in service.log() or "reports come faster" in service.log()
    assert fleet.tally.errors == {"TRAILERS": 2}
    assert result.errors == 2


@pytest.fixture
def engine():
    """An engine on a stream that leads nowhere, and what it sent."""

    async def build():
        fleet = load.Fleet("localhost:1", load.Load(1, 4.0, 10.0, "memory"))
        fleet._begins_at, fleet._ends_at = 100.0, 110.0
        return load.Engine(0, fleet)

    return asyncio.run(build())


def answer(sequence, lease_ms=2000):
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 64}
    lease = {"sequence": sequence, "limits": limits, "lease_ms": lease_ms}
    return load.pb.TuneResponse(lease=lease).SerializeToString()


def test_latencies_are_counted_from_when_a_report_was_due(engine):
    engine._sent.extend([(1, 99.9), (2, 100.5), (3, 101.0), (4, 102.0)])
    for sequence, now in ((1, 100.1), (3, 101.5), (4, 102.25)):  # 2 goes unanswered
        engine._loop = Clock(now)
        engine._heard(answer(sequence))
    tally = engine._fleet.tally
    assert tally.latencies == pytest.approx([0.5, 0.25])  # 1 was due before the measured time
    assert (tally.expired, tally.wrong) == (0, 0)
    engine._heard(answer(4))  # once more
    engine._heard(answer(9))  # never sent
    assert tally.wrong == 2


def test_a_lease_that_ends_before_the_next_one_comes_was_dropped(engine):
    engine._sent.extend([(1, 100.0), (2, 101.0)])
    for sequence, now in ((1, 100.1), (2, 102.0)):
        engine._loop = Clock(now)
        engine._heard(answer(sequence))
    assert engine._fleet.tally.expired == 1
    engine._loop = Clock(103.0)
    engine.close()
    assert engine._fleet.tally.expired == 2


class Clock:
    """A loop that is always at one time."""

    def __init__(self, now):
        self._now = now

    def time(self):
        return self._now


def test_a_message_in_pieces_is_heard_whole_and_pings_are_answered():
    heard, ended, wire = [], [], Transport()
    stream = load_stream.LoadStream("localhost:1", "/a/B", heard.append, ended.append)
    stream.connection_made(wire)
    assert wire.sent.startswith(load_stream.PREFACE)
    wire.sent = b""
    message = b"\x00" + (300).to_bytes(4, "big") + b"m" * 300
    frames = load_stream.frame(load_stream.DATA, 0, 1, message[:200])
    frames += load_stream.frame(load_stream.PING, 0, 0, b"12345678")
    frames += load_stream.frame(load_stream.DATA, 0, 1, message[200:])
    for at in range(0, len(frames), 7):
        stream.data_received(frames[at : at + 7])
    assert heard == [b"m" * 300]
    assert wire.sent == load_stream.frame(load_stream.PING, load_stream.ACK, 0, b"12345678")
    stream.data_received(load_stream.frame(load_stream.GOAWAY, 0, 0, b"\0" * 8))
    assert ended == ["GOAWAY"]
    assert not stream.is_open


def test_no_more_is_sent_than_the_service_has_room_for():
    wire = Transport()
    stream = load_stream.LoadStream("localhost:1", "/a/B", print, print)
    stream.connection_made(wire)
    wire.sent = b""
    for _ in range(3):
        stream.send(b"x" * 30_000)
    assert len(wire.sent) == 2 * (30_000 + 5 + 9)
    more = (100_000).to_bytes(4, "big")
    stream.data_received(load_stream.frame(load_stream.WINDOW_UPDATE, 0, 0, more))
    assert len(wire.sent) == 2 * (30_000 + 5 + 9)
    stream.data_received(load_stream.frame(load_stream.WINDOW_UPDATE, 0, 1, more))
    assert len(wire.sent) == 3 * (30_000 + 5 + 9)


class Transport:
    """Keeps what is written to it."""

    def __init__(self):
        self.sent = b""

    def write(self, data):
        self.sent += data


def test_a_service_that_cannot_start_says_why():
    service = ServiceProcess("no-such-policy")
    with pytest.raises(RuntimeError, match="unknown policy 'no-such-policy'"):
        service.start()
