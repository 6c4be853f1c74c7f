"""`batchpilot calibrate`: settings, what it refuses, and a real engine from end to end."""

import contextlib
import json
import os
import sys
from dataclasses import replace

import pytest

from batchpilot.__main__ import main
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.figures import PAPER, render
from batchpilot.env.bench.runner import EngineStalledError
from batchpilot.env.calibrate import cli, runner
from batchpilot.env.calibrate.fit import StepSample
from batchpilot.env.calibrate.measure import Cell
from batchpilot.env.calibrate.plot import calibration_figure, kind_of
from batchpilot.env.calibrate.runner import kv_bytes_per_token, profile_name
from batchpilot.env.calibrate.settings import CalibrateSettings
from batchpilot.env.models import ModelSource, resolve_model
from batchpilot.env.profiles import FitError, load_profile

PROFILE = load_profile("llama-3.1-8b-h100")
BATCHES = ((1, 0, 64, 0), (8, 0, 4096, 0), (0, 512, 0, 2 * 256**2), (4, 256, 800, 256**2))
CELLS = [Cell(StepSample(PROFILE.step_time.seconds(*b), *b), 3, 0.01) for b in BATCHES]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-num-seqs", "1"], "max_num_seqs=1 must be at least 2"),
        (["--max-num-seqs", "many"], "max_num_seqs='many' is not a whole number"),
        (["--max-num-batched-tokens", "64"], "max_num_batched_tokens=64 must be at least"),
        (["--plot", "x.pdf"], "plot='x.pdf' must end in .svg or .png"),
        (["--out", "a.svg", "--plot", "./a.svg"], "is named twice"),
        (["--name", "My GPU"], "name='My GPU' must be lower-case"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["--model", "tiny", "--out", "."], "it is a folder"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "cache"))
    assert main(["calibrate", *options]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("batchpilot calib")]
    assert words in line
    assert not list(tmp_path.glob("*.json"))


def test_ctrl_c_writes_nothing(capsys, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "resolve_model", interrupted)
    assert main(["calibrate", "--out", str(tmp_path / "p.json")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_stalled_engine_writes_nothing(capsys, tmp_path, monkeypatch):
    def stalled(*_):
        raise EngineStalledError("the engine gave no token in 9 steps")

    monkeypatch.setattr(cli, "calibrate", stalled)
    assert main(["calibrate", "--out", str(tmp_path / "p.json")]) == 1
    assert "no token in 9 steps; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_cache_far_larger_than_what_was_measured_is_told_of(capsys, tmp_path, monkeypatch):
    for blocks, is_told in ((PROFILE.num_blocks, True), (1000, False)):
        profile = replace(PROFILE, num_blocks=blocks)
        monkeypatch.setattr(
            cli, "calibrate", lambda settings, progress, chosen=profile: (chosen, CELLS)
        )
        assert main(["calibrate", "--out", str(tmp_path / "p.json")]) == 0
        assert ("up to 4,096 KV tokens were measured" in capsys.readouterr().err) is is_told


def test_results_are_written_and_shown(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "calibrate", lambda settings, progress: (PROFILE, CELLS))
    out, plot = tmp_path / "p.json", tmp_path / "p.svg"
    assert main(["calibrate", "--out", str(out), "--plot", str(plot)]) == 0
    assert load_profile(str(out)) == PROFILE
    assert plot.read_text().startswith("<?xml")
    shown = capsys.readouterr().out
    assert "llama-3.1-8b-h100: floor 6.84 ms" in shown
    for kind, count in (("decode", 2), ("prefill", 1), ("mixed", 1), ("all", 4)):
        (line,) = [line for line in shown.splitlines() if f" {kind} " in line]
        assert [part.strip() for part in line.split("│")][2] == str(count)
        assert "0.0%" in line


def test_a_reader_that_has_seen_enough_loses_nobody_the_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "calibrate", lambda settings, progress: (PROFILE, CELLS))
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe, contextlib.suppress(SystemExit):
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["calibrate", "--out", str(tmp_path / "p.json")]) != 0
    assert load_profile(str(tmp_path / "p.json")) == PROFILE


def test_a_profile_that_cannot_be_written_in_the_end_is_still_shown(capsys, tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "calibrate", lambda settings, progress: (PROFILE, CELLS))
    monkeypatch.setattr(cli, "write_whole", fail)
    assert main(["calibrate", "--out", str(tmp_path / "p.json")]) == 1
    printed = capsys.readouterr()
    assert "cannot write the profile: No space left on device" in printed.err
    assert "llama-3.1-8b-h100: floor 6.84 ms" in printed.out


@pytest.mark.parametrize(("error", "warned"), [(0.09, False), (0.11, True)])
def test_a_poor_fit_is_said(capsys, tmp_path, monkeypatch, error, warned):
    profile = replace(PROFILE, fit_error=FitError(error, error, 9))
    monkeypatch.setattr(cli, "calibrate", lambda settings, progress: (profile, CELLS))
    assert main(["calibrate", "--out", str(tmp_path / "p.json")]) == 0
    assert ("the fit is poor" in capsys.readouterr().err) is warned


def test_the_plot_has_every_cell_and_the_error():
    picture = render(lambda: calibration_figure(PROFILE, CELLS, PAPER), PAPER).decode()
    assert "llama-3.1-8b-h100: 689 cells, mean error 3.1%" in picture
    assert "context near 64" in picture
    assert "context near 512" in picture
    assert [kind_of(cell.sample) for cell in CELLS] == ["decode", "decode", "prefill", "mixed"]


@pytest.mark.parametrize(
    ("model", "device", "name"),
    [
        ("smollm2-135m", "CPU, AMD EPYC, 2 cores", "smollm2-135m-cpu"),
        ("/models/Qwen3_8B/", "NVIDIA H100 80GB HBM3", "qwen3-8b-h100-80gb-hbm3"),
    ],
)
def test_names_of_profiles(model, device, name):
    assert profile_name(model, device) == name


def test_kv_bytes_per_token(tmp_path):
    assert kv_bytes_per_token(resolve_model("tiny", cache_dir=tmp_path)) == 2 * 4 * 2 * 32 * 2
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8, "dtype": "int4"}))
    source = ModelSource("x", tmp_path, vocab_size=10, max_model_len=10)
    with pytest.raises(ConfigError, match="cannot tell the KV cache's size: 'hidden_size' is"):
        kv_bytes_per_token(source)


def test_settings_name_their_files():
    settings = CalibrateSettings(out="a.json", plot="b.PNG")
    assert settings.plot_kind == "png"
    assert [path.name for path in settings.output_files] == ["a.json", "b.PNG"]


@pytest.mark.live
def test_a_real_engine_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "cache"))
    out, plot = tmp_path / "new" / "tiny.json", tmp_path / "tiny.png"
    options = ["--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--kv-blocks", "129"]
    files = ["--out", str(out), "--plot", str(plot)]
    assert main(["calibrate", "--model", "tiny", "--quick", *options, *files]) == 0
    profile = load_profile(str(out))
    assert profile.name == "tiny-cpu"
    assert (profile.num_blocks, profile.block_size, profile.max_model_len) == (129, 32, 4096)
    assert profile.kv_bytes_per_token == 1024
    assert profile.fit_error.samples >= 20
    assert 0 < profile.step_time.seconds(8, 0, 500) < 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "tiny-cpu" in capsys.readouterr().out
