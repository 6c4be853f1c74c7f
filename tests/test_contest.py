"""The contest end to end on a virtual GPU: trials, what is kept of them, and the whole command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bench_engine import QueueEngine
from hypothesis import given
from hypothesis import strategies as st
from policies import constant, write
from rich.console import Console

from batchpilot.env.bench.measure import Slo
from batchpilot.env.bench.runner import TimedRequest, replay
from batchpilot.env.contest import trial as trials
from batchpilot.env.contest.__main__ import main
from batchpilot.env.contest.crew import Crew, open_crew
from batchpilot.env.contest.lineup import contestant
from batchpilot.env.contest.scenario import Scenario
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.trial import OutcomeStore, Trial, run_stored, run_trial
from batchpilot.env.engine import EngineRequest

PROFILE = "llama-3.1-8b-rtx4090"
SCENARIO = Scenario(
    profile=PROFILE,
    workload="fixed:prompt_tokens=256:output_tokens=16",
    label="small",
    slo=Slo(itl_slo_ms=60.0, ttft_slo_ms=500.0),
    arrivals="gamma:rate=8:cv=2",
    num_requests=60,
    rate_per_s=8.0,
)


def trial(label="static", **changes):
    return Trial(SCENARIO, contestant(label), **changes)


class Noting:
    """Notes how many requests were surely lost after each step."""

    def __init__(self, stop_after=None):
        self.lost = []
        self.stop_after = stop_after

    def stepped(self, recorder, step):
        self.lost.append(recorder.surely_outside())
        return len(self.lost) == self.stop_after


def served(arrivals, slo, watcher):
    requests = [
        TimedRequest(at, EngineRequest(f"r{i}", [7], 1 + i % 5)) for i, at in enumerate(arrivals)
    ]
    return replay(QueueEngine(max_num_seqs=2), requests, slo, trials._Silent(), watcher)


@given(
    arrivals=st.lists(st.floats(0, 0.3), min_size=1, max_size=20),
    itl=st.floats(5, 20),
    ttft=st.floats(10, 200),
)
def test_what_is_surely_lost_only_grows_and_ends_at_what_was_lost(arrivals, itl, ttft):
    noting = Noting()
    measured = served(arrivals, Slo(itl, ttft), noting)
    assert noting.lost == sorted(noting.lost)
    assert noting.lost[-1] == measured.submitted - measured.requests_inside_slo


def test_a_watcher_ends_a_run_and_leaves_the_engine_idle():
    measured = served([0.0] * 6, Slo(), Noting(stop_after=3))
    assert measured.submitted == 6
    assert measured.completed < 6
    assert measured.duration_s <= 3 * 0.01 + 1e-9


@pytest.mark.parametrize("rate_scale", [0.5, 4.0])
def test_a_trial_gives_the_same_again_and_giving_up_changes_no_verdict(rate_scale):
    whole = run_trial(trial(rate_scale=rate_scale))
    assert run_trial(trial(rate_scale=rate_scale)) == whole
    asked = run_trial(trial(rate_scale=rate_scale, gives_up_below=0.95))
    assert asked.submitted == whole.submitted == 60
    assert asked.given_up == (whole.attainment < 0.95)
    assert asked.given_up == (rate_scale == 4.0)
    assert asked.inside <= whole.inside


def test_seeds_draw_other_requests():
    assert run_trial(trial(seed=1)) != run_trial(trial())


def test_a_slower_gpu_shows_in_the_phase_it_is_slow_in():
    shifted = trial(phase_starts_s=(0.0, 4.0), rate_scale=0.5)
    same, slow = run_trial(shifted), run_trial(replace(shifted, slow_factor=1.5))
    assert slow.phases[0].submitted == same.phases[0].submitted > 0
    ratio = slow.phases[1].itl_p99_ms / same.phases[1].itl_p99_ms
    assert 1.2 < ratio < 2.0
    assert slow.phases[0].itl_p99_ms == pytest.approx(same.phases[0].itl_p99_ms, rel=0.05)


def test_what_is_kept_answers_only_what_it_can(tmp_path, monkeypatch):
    store = OutcomeStore(tmp_path / "kept")
    lost = trial(rate_scale=4.0, gives_up_below=0.95)
    assert store.load(lost) is None
    given_up = run_stored(lost, store)
    assert store.load(lost) == given_up
    # Another share is asked for: it was given up too early to say, or for certain.
    assert store.load(replace(lost, gives_up_below=0.5)) is None
    assert store.load(replace(lost, gives_up_below=0.99)) == given_up
    assert store.load(replace(lost, gives_up_below=None)) is None
    whole = run_stored(replace(lost, gives_up_below=None), store)
    monkeypatch.setattr(trials, "run_trial", lambda trial: pytest.fail("ran again"))
    assert run_stored(lost, store) == whole  # a whole run answers both
    for path in (tmp_path / "kept").rglob("*.json"):
        path.write_text("{ half a file")
    assert store.load(lost) is None


def test_a_trained_policy_is_known_by_what_its_folder_holds(tmp_path):
    names = set()
    for action in (0.0, 0.5):
        shutil.rmtree(tmp_path / "policy", ignore_errors=True)
        write(tmp_path / "policy", constant(action, 0.0))
        names.add(trial(f"learned:{tmp_path / 'policy'}").name())
    assert len(names) == 2


def test_a_longer_contest_has_more_requests_in_each_run():
    (usual, _), (longer, _) = (
        ContestSettings(length=length, profiles="llama-3.1-8b-h100").slo_scenarios()
        for length in (1.0, 4.0)
    )
    assert longer.num_requests == 4 * usual.num_requests


def test_the_name_of_a_trial_hangs_on_what_decides_it():
    names = {
        trial().name(),
        trial("memory").name(),
        trial(seed=1).name(),
        trial(rate_scale=2.0).name(),
        trial(slow_factor=1.5).name(),
        Trial(replace(SCENARIO, kv_blocks=100), contestant("static")).name(),
    }
    assert len(names) == 6
    assert trial(gives_up_below=0.9).name() == trial().name()
    assert Trial(replace(SCENARIO, label="other"), contestant("static")).name() == trial().name()


def test_a_crew_keeps_the_order_of_its_tasks():
    tasks = [(value, 2) for value in range(20)]
    here = Crew(None, Console(quiet=True)).map("powers", pow, tasks)
    with open_crew(2, Console(quiet=True)) as crew:
        assert crew.map("powers", pow, tasks) == here == [value**2 for value in range(20)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_whole_command_small(folder, capsys, monkeypatch):
    pair = "static:max_num_seqs=16:max_num_batched_tokens=512"
    words = ["--quick", "--seeds", "1", "--workers", "1", "--profiles", PROFILE]
    words += ["--policies", f"predictive,{pair},watermark:0.05", "--work-dir", "kept"]
    words += ["--markdown", "tables.md"]
    monkeypatch.setattr("batchpilot.env.contest.settings.PAIRED_SMALL", (("Azure", 3.0, 2000.0),))
    monkeypatch.setattr("batchpilot.env.contest.settings._QUICK_SHARE", 0.15)
    assert main(words) == 0
    content = json.loads(Path("results/predictive.json").read_text())
    (capacity,) = content["capacity"]
    assert [row["policy"] for row in capacity["rows"]] == [
        *("static", "predictive", pair),
        "watermark:0.05",
    ]
    assert all(row["rates_per_s"][0] > 0 for row in capacity["rows"])
    assert capacity["common_rate_per_s"] in [row["rates_per_s"][0] for row in capacity["rows"]]
    assert len(content["shifts"]) == 3
    assert all(outcome["completed"] == outcome["submitted"] for outcome in outcomes(content))
    printed = capsys.readouterr().out
    for title in (
        *("Capacity: requests/s", "The target is held", "Overload: share", "KV-bound"),
        "Shifts: regret",
    ):
        assert title in printed
    page = Path("results/predictive.html").read_text()
    assert "<svg" in page
    assert "static 16/512" in page
    tables = Path("tables.md").read_text()
    assert tables.count("\n## ") == len(content["tables"])
    assert f"Made by `{content['command']}`" in tables
    assert "| static 16/512 |" in tables

    first = Path("results/predictive.json").read_bytes()
    monkeypatch.setattr(trials, "run_trial", lambda trial: pytest.fail("ran again"))
    assert main(words) == 0  # all of it is known
    assert Path("results/predictive.json").read_bytes() == first


def outcomes(content):
    """Every outcome that was run to its end."""
    names = ("capacity", "overload", "saturation", "shifts")
    sections = [content[name] for name in names]
    rows = [row for section in sections for result in section for row in result["rows"]]
    return [outcome for row in rows for outcome in row.get("outcomes", row.get("common"))]


@pytest.mark.parametrize("kept", ["file", "/proc/kept"])
def test_a_folder_that_cannot_keep_anything_is_found_first(kept, folder, capsys, monkeypatch):
    (folder / "file").write_text("mine")
    monkeypatch.setattr(trials, "run_trial", lambda trial: pytest.fail("a trial was started"))
    assert main(["--quick", "--workers", "1", "--work-dir", kept]) == 2
    assert f"contest: work_dir={kept!r} is no folder to write in" in capsys.readouterr().err


def test_bad_input_is_one_line(folder, capsys):
    assert main(["--profiles", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("contest: no profile 'gpu'")
