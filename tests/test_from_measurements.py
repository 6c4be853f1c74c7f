"""The bundled profiles' recipes: each says what its profile says, and fits what it is given."""

import csv
from dataclasses import replace

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.calibrate import from_measurements
from batchpilot.env.calibrate.from_measurements import RECIPES, make_profile, read_steps
from batchpilot.env.profiles import load_profile, profile_names

STEPS = [
    (decodes, prefill, 512 * decodes)
    for decodes in (0, 1, 8, 64, 128)
    for prefill in (0, 64, 256, 1024)
    if decodes or prefill
]
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def write_steps(folder, name, *, prior="0"):
    """Steps that the bundled profile's own form, without the engine's overhead, would take."""
    recipe = BY_NAME[name]
    form = replace(load_profile(name).step_time, overhead_decode_seq_ms=0.0)
    path = folder / recipe.steps_file
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*from_measurements.COLUMNS, "prefill_prior_ctx_tokens"])
        for step in STEPS:
            milliseconds = 1e3 * form.seconds(*step)
            key = (recipe.gpu.in_steps, recipe.model.in_steps, recipe.tensor_parallel)
            table.writerow([*key, *step, milliseconds, prior])
            table.writerow(["another GPU", *key[1:], *step, 1e6, prior])
    return path


def test_there_is_a_recipe_for_every_bundled_profile():
    assert sorted(BY_NAME) == sorted(profile_names())


@pytest.mark.parametrize("name", BY_NAME)
def test_a_recipe_says_all_that_its_profile_says_but_for_the_fit(name, tmp_path):
    write_steps(tmp_path, name)
    made, bundled = make_profile(BY_NAME[name], tmp_path), load_profile(name)
    assert made.fit_error.mean_relative < 0.001
    source = BY_NAME[name].source(bundled.fit_error.samples)
    remade = replace(made, step_time=bundled.step_time, fit_error=bundled.fit_error, source=source)
    assert remade == bundled
    assert made.step_time.overhead_decode_seq_ms == bundled.step_time.overhead_decode_seq_ms


def test_the_fit_finds_the_form_that_made_the_steps(tmp_path):
    write_steps(tmp_path, "llama-3.1-8b-rtx4090")
    made = make_profile(BY_NAME["llama-3.1-8b-rtx4090"], tmp_path).step_time
    form = load_profile("llama-3.1-8b-rtx4090").step_time
    for step in STEPS:
        assert made.seconds(*step) == pytest.approx(form.seconds(*step), rel=0.005)


def test_steps_with_context_before_their_prompt_are_left_out(tmp_path):
    path = write_steps(tmp_path, "llama-3.1-8b-rtx4090", prior="128")
    assert read_steps(path, BY_NAME["llama-3.1-8b-rtx4090"]) == []


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (("step_ms", "ms"), "no column 'step_ms'"),
        (("512", "many"), "line 8: .*'many'"),
    ],
)
def test_bad_files_name_what_is_wrong(edit, error, tmp_path):
    path = write_steps(tmp_path, "qwen3-8b-h100")
    path.write_text(path.read_text().replace(*edit))
    with pytest.raises(ConfigError, match=error):
        make_profile(BY_NAME["qwen3-8b-h100"], tmp_path)


def test_the_command_checks_prints_and_refuses(tmp_path, capsys):
    write_steps(tmp_path, "qwen3-8b-h100")
    assert from_measurements.main([str(tmp_path), "qwen3-8b-h100"]) == 0
    assert '"name": "qwen3-8b-h100"' in capsys.readouterr().out
    assert from_measurements.main([str(tmp_path), "qwen3-8b-h100", "--check"]) == 1  # other steps
    assert "DIFFERS" in capsys.readouterr().out
    assert from_measurements.main([str(tmp_path / "none"), "qwen3-8b-h100"]) == 2
    assert from_measurements.main([str(tmp_path), "gpt-9"]) == 2
    assert "no recipe makes 'gpt-9'" in capsys.readouterr().err
