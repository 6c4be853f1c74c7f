from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bench_engine import QueueEngine

from batchpilot.__main__ import main
from batchpilot.agents.catalog import POLICIES
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench import cli
from batchpilot.env.bench.plan import prepare
from batchpilot.env.bench.settings import BenchSettings
from batchpilot.env.profiles import load_profile, profile_to_text
from batchpilot.env.workloads import WorkloadSpec, read_spec

BASE = ["bench", "--engine", "live", "--model", "tiny", "--workload"]
SMALL = [*BASE, "fixed:prompt_tokens=2:output_tokens=5", "--num-requests", "4", "--rounds", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, where models are kept too."""
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def engine(monkeypatch):
    """The bench gets this engine instead of a live one."""
    queue = QueueEngine(total_blocks=1000)
    monkeypatch.setattr(cli, "open_engine", lambda plan: queue)
    return queue


@pytest.fixture
def no_engine(monkeypatch):
    """The bench must not get as far as starting one."""

    def start(plan):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(cli, "open_engine", start)


def test_a_bench_prints_tables_and_writes_both_files(engine, folder, capsys):
    assert main([*SMALL, "--policies", "static,watermark:0.05", "--itl-slo-ms", "20"]) == 0
    assert sorted(os.listdir(folder)) == ["report.html", "results.json"]
    results = json.loads((folder / "results.json").read_text())
    assert [run["policy"] for run in results["runs"]] == [
        "static",
        "watermark:0.05",
        "watermark:0.05",
        "static",
    ]
    assert [run["seed"] for run in results["runs"]] == [0, 0, 1, 1]
    assert all(run["completed"] == 4 and run["output_tokens"] == 20 for run in results["runs"])
    assert results["workload"]["name"] == "fixed:prompt_tokens=2:output_tokens=5"
    assert results["workload"]["arrivals"] == "saturated"
    assert results["config"]["itl_slo_ms"] == 20.0
    printed = capsys.readouterr()
    assert "watermark:0.05" in printed.out
    assert "[4/4] round 2/2 static: 4/4 requests, 400 tok/s" in printed.err
    assert engine.closed


def test_a_csv_file_is_replayed_at_its_own_times(engine, folder):
    Path("trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,2,5\n3,2,5\n")
    words = ["--rounds", "1", "--rate-scale", "2", "--policies", "static", "--plot", "p.svg"]
    assert main([*BASE, "trace.csv", *words]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["workload"]["name"] == "trace.csv"
    assert results["workload"]["arrivals"] == "trace"
    assert results["runs"][0]["duration_s"] == pytest.approx(1.5 + 0.05)
    assert (folder / "p.svg").read_text().startswith("<?xml")


def test_an_interrupt_writes_nothing_and_closes_the_engine(engine, folder, capsys):
    engine.interrupt_at_step = 12
    assert main([*SMALL, "--policies", "static"]) == 130
    assert os.listdir(folder) == []
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert engine.closed
    assert not engine.has_unfinished_requests()


def test_a_stalled_engine_is_reported(engine, folder, capsys):
    engine.stalled = True
    assert main([*SMALL, "--policies", "static"]) == 1
    assert "made no progress" in capsys.readouterr().err
    assert os.listdir(folder) == []
    assert engine.closed


def test_a_report_that_fails_does_not_lose_the_numbers(engine, folder, monkeypatch):
    def fail(results):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "render_report", fail)
    with pytest.raises(ZeroDivisionError):
        main([*SMALL, "--policies", "static"])
    assert json.loads((folder / "results.json").read_text())["schema"] == 1


def test_a_reader_that_has_seen_enough_loses_nobody_the_results(engine, folder, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe, contextlib.suppress(SystemExit):
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main([*SMALL, "--policies", "static"]) != 0
    assert sorted(os.listdir(folder)) == ["report.html", "results.json"]


def test_files_that_cannot_be_written_in_the_end_leave_the_tables(engine, capsys, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "write_whole", fail)
    assert main([*SMALL, "--policies", "static"]) == 1
    printed = capsys.readouterr()
    assert "cannot write the results: No space left on device" in printed.err
    assert "tokens/s" in printed.out


def test_a_workload_file_s_own_arrivals_and_rate_are_reported(engine, folder):
    Path("w.yaml").write_text(
        "workload: {fixed: {prompt_tokens: 2, output_tokens: 5}}\n"
        "arrivals: poisson:50\nrate_scale: 2\nnum_requests: 4\n"
    )
    assert main([*BASE, "w.yaml", "--rate-scale", "3", "--policies", "static"]) == 0
    workload = json.loads((folder / "results.json").read_text())["workload"]
    assert workload["name"] == "fixed:prompt_tokens=2:output_tokens=5"
    assert (workload["arrivals"], workload["rate_scale"]) == ("poisson:50", 6.0)


def test_a_workload_file_s_own_rate_scale_needs_a_rate_too(no_engine, capsys):
    Path("w.yaml").write_text("workload: chat\nrate_scale: 2\n")
    assert main([*BASE, "w.yaml", "--policies", "static"]) == 2
    assert "rate_scale=2 multiplies a rate" in capsys.readouterr().err


def test_a_capacity_is_searched_only_where_a_rate_can_be_scaled(no_engine, capsys):
    words = ["--find-capacity", "--ttft-slo-ms", "500", "--policies", "static"]
    Path("w.yaml").write_text("workload: chat\narrivals: saturated\n")
    assert main([*BASE, "w.yaml", *words]) == 2
    assert "arrivals='saturated' of workload 'w.yaml' has none" in capsys.readouterr().err


@pytest.mark.parametrize("workload", ["chat", "w.yaml", "w.csv"])
def test_where_nobody_says_when_requests_arrive_a_capacity_scales_a_poisson_process(workload):
    Path("w.yaml").write_text("workload: chat\n")
    Path("w.csv").write_text(f"{HEADER}0,2,5\n0,2,5\n")
    settings = BenchSettings(
        model="tiny", workload=workload, find_capacity=True, itl_slo_ms=50.0, kv_blocks=0
    )
    assert prepare(settings).workload_to_json()["arrivals"] == "poisson:1"


HEADER = "arrival_s,input_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "magic"], "unknown policy 'magic'; known: static"),
        (["--policies", "static:speed=9"], "unknown key 'speed'"),
        (["--policies", "sla"], "itl_slo_ms is required"),
        (["--shadow", "watermark:0.05"], "shadow='watermark:0.05': a shadow decides limits"),
        (["--itl-slo-ms", "0"], "itl_slo_ms=0.0 must be greater than 0"),
        (["--itl-slo-ms=-5"], "itl_slo_ms=-5.0 must be greater than 0"),
        (["--ttft-slo-ms", "nan"], "ttft_slo_ms='nan' is not a finite number"),
        (["--rate-scale", "0"], "rate_scale=0.0 must be greater than 0"),
        (["--rate-scale", "2"], "rate_scale=2 multiplies a rate, and arrivals='saturated' of"),
        (["--rate-scale", "2", "--arrivals", "saturated"], "rate_scale=2 multiplies a rate"),
        (["--num-requests", "0"], "num_requests=0 must be at least 1"),
        (["--num-requests", "2.5"], "num_requests='2.5' is not a whole number"),
        (["--rounds", "0"], "rounds=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--kv-blocks", "1"], "kv_blocks=1 must be at least 2"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "32"], "must be at least"),
        (["--model", "missing"], "no model 'missing'; known: smollm2-135m, tiny"),
        (["--arrivals", "poisson:0"], "rate=0.0 must be greater than 0"),
        (["--arrivals", "trace"], "arrivals 'trace' needs a workload from a trace"),
        (["--workload", "missing.csv"], "cannot read workload file missing.csv"),
        (["--workload", "fixed:prompt_tokens=-1:output_tokens=5"], "prompt_tokens=-1"),
        (
            ["--workload", "fixed:prompt_tokens=9000:output_tokens=5"],
            "9000 prompt + 5 output tokens are more than the 4096 that the model",
        ),
        (
            ["--workload", "fixed:prompt_tokens=90:output_tokens=5", "--kv-blocks", "3"],
            "90 prompt + 5 output tokens are more than the 64",
        ),
        (["--json", "."], "cannot write .: it is a folder"),
        (["--html", "/proc/no/report.html"], "cannot write /proc/no/report.html"),
        (["--json", "-"], "json='-' would be a file of that name"),
        (["--html", "-"], "html='-' would be a file of that name"),
        (["--json", "a", "--html", "./a"], "a is named twice"),
        (["--plot", "plot.jpg"], "plot='plot.jpg' must end in .svg or .png"),
    ],
)
def test_bad_input_is_one_line_and_nothing_starts(words, message, no_engine, folder, capsys):
    assert main([*SMALL, "--policies", "static", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("batchpilot bench: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "trace.csv is empty"),
        ("arrival_s,input_tokens\n0,1\n", "output_tokens"),
        (HEADER, "no requests"),
        (HEADER + "0,1,5\n1,x,5\n", "trace.csv line 3: input_tokens='x'"),
        (HEADER + "0,-4,5\n", "trace.csv line 2: input_tokens=-4"),
        (HEADER + "nan,4,5\n", "trace.csv line 2: arrival_s='nan'"),
        (HEADER + "0,4,5\n1,5000,5\n", "line 3: 5000 prompt + 5 output tokens"),
    ],
)
def test_bad_files_are_named_with_their_line(content, message, no_engine, capsys):
    Path("trace.csv").write_text(content)
    assert main([*BASE, "trace.csv", "--policies", "static"]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(".") == ["trace.csv"]


def test_the_workload_is_never_overwritten(no_engine, capsys):
    Path("trace.csv").write_text(HEADER + "0,4,5\n")
    assert main([*BASE, "trace.csv", "--json", "./trace.csv"]) == 2
    assert "named twice" in capsys.readouterr().err
    assert Path("trace.csv").read_text() == HEADER + "0,4,5\n"


@pytest.mark.parametrize(
    ("workload", "output"),
    [
        ("w.yaml", ["--json", "trace.csv"]),
        ("w.yaml", ["--html", "./w.yaml"]),
        ("trace:trace.csv:start_s=0", ["--json", "trace.csv"]),
        ("trace:trace.csv:start_s=0", ["--json", "link.csv"]),
        ("chat,empirical:trace.csv@60", ["--html", "../work/trace.csv"]),
    ],
)
def test_no_file_that_a_workload_is_read_from_is_overwritten(workload, output, no_engine, capsys):
    Path("trace.csv").write_text(HEADER + "0,4,5\n")
    Path("w.yaml").write_text("workload: trace.csv\n")
    Path("link.csv").symlink_to("trace.csv")
    assert main([*BASE, workload, "--policies", "static", *output]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is read by this bench" in line or "is named twice" in line
    assert Path("trace.csv").read_text() == HEADER + "0,4,5\n"


def test_a_profile_is_not_overwritten(folder, capsys):
    profile = profile_to_text(load_profile("llama-3.1-8b-h100"))
    Path("prof.json").write_text(profile)
    words = ["bench", "--engine", "virtual", "--profile", "prof.json", "--num-requests", "4"]
    assert main([*words, "--json", str(folder / "prof.json")]) == 2
    assert "prof.json is read by this bench" in capsys.readouterr().err
    assert Path("prof.json").read_text() == profile


def test_an_unknown_option_or_engine_is_bad_input(capsys):
    for words in (["bench", "--speed", "9"], ["bench", "--engine", "steam"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in (*POLICIES, "watermark:SHARE", "examples:", "- TTFT:", "(default: 2048)"):
        assert name in text


def test_help_says_which_files_a_workload_may_be_and_where_runs_are_kept(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--workload NAME|CSV|YAML" in text
    assert "(default: bench in $BATCHPILOT_CACHE, or in ~/.cache/batchpilot" in text


def test_the_workload_file_that_help_shows_can_be_read():
    _, _, content = cli.WORKLOAD_FILE.partition("\n")
    Path("workload.yaml").write_text(textwrap.dedent(content))
    assert len(content.splitlines()) == 6
    spec = read_spec(WorkloadSpec("workload.yaml"))
    assert spec.workload == "chat:output_max=400,lognormal:prompt_mean=1000:output_mean=50@60"
    assert len(spec.build().requests) == 500


def test_the_command_line_gives_the_same_settings_again():
    settings = BenchSettings(policies="static,watermark:0.05", itl_slo_ms="50", json="a b.json")
    words = shlex.split(settings.command())
    assert words[:4] == ["batchpilot", "bench", "--engine", "live"]
    pairs = dict(zip(words[2::2], words[3::2], strict=True))
    read = {key.removeprefix("--").replace("-", "_"): value for key, value in pairs.items()}
    assert BenchSettings(**read) == settings


def test_settings_are_checked_from_python_too():
    with pytest.raises(ConfigError, match="engine='steam' is not one of: live"):
        BenchSettings(engine="steam")


@pytest.mark.live
def test_a_real_engine_end_to_end(folder, capsys):
    words = ["--policies", "static:max_num_seqs=2,watermark:0.1", "--num-requests", "6"]
    lengths = "fixed:prompt_tokens=20:output_tokens=12"
    files = ["--json", "out/r.json", "--html", "out/r.html", "--plot", "out/p.png"]
    assert main([*BASE, lengths, *words, "--rounds", "2", "--ttft-slo-ms", "60000", *files]) == 0
    results = json.loads((folder / "out" / "r.json").read_text())
    assert len(results["runs"]) == 4
    for run in results["runs"]:
        assert (run["completed"], run["failed"], run["output_tokens"]) == (6, 0, 72)
        assert run["slo_attainment"] == 1.0
        assert run["itl_ms"]["p50"] > 0
        steered = run["policy"].startswith("static")
        assert run["peak_running"] == (2 if steered else 6)
        assert set(run["timeline"]["max_num_seqs"]) == {2 if steered else 128}
    assert sorted(os.listdir(folder / "out")) == ["p.png", "r.html", "r.json"]


CAPACITY = [
    *("--find-capacity", "--attainment", "0.9", "--arrivals", "poisson:4"),
    *("--policies", "static,static:max_num_seqs=2", "--num-requests", "20"),
]


def check_capacity(folder, printed):
    results = json.loads((folder / "results.json").read_text())
    assert [found["policy"] for found in results["capacity"]] == ["static", "static:max_num_seqs=2"]
    for found in results["capacity"]:
        assert found["rate_per_s"] > 0
        assert found["attainment"] >= 0.9
        assert len(found["points"]) > 2
    assert "Capacity: the highest rate" in printed.out
    assert "inside the targets at" in printed.err
    assert "<h2>Capacity</h2>" in (folder / "report.html").read_text()


def test_the_capacity_of_an_engine_in_this_process_is_searched_after_a_warm_up(
    engine, folder, capsys
):
    lengths = "fixed:prompt_tokens=20:output_tokens=20"
    assert main([*BASE, lengths, *CAPACITY, "--ttft-slo-ms", "500"]) == 0
    printed = capsys.readouterr()
    check_capacity(folder, printed)
    assert "warm-up" in printed.err


@pytest.mark.live
@pytest.mark.slow  # on a busy machine the search goes down to rates whose requests take minutes
def test_the_capacity_of_a_real_engine(folder, capsys):
    lengths = "fixed:prompt_tokens=32:output_tokens=16"
    targets = ["--itl-slo-ms", "500", "--ttft-slo-ms", "500", "--max-num-seqs", "8"]
    assert main([*BASE, lengths, *CAPACITY, *targets]) == 0
    check_capacity(folder, capsys.readouterr())


@pytest.mark.live
def test_ctrl_c_stops_a_real_engine(folder):
    lengths = "fixed:prompt_tokens=20:output_tokens=200"
    words = [*BASE, lengths, "--num-requests", "200", "--policies", "static"]
    command = [sys.executable, "-m", "batchpilot", *words]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as bench:
        lines = iter(bench.stderr.readline, "")
        assert any("tok/s" in line for line in lines)
        bench.send_signal(signal.SIGINT)
        rest = bench.stderr.read()
        assert bench.wait(timeout=60) == 130
    assert "interrupted; nothing was written" in rest
    assert "Traceback" not in rest
    assert os.listdir(folder) == []
