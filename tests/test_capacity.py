from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import constant, write

from batchpilot.__main__ import main
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.capacity import TOLERANCE, Point, best_of, search
from batchpilot.env.bench.cells import Cell, bench_cells, open_cells, run_cells
from batchpilot.env.bench.contestants import parse_contestants
from batchpilot.env.bench.measure import RunMeasurement, Sample
from batchpilot.env.bench.plan import prepare
from batchpilot.env.bench.runner import EngineStalledError
from batchpilot.env.bench.settings import BenchSettings
from batchpilot.env.bench.store import RunStore, digest


def drive(attain, target=0.99, start=1.0):
    steps = search(target, start)
    rate = next(steps)
    while True:
        try:
            rate = steps.send(attain(rate))
        except StopIteration as end:
            return end.value


@given(edge=st.floats(0.01, 500), start=st.floats(0.1, 10))
def test_the_edge_is_found_to_two_per_cent(edge, start):
    points = drive(lambda rate: 1.0 if rate <= edge else 0.5, start=start)
    best = best_of(points, 0.99)
    assert edge / (1 + TOLERANCE) <= best.rate <= edge
    assert len(points) < 30


def test_doubles_then_bisects():
    points = drive(lambda rate: 1.0 if rate <= 5 else 0.0)
    assert [point.rate for point in points[:6]] == pytest.approx(
        [1, 2, 4, 8, 32**0.5, 22.6274**0.5]
    )


def test_a_policy_that_keeps_no_rate_has_none():
    points = drive(lambda rate: 0.0)
    assert best_of(points, 0.99) is None
    assert min(points).rate == 2**-14


def test_a_policy_that_keeps_every_rate_is_unbounded():
    points = drive(lambda rate: 1.0)
    assert best_of(points, 0.99).rate == 2**14


def test_a_rate_above_one_that_was_lost_does_not_count():
    points = (Point(1, 1.0), Point(2, 0.9), Point(3, 1.0))
    assert best_of(points, 0.99) == Point(1, 1.0)


