"""Starting from the best of a few steady actions: the model of gains, the episodes, the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from training_runs import run_in, silent, small_config

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.training import steady_search
from batchpilot.agents.training.algorithms import build_model
from batchpilot.agents.training.evaluation import evaluate_base
from batchpilot.agents.training.gain_model import predict_gains
from batchpilot.agents.training.interrupts import StopRequest
from batchpilot.agents.training.recipes import build_vector
from batchpilot.agents.training.run_folder import RunFolder
from batchpilot.agents.training.steady_search import (
    ACTIONS,
    SEARCH_SEED,
    Tried,
    start_from_search,
    try_actions,
)

EPISODES = 60


def regimes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Episodes in which the second action gains where the first feature is high, and noise."""
    features = rng.uniform(-1, 1, (EPISODES, 5))
    features[:, 4] = -1.0  # one that never moves
    gains = np.zeros((EPISODES, 3))
    gains[:, 1] = 0.2 * features[:, 0] + rng.normal(0, 0.05, EPISODES)
    gains[:, 2] = rng.normal(-0.02, 0.05, EPISODES)
    return features, gains


def test_the_model_finds_where_an_action_gains():
    features, gains = regimes(np.random.default_rng(0))
    choices = predict_gains(features, gains).choices(held_out=True)
    clear = np.abs(features[:, 0]) > 0.3
    right = choices == np.where(features[:, 0] > 0, 1, 0)
    assert right[clear].mean() > 0.9
    assert gains[np.arange(EPISODES), choices].mean() > 0.03


def test_chance_alone_is_no_reason_to_leave_the_base():
    rng = np.random.default_rng(1)
    gains = rng.normal(-0.03, 0.1, (EPISODES, 4))
    gains[:, 0] = 0.0
    predicted = predict_gains(rng.uniform(-1, 1, (EPISODES, 5)), gains)
    assert (predicted.choices() == 0).mean() > 0.9


def test_held_out_predictions_are_those_of_a_model_without_the_episode():
    features, gains = regimes(np.random.default_rng(2))
    found = predict_gains(features, gains)
    scaled = features[:, :4] / features[:, :4].std(axis=0)
    for left_out in (0, 17):
        kept = np.arange(EPISODES) != left_out
        centre, means = scaled[kept].mean(axis=0), gains[kept].mean(axis=0)
        x, y = scaled[kept] - centre, gains[kept] - means
        weights = np.linalg.solve(x.T @ x + found.penalty * EPISODES * np.eye(4), x.T @ y)
        expected = means + (scaled[left_out] - centre) @ weights
        np.testing.assert_allclose(found.held_out[left_out], expected, atol=1e-12)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    config = small_config(tmp_path_factory.mktemp("config"))
    vector = build_vector(config.recipe, 1)
    try:
        return try_actions(vector, SEARCH_SEED)
    finally:
        vector.close()


def test_the_first_action_is_the_base_policy(tmp_path: Path, tried: Tried):
    vector = build_vector(small_config(tmp_path).recipe.under("memory-peak"), 1)
    (episode,) = evaluate_base("memory-peak", vector, 1, seed=SEARCH_SEED).episodes
    vector.close()
    assert (tried.inside[0], tried.missed[0]) == (episode.inside, episode.missed)
    assert tried.gains(0.5)[0] == 0.0


def test_steady_actions_show_what_they_do(tried: Tried):
    assert len(set(zip(tried.inside, tried.missed, strict=True))) > 1
    assert [len(rows) for rows in tried.seen] == [12] * len(ACTIONS)


def test_episodes_are_kept_to_the_last_digit(tmp_path: Path, tried: Tried):
    tried.save(tmp_path / "1.npz")
    loaded = Tried.load(tmp_path / "1.npz")
    assert (loaded.inside, loaded.missed) == (tried.inside, tried.missed)
    for rows, expected in zip(loaded.seen, tried.seen, strict=True):
        np.testing.assert_array_equal(rows, expected)


