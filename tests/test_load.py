"""The load generator: a small fleet against a real service process."""

import asyncio
import json

import pytest

from batchpilot.service import load
from batchpilot.service.process_meter import ServiceProcess, free_port


def test_every_engine_reports_at_its_rate_and_every_report_is_answered(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["--engines", "8", "--seconds", "3", "--policy", "memory", "--json", str(figures)]
    assert load.main(arguments) == 0
    (result,) = json.loads(figures.read_text())
    assert result["load"]["engines"] == 8
    assert result["reports"] == pytest.approx(8 * 4 * 3, abs=8)
    assert (result["errors"], result["expired"]) == (0, 0)
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["worst_ms"]
    assert 10 < result["service_rss_mib"] < 500
    assert "engines  reports/s" in capsys.readouterr().out


def test_a_stream_that_ends_is_an_error():
    with ServiceProcess("memory") as service:
        fleet = load.Fleet(f"localhost:{free_port()}", load.Load(3, 4.0, 0.2, "memory"))
        result = asyncio.run(fleet.run(service))
    assert fleet.tally.errors == {"UNAVAILABLE": 3}
    assert (result.errors, result.reports) == (3, 0)


def test_latencies_are_counted_from_when_a_report_was_due():
    fleet = load.Fleet("localhost:1", load.Load(1, 4.0, 1.0, "memory"))
    fleet._begins_at = 100.0
    answer = load.pb.TuneResponse(lease={"sequence": 7, "limits": {"max_num_seqs": 3}})
    fleet._note(answer, 7, due=99.9, now=100.5)  # before the measured time
    fleet._note(answer, 7, due=101.0, now=101.5)
    fleet._note(answer, 7, due=101.0, now=103.5)
    fleet._note(answer, 8, due=101.0, now=101.1)
    assert fleet.tally.latencies == pytest.approx([0.5, 2.5, 0.1])
    assert (fleet.tally.expired, fleet.tally.wrong) == (1, 1)


def test_a_service_that_cannot_start_says_why():
    service = ServiceProcess("no-such-policy")
    with pytest.raises(RuntimeError, match="unknown policy 'no-such-policy'"):
        service.start()
