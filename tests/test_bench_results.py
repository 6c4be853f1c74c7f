from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_engine import QueueEngine
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.capacity import Capacity
from batchpilot.env.bench.contestants import parse_contestants
from batchpilot.env.bench.environment import cpu_model, read_environment
from batchpilot.env.bench.measure import Sample, Slo
from batchpilot.env.bench.results import (
    BenchResults,
    check_writable,
    thin,
    to_json_text,
    write_whole,
)
from batchpilot.env.bench.runner import Round, TimedRequest, run_bench
from batchpilot.env.bench.summary import Spread, headline, number, percent, summarise
from batchpilot.env.engine import EngineRequest

RUN_KEYS = {
    "policy",
    "round",
    "seed",
    "submitted",
    "completed",
    "failed",
    "duration_s",
    "output_tokens",
    "output_tokens_per_s",
    "preemptions",
    "recomputed_tokens",
    "itl_ms",
    "tpot_ms",
    "ttft_ms",
    "slo_attainment",
    "goodput_per_s",
    "mean_running",
    "peak_running",
    "timeline",
}


class Quiet:
    def run_started(self, policy, round_index, requests):
        pass

    def advanced(self, ended, tokens_per_s, sample):
        pass

    def run_finished(self, run):
        pass


def bench(policies="static:max_num_seqs=2,static:max_num_seqs=4", slo=None, rounds=2, refuse=()):
    engine = QueueEngine(total_blocks=1000)
    engine.refuse = set(refuse)
    requests = tuple(TimedRequest(0.0, EngineRequest(f"r{i}", [1, 2], 10)) for i in range(8))
    plan = [Round(n + 1, n, requests) for n in range(rounds)]
    runs = run_bench(engine, parse_contestants(policies, {}), plan, slo or Slo(), Quiet())
    return BenchResults(
        engine="live",
        model="tiny",
        workload={"name": "eight", "prompt_tokens": {"mean": 2.0}},
        config={"itl_slo_ms": slo and slo.itl_slo_ms, "ttft_slo_ms": slo and slo.ttft_slo_ms},
        environment=read_environment(),
        command="batchpilot bench --engine live",
        runs=tuple(runs),
    )


def test_the_schema():
    read = json.loads(to_json_text(bench(slo=Slo(itl_slo_ms=15.0))))
    assert read["schema"] == 1
    assert set(read) == {
        "schema",
        "engine",
        "model",
        "workload",
        "config",
        "environment",
        "command",
        "runs",
    }
    assert len(read["runs"]) == 4
    for run in read["runs"]:
        assert set(run) == RUN_KEYS
        for name in ("itl_ms", "tpot_ms", "ttft_ms"):
            assert list(run[name]) == ["mean", "p50", "p95", "p99"]
    first = read["runs"][0]
    # Eight requests, two at a time, ten steps of 10 ms each.
    assert first["duration_s"] == pytest.approx(0.4)
    assert first["output_tokens_per_s"] == pytest.approx(200.0)
    assert first["slo_attainment"] == 1.0
    assert first["goodput_per_s"] == pytest.approx(20.0)
    assert first["ttft_ms"]["mean"] == pytest.approx((10 + 110 + 210 + 310) / 4)


def test_without_targets_attainment_is_null_and_missing_numbers_are_too():
    results = bench(refuse=[f"r{i}" for i in range(8)])
    run = json.loads(to_json_text(results))["runs"][0]
    assert run["failed"] == 8
    assert run["slo_attainment"] is None
    assert run["itl_ms"] == {"mean": None, "p50": None, "p95": None, "p99": None}


