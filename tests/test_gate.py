"""The gate: who may take over, and who may not, and why."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from policies import constant, write
from rich.console import Console

from batchpilot.__main__ import main
from batchpilot.agents.limits import BatchLimits, Decision, EngineFacts, EngineSnapshot, Source
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.registry import PolicyRegistry
from batchpilot.agents.training.run_config import family_names, make_run_config
from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.bench.plan import build_round_workload
from batchpilot.env.contest.scenario import estimated_capacity
from batchpilot.env.gate.evaluate import (
    GateRun,
    GateTask,
    ShieldWatch,
    gate_tasks,
    run_gate,
    run_task,
)
from batchpilot.env.gate.settings import Rules, load_gate_settings
from batchpilot.env.gate.statistics import bootstrap_gain, relative_gains
from batchpilot.env.gate.table import print_verdict
from batchpilot.env.gate.verdict import Verdict, judge
from batchpilot.env.profiles import load_profile
from batchpilot.env.scenarios import ScenarioRanges

CELLS = ("a", "b", "c")
SEEDS = (1, 2, 3, 4)
NEW, OLD = "learned:/r/chat/2", "predictive"


def runs(policy: str, goodput, *, late=0.1, shield=0.0) -> list[GateRun]:
    """Runs of a policy; goodput may be a number a cell."""
    per_cell = np.broadcast_to(goodput, (len(CELLS),))
    return [
        # Every policy has the same luck with the same seed.
        GateRun(cell, policy, seed, per_cell[at] * (1 + seed / 10), late, 100.0, 0, shield)
        for at, cell in enumerate(CELLS)
        for seed in SEEDS
    ]


def verdict(new, old=1.0, **others) -> Verdict:
    found = [*runs(NEW, **new), *runs(OLD, old, late=others.pop("old_late", 0.1))]
    for policy, goodput in others.items():
        found += runs(policy, goodput)
    static = [policy for policy in others if policy.startswith("static:")]
    analytic = [policy for policy in others if policy not in static]
    return judge(
        found, candidate=NEW, reference=OLD, analytic=analytic, static=static, rules=Rules()
    )


def failed(found: Verdict) -> list[str]:
    return [check.rule for check in found.checks if not check.passed]


def test_gains_are_shares_of_the_larger():
    new = np.array([[2.0, 1.0, 0.9, 5.0, 0.0]])
    old = np.array([[1.0, 1.0, 1.0, 0.0, 0.0]])
    assert relative_gains(new, old)[0].tolist() == pytest.approx([0.5, 0.0, -0.1, 1.0, 0.0])


def test_a_gain_that_is_the_same_everywhere_is_certain():
    gain = bootstrap_gain(np.full((4, 3), 0.05), confidence=0.95, resamples=500)
    assert gain == pytest.approx((0.05, 0.05, 0.05))


@pytest.mark.parametrize("count", [8, 12])
def test_the_interval_covers_the_truth_as_often_as_it_says(count):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        cells = rng.normal(0.03, 0.05, (count, 1))
        gains = cells + rng.normal(0.0, 0.03, (count, 4))
        found = bootstrap_gain(gains, confidence=0.95, resamples=400)
        covered += found.low <= 0.03 <= found.high
    assert 0.92 * 400 <= covered <= 0.98 * 400


def test_the_same_cell_drawn_again_and_again_is_no_standard_error():
    gains = np.array([[0.691], [0.665], [0.62]])  # their means differ in the last digit
    found = bootstrap_gain(gains, confidence=0.95, resamples=2000)
    assert 0.3 < found.low < 0.62
    assert 0.69 < found.high < 0.9


def test_two_cells_are_judged_by_their_seeds():
    gains = np.array([[0.01, 0.02, 0.03], [0.03, 0.04, 0.05]])
    found = bootstrap_gain(gains, confidence=0.95, resamples=2000)
    assert 0.01 <= found.low < found.mean < found.high <= 0.05


def test_two_cells_promote_nothing_however_much_better_they_are():
    found = judge(
        [run for run in (*runs(NEW, 1.5), *runs(OLD, 1.0)) if run.cell != "c"],
        candidate=NEW,
        reference=OLD,
        analytic=(),
        static=(),
        rules=Rules(),
    )
    (check,) = [check for check in found.checks if not check.passed]
    assert "but 2 of the 3 cells it takes to tell of others" in check.found


def test_one_good_cell_is_no_evidence():
    gain = bootstrap_gain(
        np.array([[0.9] * 4, [0.0] * 4, [-0.001] * 4]), confidence=0.95, resamples=2000
    )
    assert gain.mean > 0.29
    assert gain.low < 0


def test_a_better_policy_passes():
    found = verdict({"goodput": 1.1}, static=0.9)
    assert found.passed
    assert failed(found) == []
    assert found.gain.mean == pytest.approx(0.1 / 1.1)
    assert found.summary == "goodput +9.1 % over predictive, from +9.1 % to +9.1 %"


@pytest.mark.parametrize(
    ("new", "rule", "reason"),
    [
        ({"goodput": 1.0}, "more goodput than", "+0.0 %, from +0.0 % to +0.0 %"),
        ({"goodput": [1.4, 1.4, 0.97]}, "no cell loses more than 2%", "c -3.0 %"),
        ({"goodput": 1.1, "late": 0.12}, "late requests grow", "+2.00 points"),
        ({"goodput": 1.1, "shield": 0.5}, "the shield changes at most 20%", "50.0%"),
    ],
)
def test_what_keeps_a_policy_out_is_named(new, rule, reason):
    found = verdict(new)
    assert not found.passed
    (check,) = [check for check in found.checks if check.rule.startswith(rule)]
    assert (check.passed, check.found) == (False, reason)
    assert f"{check.rule}: {reason}" in found.summary


def test_it_must_be_no_worse_than_any_analytic_policy():
    found = verdict({"goodput": 1.1}, static=1.2)
    assert failed(found) == ["on average no less goodput than static"]


def test_the_best_fixed_pair_is_shown_and_no_hurdle():
    pairs = {"static:max_num_seqs=32": 1.5, "static:max_num_seqs=64": 2.0}
    found = verdict({"goodput": 1.1}, **pairs)
    assert found.passed
    assert found.best_static == "static:max_num_seqs=64"


class Wants:
    def __init__(self, *seqs):
        self.seqs = list(seqs)

    def observe(self, step):
        del step

    def decide(self, snapshot):
        return Decision(BatchLimits(self.seqs.pop(0), 2048), Source.LEARNED, "")


def test_the_shield_is_counted_and_nothing_is_changed():
    facts = EngineFacts(BatchLimits(64, 2048), total_blocks=100, block_size=16)
    watch = ShieldWatch(Wants(32, 8, 100, 16))
    snapshot = EngineSnapshot(facts, 0.0, running=16, waiting=0)
    wanted = [watch.decide(snapshot).limits.max_num_seqs for _ in range(4)]
    assert wanted == [32, 8, 100, 16]
    assert watch.share == 0.5


def test_what_comes_with_batchpilot_is_sound():
    settings = load_gate_settings()
    assert len(settings.cells) >= 6
    assert settings.first_seed >= 900_000
    assert {cell.settings.engine for cell in settings.cells} == {"virtual"}
    tasks = gate_tasks(settings, ("static", "predictive"))
    assert len(tasks) == 2 * settings.rounds * len(settings.cells)


def test_no_profile_of_its_cells_is_trained_on_by_default_or_in_a_bundled_family():
    held_out = {cell.settings.profile for cell in load_gate_settings().cells}
    for name in family_names():
        scenarios = make_run_config({}, name, {}).recipe.settings.get("scenarios", {})
        profiles = scenarios.get("profiles", ScenarioRanges().profiles)
        assert held_out.isdisjoint(profiles), name
    assert held_out.isdisjoint(ScenarioRanges().profiles)


def test_names_in_brackets_are_shown_whole():
    found = [replace(run, cell=f"h100 [{run.cell}]") for run in (*runs(NEW, 0.5), *runs(OLD, 1.0))]
    judged = judge(found, candidate=NEW, reference=OLD, analytic=(), static=(), rules=Rules())
    out = io.StringIO()
    print_verdict(judged, Console(file=out, width=200))
    # Each in its own row, and the first where it is named for breaking a rule.
    assert [out.getvalue().count(f"h100 [{name}]") for name in CELLS] == [2, 1, 1]


CELL = (
    "{name: small, profile: llama-3.1-8b-rtx4090, "
    "workload: 'lognormal:prompt_mean=600:output_mean=40', "
    "arrivals: 'poisson:14', num_requests: 50, itl_slo_ms: 35, ttft_slo_ms: 2000}"
)


def test_a_seed_is_of_the_noise_too(tmp_path):
    """A trace is the same under every seed; its runs are not."""
    path = tmp_path / "gate.yaml"
    path.write_text(
        "cells: [{name: trace, profile: llama-3.1-8b-h100, workload: azure-2023-conv, noise: 0.05,"
        " num_requests: 20, itl_slo_ms: 35}]"
    )
    (cell,) = load_gate_settings(path).cells
    tasks = [GateTask(cell, Contestant.parse("static"), seed) for seed in (0, 1, 0)]
    first, other, again = (run_task(task).tokens_per_s for task in tasks)
    assert first == again != other


def test_a_run_needs_no_folder_to_write_in(gate, monkeypatch):
    (cell, *_) = load_gate_settings(gate).cells
    monkeypatch.chdir("/proc")
    assert run_task(GateTask(cell, Contestant.parse("static"), 0)).goodput_per_s > 0


def test_runs_that_cannot_be_kept_count_and_a_folder_that_is_none_is_refused(
    gate, tmp_path, monkeypatch, caplog
):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    tasks = gate_tasks(load_gate_settings(gate), ("static",))[:2]
    with pytest.raises(ConfigError, match=r"work_dir='.*gate.yaml' is no folder to write in"):
        run_gate(tasks, print, workers=1, work_dir=gate)
    monkeypatch.setattr("batchpilot.env.bench.store.write_whole", fail)
    found = run_gate(tasks, lambda run: None, workers=1, work_dir=tmp_path / "runs")
    assert [run.cell for run in found] == ["small", "more"]
    assert caplog.text.count("No space left on device; no result is lost") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the file: [] is not a mapping"),
        ("rounds: 3", "cells is required: a list"),
        ("cells: []", "must be at least one"),
        (f"cells: [{CELL}, {CELL}]", "each with its own name"),
        (f"cells: [{CELL}]\nround: 3", "unknown key 'round'"),
        (f"cells: [{CELL}]\nrounds: 0", "rounds=0 must be a whole number above 0"),
        (f"cells: [{CELL}]\nrules: {{confidence: 2}}", "confidence=2.0 must be less than 1"),
        (f"cells: [{CELL}]\nrules: {{luck: 1}}", "rules: unknown key 'luck'"),
        ("cells: [{name: x, itl_slo_ms: 5}]", "needs a profile"),
        ("cells: [{name: x, profile: llama-3.1-8b-h100}]", "itl_slo_ms or ttft_slo_ms is required"),
        ("cells: [{profile: llama-3.1-8b-h100}]", "a cell has no name"),
        ("cells: [{name: x, json: out.json}]", "a cell: unknown key 'json'"),
        ("cells: [", "cannot be read"),
    ],
)
def test_a_gate_that_makes_no_sense_says_why(tmp_path, text, message):
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_gate_settings(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """A registry of its own, and a gate of three small overloaded cells."""
    monkeypatch.setenv("BATCHPILOT_POLICIES", str(tmp_path / "policies"))
    path = tmp_path / "gate.yaml"
    path.write_text(
        f"cells: [{CELL}, {CELL.replace('small', 'more').replace(':14', ':15')}, "
        f"{CELL.replace('small', 'most').replace(':14', ':16')}]\n"
        "rounds: 1\nanalytic: [static]\ndefault_policy: static\n"
        "static_max_num_seqs: [32]\n"
    )
    return path


def promote(gate: Path, label: str, *more: str) -> int:
    folder = str(gate.parent / "runs")
    return main(["policies", "promote", label, "--config", str(gate), "--work-dir", folder, *more])


def test_processes_give_the_same_to_the_last_digit_and_what_was_run_is_kept(gate, tmp_path):
    tasks = gate_tasks(load_gate_settings(gate), ("predictive",))
    seen = []
    found = run_gate(tasks, seen.append, workers=2, work_dir=tmp_path / "runs")
    assert found == [run_task(task) for task in tasks]
    assert {run.cell: run for run in seen} == {run.cell: run for run in found}
    kept = sorted((tmp_path / "runs").iterdir())
    assert len(kept) == 3
    for path in kept:
        path.write_text(path.read_text().replace('"preemptions": ', '"preemptions": 7'))
    again = run_gate(tasks, seen.append, workers=1, work_dir=tmp_path / "runs")
    assert all(run.preemptions >= 7 for run in again)


def test_a_better_policy_takes_over_and_one_that_is_the_same_does_not(gate, tmp_path, capsys):
    for version, base in (("1", "static"), ("2", "predictive"), ("3", "predictive")):
        write(tmp_path / f"v{version}", version=version, base_policy=base)
        assert main(["policies", "add", str(tmp_path / f"v{version}")]) == 0
    assert promote(gate, "test@1") == 1  # static against static
    assert "refused: test@1 is not promoted" in capsys.readouterr().out
    assert PolicyRegistry().pointer("test").version is None
    report = tmp_path / "verdict.json"
    assert promote(gate, "test@2", "--json", str(report)) == 0
    assert "promoted: test@2 is in force for 'default'" in capsys.readouterr().out
    assert json.loads(report.read_text())["passed"] is True
    pointer = PolicyRegistry().pointer("test")
    assert pointer.version == "2"
    assert pointer.events[-1].note.startswith("goodput +")
    assert promote(gate, "test@3") == 1  # no better than what is now in force
    out = capsys.readouterr().out
    assert "test@2" in out
    assert PolicyRegistry().pointer("test").version == "2"


def test_what_is_in_force_already_or_not_there_is_bad_input(gate, tmp_path, capsys):
    write(tmp_path / "p")
    PolicyRegistry().add(tmp_path / "p")
    PolicyRegistry().promote("test", "1")
    for label, message in (
        ("test@1", "test@1 is in force already for group 'default'"),
        ("test@7", "no version '7' of policy 'test'"),
        ("test", "which version of 'test'? name it: test@VERSION; there: 1"),
        (str(tmp_path / "p"), "is a folder: first batchpilot policies add"),
    ):
        assert promote(gate, label) == 2
        assert message in capsys.readouterr().err


def test_the_command_lists_shows_verifies_and_rolls_back(gate, tmp_path, capsys):
    assert main(["policies", "list"]) == 0
    assert "no policies in" in capsys.readouterr().out
    for version in ("1", "2"):
        write(tmp_path / version, constant(0.1, 0.0), version=version)
        assert main(["policies", "add", str(tmp_path / version)]) == 0
        PolicyRegistry().promote("test", version, note=f"because {version}")
    assert main(["policies", "list"]) == 0
    listed = capsys.readouterr().out
    assert "test@1" in listed
    assert "default" in listed
    assert main(["policies", "rollback", "test", "--note", "late tokens"]) == 0
    assert "test@1 is in force" in capsys.readouterr().out
    assert main(["policies", "show", "test"]) == 0
    shown = capsys.readouterr().out
    assert "test@1: 54 parameters" in shown
    assert "rollback 1 late tokens" in shown
    assert main(["policies", "verify"]) == 0
    assert "sound   test@2" in capsys.readouterr().out


def test_damaged_versions_are_found_and_never_added(gate, tmp_path, capsys):
    write(tmp_path / "p")
    assert main(["policies", "add", str(tmp_path / "p")]) == 0
    (tmp_path / "policies" / "test" / "1" / "policy.onnx").write_bytes(b"\x80\x04pickle")
    assert main(["policies", "verify"]) == 1
    assert "REFUSED test@1:" in capsys.readouterr().out
    assert main(["policies", "list"]) == 0
    assert "damaged" in capsys.readouterr().out
    (tmp_path / "p" / "policy.onnx").write_bytes(b"")
    assert main(["policies", "add", str(tmp_path / "p")]) == 2
    assert "the file is damaged or was exchanged" in capsys.readouterr().err
    assert promote(gate, "test@1") == 2


def test_rules_are_those_of_the_file(gate):
    rules = replace(Rules(), most_cell_loss=0.5)
    found = judge(
        [*runs(NEW, [1.4, 1.4, 0.97]), *runs(OLD, 1.0)],
        candidate=NEW,
        reference=OLD,
        analytic=(),
        static=(),
        rules=rules,
    )
    assert "no cell loses more than 50% of its goodput" in [c.rule for c in found.checks]
    assert all(c.passed for c in found.checks if c.rule.startswith("no cell"))


def cell_file(tmp_path: Path, **changes: object) -> Path:
    """A gate of one cell."""
    cell = {"name": "c", "profile": "llama-3.1-8b-h100", "workload": "chat", "itl_slo_ms": 20}
    path = tmp_path / "cells.yaml"
    path.write_text(json.dumps({"cells": [cell | changes]}))
    return path


@pytest.mark.parametrize(
    "traffic",
    [{"arrivals": "poisson:4"}, {"workload": "azure-2023-conv", "num_requests": 200}],
)
def test_a_load_is_a_share_of_the_estimated_capacity(tmp_path, traffic):
    (cell,) = load_gate_settings(cell_file(tmp_path, load=0.5, **traffic)).cells
    requests = build_round_workload(replace(cell.settings, num_requests=200), 0).requests
    rate = len(requests) / requests[-1].arrival_seconds
    capacity = estimated_capacity(load_profile("llama-3.1-8b-h100"), cell.settings.workload, 20.0)
    assert rate == pytest.approx(0.5 * capacity, rel=0.15 if "arrivals" in traffic else 1e-9)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"load": 0}, "cell c: load=0 must be a number above 0"),
        ({"load": 1, "arrivals": "poisson:1", "rate_scale": 2}, "takes the place of rate_scale"),
        ({"load": 1, "itl_slo_ms": None, "ttft_slo_ms": 9}, "cell c: load needs itl_slo_ms"),
        ({"load": 1, "arrivals": "saturated"}, "load needs arrivals over time, not all at once"),
    ],
)
def test_a_load_that_means_nothing_is_refused(tmp_path, changes, error):
    with pytest.raises(ConfigError, match=error):
        load_gate_settings(cell_file(tmp_path, **changes))