VIRTUAL = ["bench", "--engine", "virtual", "--profile", "llama-3.1-8b-rtx4090", "--workers", "1"]
VIRTUAL_SETTINGS = {"engine": "virtual", "profile": "llama-3.1-8b-rtx4090"}
SMALL = [*VIRTUAL, "--workload", "fixed:prompt_tokens=64:output_tokens=8", "--rounds", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results():
    return json.loads(Path("results.json").read_text())


def test_capacity_is_searched_and_reported(folder, capsys):
    words = ["--find-capacity", "--itl-slo-ms", "30", "--num-requests", "40"]
    # A limit of one serves one after another, so that its capacity is far below the other's.
    policies = ["--policies", "static:max_num_seqs=1,static"]
    assert main([*SMALL, *words, "--ttft-slo-ms", "300", *policies]) == 0
    one, all_ = results()["capacity"]
    assert [one["policy"], all_["policy"]] == ["static:max_num_seqs=1", "static"]
    assert 0.4 < one["rate_per_s"] < 6
    assert all_["rate_per_s"] > 3 * one["rate_per_s"]
    assert one["attainment"] >= 0.99
    lost = [p for p in one["points"] if p["attainment"] < 0.99]
    assert min(p["rate"] for p in lost) <= one["rate_per_s"] * 1.03
    runs = [run for run in results()["runs"] if run["policy"] == one["policy"]]
    assert sum(run["slo_attainment"] for run in runs) / 2 == pytest.approx(one["attainment"])
    printed = capsys.readouterr()
    assert "Capacity: the highest rate" in printed.out
    assert "inside the targets at" in printed.err
    page = Path("report.html").read_text()
    assert "<h2>Capacity</h2>" in page
    claim = "static keeps the targets up to "
    assert claim in page
    assert claim in printed.out


def test_rounds_of_a_trace_on_an_engine_without_noise_are_one_run(folder, capsys):
    Path("t.csv").write_text("arrival_s,input_tokens,output_tokens\n0,64,8\n0.5,64,30\n")
    words = ["--workload", "t.csv", "--noise", "0", "--policies", "static,static:max_num_seqs=1"]
    assert main([*VIRTUAL, *words]) == 0
    alike = "nothing differs between the rounds"
    assert alike in " ".join(capsys.readouterr().out.split())
    assert main([*VIRTUAL, *words, "--noise", "0.1"]) == 0
    assert alike not in " ".join(capsys.readouterr().out.split())


def test_finished_runs_are_taken_up_again(folder, monkeypatch):
    words = ["--policies", "static", "--num-requests", "20", "--work-dir", "kept"]
    assert main([*SMALL, *words]) == 0
    first = results()
    assert len(os.listdir("kept")) == 2

    def fail(*args):
        raise AssertionError("ran again")

    monkeypatch.setattr("batchpilot.env.bench.cells.run_cell", fail)
    assert main([*SMALL, *words]) == 0
    assert results()["runs"] == first["runs"]
    with pytest.raises(AssertionError, match="ran again"):
        main([*SMALL, *words, "--fresh"])
    with pytest.raises(AssertionError, match="ran again"):
        main([*SMALL, *words, "--kv-blocks", "100"])


def test_runs_in_processes_are_the_same_as_here(folder):
    words = ["--policies", "static,memory,memory-peak", "--num-requests", "30", "--kv-blocks", "40"]
    words.append("--fresh")
    assert main([*SMALL, *words]) == 0
    here = results()["runs"]
    assert main([*SMALL, *words, "--workers", "2"]) == 0
    assert results()["runs"] == here


RUN_CELL = "batchpilot.env.bench.cells.run_cell"


@pytest.mark.parametrize("kept", ["file", "file/kept", "/proc/kept"])
def test_a_folder_that_cannot_keep_anything_is_found_before_anything_runs(
    kept, folder, capsys, monkeypatch
):
    (folder / "file").write_text("mine")
    monkeypatch.setattr(RUN_CELL, lambda *_: pytest.fail("a run was started"))
    assert main([*SMALL, "--policies", "static", "--work-dir", kept]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"work_dir={kept!r} is no folder to write in: " in line
    assert (folder / "file").read_text() == "mine"


def test_a_full_disk_loses_no_result_and_is_told_of_once(folder, monkeypatch, caplog):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchpilot.env.bench.store.write_whole", fail)
    words = ["--policies", "static", "--num-requests", "20", "--work-dir", str(folder / "kept")]
    assert main([*SMALL, *words]) == 0
    assert len(results()["runs"]) == 2
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"finished runs cannot be kept in {folder / 'kept'}: No space left")


@pytest.mark.parametrize(
    ("words", "again"),
    [([], "the same command goes on"), (["--fresh"], "the command without --fresh goes on")],
)
def test_an_interrupt_says_which_command_goes_on(words, again, folder, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RUN_CELL, interrupt)
    assert main([*SMALL, "--policies", "static", *words]) == 130
    assert f"finished runs are kept, {again} from there" in capsys.readouterr().err


KILLED = """
import os, signal
from batchpilot.__main__ import main
from batchpilot.env.bench import cells

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

cells.run_cell = killed
if __name__ == "__main__":
    raise SystemExit(main({words!r}))
"""


@pytest.mark.parametrize("searched", [[], ["--find-capacity", "--itl-slo-ms", "30"]])
def test_a_worker_that_is_killed_is_one_line(searched, folder):
    words = [*SMALL, "--workers", "2", "--policies", "static", "--num-requests", "4", *searched]
    # A worker imports the script again, and so gets the same stand-in.
    Path("killed.py").write_text(KILLED.format(words=words))
    bench = subprocess.run(
        [sys.executable, "killed.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert bench.returncode == 1
    assert "Traceback" not in bench.stderr
    assert bench.stderr.splitlines()[-1] == (
        "batchpilot bench: a worker process was killed, perhaps for want of memory (try fewer "
        "--workers); nothing was written; finished runs are kept, the same command goes on from "
        "there"
    )
    assert not Path("results.json").exists()


def test_an_engine_that_stalls_in_this_process_ends_the_bench_at_once(folder, capsys, monkeypatch):
    ran = []

    def stall(*arguments):
        ran.append(arguments)
        raise EngineStalledError("no token in 9 steps")

    monkeypatch.setattr(RUN_CELL, stall)
    assert main([*SMALL, "--policies", "static,memory"]) == 1
    assert "no token in 9 steps; nothing was written" in capsys.readouterr().err
    assert len(ran) == 1


class Noting:
    """Notes what is run and what is shown, in that order."""

    def __init__(self):
        self.seen = []

    def run(self, cell, max_model_len):
        self.seen.append(f"ran {cell.round}")
        return measurement()

    def run_finished(self, run):
        self.seen.append(f"shown {run.round}")


def test_one_worker_shows_each_run_as_it_ends(folder, monkeypatch):
    noting = Noting()
    monkeypatch.setattr(RUN_CELL, noting.run)
    plan = prepare(BenchSettings(**VIRTUAL_SETTINGS, policies="static", rounds=2, workers=1))
    with open_cells(plan) as cells:
        runs = run_cells(cells, bench_cells(plan), noting)
    assert [run.round for run in runs] == [1, 2]
    assert noting.seen == ["ran 1", "shown 1", "ran 2", "shown 2"]


def test_a_shadow_that_was_trained_again_is_run_again(tmp_path):
    names = set()
    for action in (0.0, 0.5):
        shutil.rmtree(tmp_path / "policy", ignore_errors=True)
        write(tmp_path / "policy", constant(action, 0.0))
        shadow = f"learned:{tmp_path / 'policy'}"
        (contestant,) = parse_contestants("static", {}, shadow)
        names.add(Cell(BenchSettings(**VIRTUAL_SETTINGS), contestant, 1).name())
    assert len(names) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "llama-3.1-8b-h100"}, "is a setting of engine 'virtual'"),
        ({"engine": "virtual", "profile": "p", "model": "tiny"}, "is a setting of engine 'live'"),
        ({"engine": "virtual", "profile": "p", "block_size": 16}, "block_size=16"),
        ({"find_capacity": True}, "needs a target"),
        ({"find_capacity": True, "itl_slo_ms": 1, "arrivals": "saturated"}, "has none"),
        ({"attainment": 1.5}, "attainment=1.5"),
        ({"workers": 2}, "workers=2 is a setting of engine 'virtual'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "engine 'virtual' needs a profile: "),
        (["--workload", "?"], "unknown workload '?'; known: chat, "),
        (["--profile", "?", "--workload", "?"], "unknown workload '?'; known: chat, "),
        (["--profile", "?"], "no profile '?'; known: "),
    ],
)
def test_a_profile_is_asked_for_when_the_workload_is_known(words, message, folder, capsys):
    assert main([*VIRTUAL[:3], *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not os.listdir(folder)


def test_a_search_may_start_at_a_rate_scale_where_nobody_says_when_requests_arrive():
    search_ = {"find_capacity": True, "itl_slo_ms": 50.0, "rate_scale": 2.0}
    plan = prepare(BenchSettings(**VIRTUAL_SETTINGS, **search_))
    assert (plan.spec.arrivals, plan.spec.rate_scale) == ("poisson:1", 2.0)


def test_an_unknown_profile_is_one_line(folder, capsys):
    assert main([*VIRTUAL[:3], "--profile", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def measurement():
    limits = BatchLimits(8, 256)
    return RunMeasurement(
        submitted=2,
        completed=1,
        failed=1,
        duration_s=1.5,
        output_tokens=9,
        preemptions=1,
        recomputed_tokens=40,
        itl_ms=np.array([1.0, 2.5]),
        tpot_ms=np.array([1.75]),
        ttft_ms=np.array([]),
        requests_inside_slo=1,
        slo_is_set=True,
        timeline=(Sample(0.1, 2, 1, limits, 0.25, 0), Sample(0.1 + 0.2, 1, 0, limits, 0.5, 1)),
    )


def test_what_is_kept_comes_back_to_the_last_digit(tmp_path):
    store = RunStore(tmp_path / "new" / "folder")
    assert store.load("a") is None
    store.save("a", measurement())
    loaded, saved = store.load("a"), measurement()
    assert loaded.timeline == saved.timeline
    for name in ("itl_ms", "tpot_ms", "ttft_ms"):
        assert getattr(loaded, name).tolist() == getattr(saved, name).tolist()
    for name in ("submitted", "failed", "duration_s", "recomputed_tokens", "slo_is_set"):
        assert getattr(loaded, name) == getattr(saved, name)
        assert type(getattr(loaded, name)) is type(getattr(saved, name))


def test_a_broken_file_is_as_good_as_none(tmp_path, caplog):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 half a file")
    assert RunStore(tmp_path).load("a") is None
    assert "that run is done again" in caplog.text


def test_the_name_of_a_run_hangs_on_every_value():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