def test_a_timeline_is_thinned_to_its_last_moment():
    limits = BatchLimits(8, 64)
    samples = [Sample(i * 0.01, i, 0, limits, 0.5, i // 7) for i in range(5000)]
    kept = thin(samples, 400)
    assert 390 <= len(kept) <= 400
    assert kept[0] == samples[0]
    assert kept[-1] == samples[-1]
    assert thin(samples[:400], 400) == samples[:400]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(2, 50))
def test_thinning_keeps_order_and_invents_nothing(times, points):
    samples = [Sample(time, 0, 0, BatchLimits(1, 1), 0.0, 0) for time in sorted(times)]
    kept = thin(samples, points)
    assert len(kept) <= max(points, 1) or len(kept) == len(samples)
    assert kept == sorted(kept, key=lambda sample: sample.seconds)
    assert kept[-1] == samples[-1]
    assert set(kept) <= set(samples)


def test_a_summary_by_hand():
    first, second = summarise(bench(slo=Slo(ttft_slo_ms=150.0)))
    assert (first.policy, first.submitted, first.failed) == ("static:max_num_seqs=2", 16, 0)
    assert first.ratio == 1.0
    assert second.ratio == pytest.approx(2.0)
    assert (second.least_limit, second.greatest_limit, second.peak_running) == (4, 4, 4)
    assert first.slo_attainment == Spread(0.5, 0.5, 0.5)
    assert second.slo_attainment == Spread(1.0, 1.0, 1.0)
    assert first.latencies["ITL"]["p99"].median == pytest.approx(10.0)


ALIKE = " One run each: nothing differs between the rounds, so there is no spread to judge that by."


def test_the_headline_claims_only_what_was_seen():
    assert headline(summarise(differing(bench()))) == (
        "static:max_num_seqs=4: 400 tokens/s with 0 preemptions, against "
        "200 tokens/s with 0 preemptions for static:max_num_seqs=2."
    )
    reversed_order = differing(bench("static:max_num_seqs=4,static:max_num_seqs=2"))
    assert headline(summarise(reversed_order)) == (
        "No policy gave more than static:max_num_seqs=4: 400 tokens/s with 0 preemptions."
    )
    assert headline(summarise(differing(bench(slo=Slo(ttft_slo_ms=150.0))))) == (
        "static:max_num_seqs=4: 40.0 requests/s inside the targets (100.0% of all), against "
        "10.0 requests/s inside the targets (50.0% of all) for static:max_num_seqs=2."
    )
    once = headline(summarise(bench(rounds=1)))
    assert once.endswith("One round has no spread to judge that by.")
    alone = bench("static:max_num_seqs=2", refuse=[f"r{i}" for i in range(8)])
    assert headline(summarise(alone)).startswith("static:max_num_seqs=2: 0 tokens/s")


def differing(results):
    """The same with a latency that is another in each round."""
    runs = [
        replace(run, measurement=replace(run.measurement, ttft_ms=np.array([float(run.round)])))
        for run in results.runs
    ]
    return replace(results, runs=tuple(runs))


def test_rounds_that_came_out_alike_are_one_run():
    assert headline(summarise(bench())) == (
        "static:max_num_seqs=4: 400 tokens/s with 0 preemptions, against "
        f"200 tokens/s with 0 preemptions for static:max_num_seqs=2.{ALIKE}"
    )
    reversed_order = bench("static:max_num_seqs=4,static:max_num_seqs=2")
    assert headline(summarise(reversed_order)).endswith(ALIKE)


def capacity(policy, rate, is_bounded=True):
    return Capacity(policy, rate, 0.99, 60.0, (), is_bounded)


@pytest.mark.parametrize(
    ("capacities", "text"),
    [
        ([capacity("a", 7.3)], "a keeps the targets up to 7.30 requests/s."),
        (
            [capacity("a", 7.3), capacity("b", 20.9)],
            "b keeps the targets up to 20.9 requests/s, against 7.30 requests/s for a.",
        ),
        (
            [capacity("a", 7.3), capacity("b", 20.9, is_bounded=False)],
            "b keeps the targets up to 20.9 requests/s or more, against 7.30 requests/s for a.",
        ),
        (
            [capacity("a", 20.9), capacity("b", 7.3)],
            "No policy keeps the targets at a higher rate than a: up to 20.9 requests/s.",
        ),
        (
            [capacity("a", 10.0), capacity("b", 10.1)],
            "b keeps the targets up to 10.1 requests/s, against 10 requests/s for a. "
            "The search tells no closer than 2%: read no winner from it.",
        ),
        ([capacity("a", 0.0), capacity("b", 0.0)], "No policy kept the targets at any rate tried."),
    ],
)
def test_where_capacities_were_searched_for_the_headline_compares_them(capacities, text):
    assert headline(summarise(bench(slo=Slo(itl_slo_ms=15.0))), capacities) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (3.0, "3"),
        (0.0, "0"),
        (0.004, "0.00400"),
        (0.0371, "0.0371"),
        (-0.12345, "-0.123"),
        (0.5, "0.500"),
        (0.934, "0.934"),
        (0.9996, "1.00"),
        (1.234, "1.23"),
        (9.999, "10.0"),
        (87.42, "87.4"),
        (99.99, "100"),
        (6390.4, "6,390"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_percent():
    assert percent(0.9167) == "91.7%"
    assert percent(None) == "-"


def test_a_file_is_written_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    write_whole(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert os.listdir(tmp_path) == ["results.json"]
    assert path.stat().st_mode & 0o077 == 0o066 & ~_umask()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "results.json"
    link.symlink_to(tmp_path / "there" / "real.json")
    write_whole(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "there" / "real.json").read_text() == "new"


def test_a_folder_to_write_in_is_made_and_nothing_else(tmp_path):
    check_writable(tmp_path / "a" / "b" / "results.json")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_files_that_cannot_be_written_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(ConfigError, match="Not a directory|File exists"):
        check_writable(file / "results.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        check_writable(Path("/dev/null"))
    with pytest.raises(ConfigError, match="cannot write /proc/nothing/results.json"):
        check_writable(Path("/proc/nothing/results.json"))


def test_a_read_only_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("mine")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="permission denied"):
        check_writable(path)


def test_the_environment_names_no_host_and_no_user():
    environment = read_environment()
    assert set(environment) == {
        "batchpilot",
        "vllm",
        "torch",
        "python",
        "platform",
        "cpu",
        "cores",
    }
    text = json.dumps(environment)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert environment["vllm"]
    assert environment["cores"] >= 1


def test_the_processor_is_read_from_the_kernel(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A Fine CPU @ 2 GHz\nflags\t: x\n")
    assert cpu_model(cpuinfo) == "A Fine CPU @ 2 GHz"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