def planted(rng: np.random.Generator, *, gains: bool) -> list[Tried]:
    """Episodes with a hundred requests; with gains, the fifth action brings thirty more inside."""
    found = []
    for _ in range(12):
        inside = rng.integers(48, 53, len(ACTIONS))
        inside[4] += 30 if gains else 0
        seen = [rng.uniform(-1, 1, (8, 26)).astype(np.float32) for _ in ACTIONS]
        found.append(Tried(inside.tolist(), (100 - inside).tolist(), seen))
    return found


@pytest.mark.parametrize(
    ("gains", "attained", "imitates"),
    [(True, [0.5, 0.6], True), (True, [0.6, 0.5], False), (False, [], False)],
    ids=["gains", "gains in the search only", "gains nothing"],
)
def test_an_agent_imitates_what_gains_and_stays_at_its_base_otherwise(
    tmp_path: Path, gains: bool, attained: list[float], imitates: bool
):
    config = small_config(tmp_path, search_episodes=12)
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    kept = folder.path / "search"
    kept.mkdir()
    for number, episode in enumerate(planted(np.random.default_rng(3), gains=gains)):
        episode.save(kept / f"{SEARCH_SEED + number}.npz")
    model = build_model("ppo", config.hyperparameters, build_vector(config.recipe, 1), seed=0)
    plays = iter(attained)
    report = start_from_search(model, config, folder, silent, StopRequest(), lambda: next(plays))
    assert report is not None
    assert list(plays) == []
    written = json.loads((folder.path / "search.json").read_text())
    assert written["expected_gain"] == report.expected_gain
    action, _ = model.predict(np.zeros(26, np.float32), deterministic=True)
    assert report.imitates == imitates
    if gains:
        assert report.expected_gain == pytest.approx(0.45, abs=0.05)  # 30 more, and 30 fewer late
        assert (written["base_attainment"], written["attainment"]) == tuple(attained)
    else:
        assert report.imitation_error is None
    if imitates:
        np.testing.assert_allclose(action, ACTIONS[4], atol=0.1)
        assert report.to_text().startswith(
            "imitates the best (60.0% in target, the base 50.0%): of 9"
        )
    else:
        np.testing.assert_allclose(action, [0.0, 0.0], atol=0.05)


def test_a_run_that_was_stopped_goes_on_with_its_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small_config(tmp_path, timesteps=16, search_episodes=2)
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    stopped = StopRequest()

    def stop_after_one(step: int, text: str = "") -> None:
        stopped.asked_at = 0.0

    model = build_model("ppo", config.hyperparameters, build_vector(config.recipe, 1), seed=0)
    assert start_from_search(model, config, folder, stop_after_one, stopped, lambda: 0.0) is None
    (kept,) = (folder.path / "search").iterdir()
    content = kept.read_bytes()

    asked: list[list[int]] = []
    plain = steady_search._try_all
    monkeypatch.setattr(
        steady_search,
        "_try_all",
        lambda seeds, config, stop: asked.append(list(seeds)) or plain(seeds, config, stop),
    )
    _, result = run_in(tmp_path / "run", config, resume=True)
    assert result.finished
    assert asked == [[seed for seed in (SEARCH_SEED, SEARCH_SEED + 1) if str(seed) != kept.stem]]
    assert kept.read_bytes() == content
    assert json.loads((folder.path / "search.json").read_text())["episodes"] == 2


@pytest.mark.parametrize(
    ("algo", "settings", "episodes", "error"),
    [
        ("ppo", {}, 1, "search_episodes=1 must be 0 or at least 2"),
        ("ppo", {"action_design": "absolute"}, 4, "needs residual actions"),
        ("recurrent_ppo", {}, 4, "ppo or sac or tqc"),
        ("ppo", {}, -1, "search_episodes=-1 must be at least 0"),
    ],
)
def test_searches_that_cannot_be(
    tmp_path: Path, algo: str, settings: dict[str, str], episodes: int, error: str
):
    with pytest.raises(ConfigError, match=error):
        small_config(tmp_path, algo, settings=settings, search_episodes=episodes)
