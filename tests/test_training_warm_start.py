"""Imitating logged decisions, from the files that the service's experience log writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_runs import run_in, small_config

from batchpilot.agents.actions import ActionDesign
from batchpilot.agents.experience import ExperienceRow, to_columns
from batchpilot.agents.features import FEATURE_NAMES, LatencyTargets
from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.telemetry import TelemetryWindow
from batchpilot.agents.training.algorithms import build_model
from batchpilot.agents.training.recipes import build_vector
from batchpilot.agents.training.warm_start import (
    Demonstrations,
    fit_mean_action,
    read_demonstrations,
)

FACTS = EngineFacts(BatchLimits(64, 2048), 1000, 16)


def window(running: int) -> TelemetryWindow:
    zeros = {name: 0 for name in TelemetryWindow.__dataclass_fields__ if name != "limits"}
    given = {"seconds": 1.0, "running": running, "steps": 10, "busy_seconds": 0.5}
    return TelemetryWindow(**(zeros | given), limits=FACTS.startup_limits)


def row(session: str, sequence: int, limits: BatchLimits, local: BatchLimits | None) -> Any:
    return ExperienceRow(
        recorded_at=sequence, session=session, sequence=sequence, engine_group="default",
        engine="a", data_parallel_rank=0, model_name="m", facts=FACTS,
        targets=LatencyTargets(50, 1000), window=window(sequence), policy="p", proposed=limits,
        limits=limits, source="memory", reason="because", local_limits=local,
    )  # fmt: skip


def write_log(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir()
    half = len(rows) // 2
    # Files come in any order, and a session may be spread over several.
    for name, part in (("b", rows[:half]), ("a", rows[half:])):
        pq.write_table(pa.table(to_columns(part)), folder / f"{name}.parquet")
    return folder


# A row's number is also how many sequences decode: so many tokens are not the base's to shift.
ROWS = [
    row("x", 1, BatchLimits(32, 1 + 512), BatchLimits(16, 1 + 512)),  # twice: a span of 2
    row("x", 2, BatchLimits(16, 2 + 64), BatchLimits(16, 2 + 512)),  # an eighth: a span of 8
    row("x", 3, BatchLimits(8, 2048), None),  # nobody knows the base
    row("y", 1, BatchLimits(1, 1 + 2048), BatchLimits(16, 1 + 512)),  # beyond the span
]


def test_limits_become_actions_relative_to_the_engines_own(tmp_path: Path):
    read = read_demonstrations(write_log(tmp_path / "log", ROWS), ActionDesign("residual"), 1, 1.0)
    expected = [[1, 0], [0, -1], [-1, 2 / 3]]
    np.testing.assert_allclose(read.actions, expected, atol=1e-6)
    assert read.observations.shape == (3, len(FEATURE_NAMES))


def test_absolute_actions_need_no_base(tmp_path: Path):
    design = ActionDesign("absolute", min_num_seqs=1, min_num_batched_tokens=64)
    read = read_demonstrations(write_log(tmp_path / "log", ROWS), design, 1, 1.0)
    assert len(read.actions) == 4
    np.testing.assert_allclose(read.actions[2], [0.0, 1.0], atol=1e-6)


def test_histories_do_not_cross_sessions(tmp_path: Path):
    read = read_demonstrations(write_log(tmp_path / "log", ROWS), ActionDesign("residual"), 2, 1.0)
    running = FEATURE_NAMES.index("running")
    columns = read.observations[:, [running, running + len(FEATURE_NAMES)]]
    shares = [[1, 1], [1, 2], [1, 1]]  # the one of session y is alone
    np.testing.assert_allclose(columns, np.array(shares) / 32 - 1, atol=1e-6)


def test_reports_are_joined_to_windows_as_long_as_the_agents_own(tmp_path: Path):
    """Four reports a second; the agent will see one second at a time, and so it does here."""
    log = write_log(tmp_path / "log", ROWS)
    whole = read_demonstrations(log, ActionDesign("absolute"), 1, 1.0)
    joined = read_demonstrations(log, ActionDesign("absolute"), 1, 2.0)
    assert (len(whole.actions), len(joined.actions)) == (4, 1)  # half an interval is left out
    np.testing.assert_array_equal(joined.actions[0], whole.actions[1])
    running = FEATURE_NAMES.index("running")
    assert joined.observations[0, running] == whole.observations[1, running]


@pytest.mark.parametrize("algo", ["ppo", "sac", "tqc"])
def test_the_mean_action_learns_what_was_shown(tmp_path: Path, algo: str):
    config = small_config(tmp_path, algo)
    model = build_model(algo, config.hyperparameters, build_vector(config.recipe, 1), seed=0)
    rng = np.random.default_rng(0)
    seen = rng.uniform(-1, 1, (256, len(FEATURE_NAMES))).astype(np.float32)
    wanted = np.stack([0.8 * seen[:, 0], -0.5 * np.ones(256, np.float32)], axis=1)
    error = fit_mean_action(model, Demonstrations(seen, wanted.astype(np.float32)), seed=0)
    assert error < 0.02
    predicted, _ = model.predict(seen, deterministic=True)
    assert np.mean((predicted - wanted) ** 2) == pytest.approx(error, abs=1e-6)


def test_a_run_starts_from_a_log(tmp_path: Path):
    log = write_log(tmp_path / "log", ROWS)
    said: list[str] = []
    from batchpilot.agents.training.run_folder import RunFolder
    from batchpilot.agents.training.trainer import train

    config = small_config(tmp_path, timesteps=16)
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    result = train(config, folder, lambda _, text="": said.append(text), experience=log)
    assert result.finished
    assert any(text.startswith("imitated 3 logged decisions") for text in said)


def test_logs_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ConfigError, match="no experience log at"):
        read_demonstrations(tmp_path / "nowhere", ActionDesign(), 1, 1.0)
    with pytest.raises(ConfigError, match="not grid"):
        read_demonstrations(tmp_path, ActionDesign("grid"), 1, 1.0)
    only = write_log(tmp_path / "log", [ROWS[2], replace(ROWS[2], sequence=4)])
    with pytest.raises(ConfigError, match="holds no decision that could be imitated"):
        read_demonstrations(only, ActionDesign("residual"), 1, 1.0)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match="cannot read experience log"):
        read_demonstrations(tmp_path / "bad.parquet", ActionDesign(), 1, 1.0)


def test_recurrent_agents_have_no_mean_action_to_fit(tmp_path: Path):
    config = small_config(tmp_path, "recurrent_ppo", timesteps=16)
    with pytest.raises(ConfigError, match="needs ppo, sac or tqc, not RecurrentPPO"):
        run_in(tmp_path / "run", config, experience=write_log(tmp_path / "log", ROWS))
