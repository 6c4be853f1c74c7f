"""Where an agent starts: which steady shifts of its base policy gain something, and where.

Each of so many episodes is played under every one of a few actions, the same in all its intervals;
same engine, same requests, same noise. What each gained over the neutral action is predicted from
what was seen in the episode (`batchpilot.agents.training.gain_model`), and the agent imitates the
action with the best prediction, which is the neutral one where none is better. It does so only if
that gains something in episodes the prediction had not seen; else it stays at its base. The
prediction looks at a whole episode, the agent at a moment: so the agent that has learned to imitate
plays the episodes that choose the model, and stays at its base too if it does worse there.

Why: what an action does to a request shows seconds later, and an agent that tries another one every
second sees the sum of them all. One that stays shows its whole effect, and so that of a regime:
this GPU, these lengths, this load.

Limitations: what pays for a moment only is not found here. That is for the training that follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from batchpilot.agents.training.evaluation import EpisodeResult, play_episodes
from batchpilot.agents.training.export import env_parameters
from batchpilot.agents.training.gain_model import Gains, predict_gains
from batchpilot.agents.training.interrupts import StopRequest
from batchpilot.agents.training.progress import Progress
from batchpilot.agents.training.recipes import (
    EnvRecipe,
    build_vector,
    outlive_sigterm,
    prepare_worker,
)
from batchpilot.agents.training.run_config import RunConfig
from batchpilot.agents.training.run_folder import RunFolder
from batchpilot.agents.training.warm_start import Demonstrations, Floats, fit_mean_action
from batchpilot.env.process import worker_pool

#: Seeds of the episodes start here; those of training, evaluations and the gate are elsewhere.
SEARCH_SEED = 20_000_000
#: What is tried, for sequences and prompt tokens: the base, then more and less of either. Further
#: from the base in prompt tokens, nearly every episode lost much.
ACTIONS = (
    *((0.0, 0.0), (0.0, -0.5), (0.0, -0.25), (0.0, 0.25), (0.0, 0.5)),
    *((-1.0, 0.0), (-0.5, 0.0), (0.5, 0.0), (1.0, 0.0)),
)
_FOLDER = "search"
_LOOK_EVERY_SECONDS = 0.5
#: Standard errors by which a gain must exceed 0: several actions are tried, and the best is taken.
_SURE = 2.0


class Tried(NamedTuple):
    """One episode under every action.

    Attributes:
        inside: Requests inside their targets, by action.
        missed: Requests outside, by action.
        seen: Observations by action, each of shape (intervals, features).
    """

    inside: Sequence[int]
    missed: Sequence[int]
    seen: Sequence[Floats]

    def gains(self, slo_weight: float) -> npt.NDArray[np.float64]:
        """What each action is worth more than the first, the base.

        Requests inside their targets, less late ones by the reward's weight, as shares of the
        requests whose fate was known under the base.
        """
        worth = np.array(self.inside, np.float64) - slo_weight * np.array(self.missed)
        gained: npt.NDArray[np.float64] = worth - worth[0]
        return gained / max(1, self.inside[0] + self.missed[0])

    def save(self, path: Path) -> None:
        """Writes it whole or not at all."""
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            arrays: dict[str, Any] = {f"seen_{k}": rows for k, rows in enumerate(self.seen)}
            np.savez(file, inside=self.inside, missed=self.missed, **arrays)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Tried:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            inside, missed = file["inside"].tolist(), file["missed"].tolist()
            return cls(inside, missed, [file[f"seen_{k}"] for k in range(len(inside))])


class SearchReport(NamedTuple):
    """What the search found; gains are shares of the requests.

    Attributes:
        episodes: Played under each action.
        mean_gains: By action.
        standard_errors: Of those means.
        chosen: How often each action was imitated, as a share of the episodes.
        best_gain: Mean over episodes of the best action's gain: more than any agent can hope for,
            since it is chosen with hindsight, chance included.
        expected_gain: Of the chosen actions, each episode's by a model of the others.
        expected_gain_error: Its standard error.
        penalty: Of the model.
        imitation_error: Mean squared error of the agent's actions; None where it did not imitate.
        base_attainment: Of the base policy, in the episodes that choose the model; None likewise.
        attainment: Of the imitating agent in the same.
    """

    episodes: int
    mean_gains: Sequence[float]
    standard_errors: Sequence[float]
    chosen: Sequence[float]
    best_gain: float
    expected_gain: float
    expected_gain_error: float
    penalty: float
    imitation_error: float | None = None
    base_attainment: float | None = None
    attainment: float | None = None

    @property
    def imitates(self) -> bool:
        """Whether the agent starts from what was found."""
        if self.attainment is None or self.base_attainment is None:
            return False
        return self.attainment >= self.base_attainment

    def to_text(self) -> str:
        """The finding in a line."""
        start = "imitates the best" if self.imitates else "stays at its base"
        if self.attainment is not None:
            start += f" ({self.attainment:.1%} in target, the base {self.base_attainment:.1%})"
        return (
            f"{start}: of {len(self.chosen)} steady actions, chosen by what is seen, expected gain "
            f"{self.expected_gain:+.1%} of the requests in {self.episodes} episodes, standard "
            f"error {self.expected_gain_error:.1%} (with hindsight {self.best_gain:+.1%}); the "
            f"base itself in {self.chosen[0]:.0%}"
        )


def start_from_search(
    model: BaseAlgorithm,
    config: RunConfig,
    folder: RunFolder,
    progress: Progress,
    stop: StopRequest,
    attain: Callable[[], float],
) -> SearchReport | None:
    """Plays the episodes, and fits the model's mean action to what is best in them.

    That is done where the expected gain is above twice its standard error, and undone where the
    model then attains less than before.

    Episodes are kept in the folder as they end, so that a search that was stopped goes on.

    Args:
        model: PPO, SAC or TQC with residual actions.
        config: Of the run; `search_episodes` of it, from 2 on.
        folder: Of the run.
        progress: Hears of each episode.
        stop: Ends the search when set.
        attain: Plays other episodes with the model; the share of requests inside their targets.

    Returns:
        What was found, also written to `search.json`; None where it was stopped.
    """
    seeds = range(SEARCH_SEED, SEARCH_SEED + config.run.search_episodes)
    files = {seed: folder.path / _FOLDER / f"{seed}.npz" for seed in seeds}
    missing = {seed: path for seed, path in files.items() if not path.exists()}
    (folder.path / _FOLDER).mkdir(exist_ok=True)
    done = len(files) - len(missing)
    try:
        for seed, tried in _try_all(list(missing), config, stop):
            tried.save(missing[seed])
            done += 1
            progress(0, f"steady actions tried in {done} of {len(files)} episodes")
    except _Stopped:
        return None
    episodes = [Tried.load(path) for path in files.values()]
    report = _imitate(model, episodes, env_parameters(config).slo_weight, config.run.seed, attain)
    folder.write_json("search.json", {"actions": ACTIONS, **report._asdict()})
    progress(0, report.to_text())
    return report


def try_actions(vector: VecEnv, seed: int) -> Tried:
    """Plays one episode under every action.

    Args:
        vector: Of one environment.
        seed: Of the episode.
    """
    results, seen = zip(*(_play(vector, action, seed) for action in ACTIONS), strict=True)
    return Tried([r.inside for r in results], [r.missed for r in results], seen)


class _Stopped(Exception):
    """Somebody asked the search to stop."""


def _try_all(
    seeds: Sequence[int], config: RunConfig, stop: StopRequest
) -> Iterator[tuple[int, Tried]]:
    """Every episode as it ends, in as many processes as there are environments.

    Raises:
        _Stopped: Somebody asked for it.
        BrokenProcessPool: A process died.
    """
    if not seeds:
        return
    with worker_pool(min(config.run.n_envs, len(seeds)), _open_worker, config.recipe) as pool:
        running = {pool.submit(_try_in_worker, seed): seed for seed in seeds}
        while running:
            if stop.is_set:
                raise _Stopped
            ended, _ = wait(running, _LOOK_EVERY_SECONDS, FIRST_COMPLETED)
            for future in ended:
                yield running.pop(future), future.result()


_worker: list[VecEnv] = []


def _open_worker(recipe: EnvRecipe) -> None:
    prepare_worker()
    _worker.append(build_vector(recipe, 1))
    outlive_sigterm()


def _try_in_worker(seed: int) -> Tried:
    return try_actions(_worker[0], seed)


def _play(vector: VecEnv, action: tuple[float, float], seed: int) -> tuple[EpisodeResult, Floats]:
    steady = np.array([action], np.float32)
    seen: list[Floats] = []

    def act(observations: Any, starts: Any) -> Any:
        del starts
        seen.append(observations[0])
        return steady

    (result,) = play_episodes(vector, act, 1, seed)
    return result, np.array(seen)


def _imitate(
    model: BaseAlgorithm,
    episodes: Sequence[Tried],
    slo_weight: float,
    seed: int,
    attain: Callable[[], float],
) -> SearchReport:
    gains = np.array([tried.gains(slo_weight) for tried in episodes])
    under_base = np.array([tried.seen[0].mean(axis=0, dtype=np.float64) for tried in episodes])
    predicted = predict_gains(under_base, gains)
    report = _report(gains, predicted)
    if report.expected_gain <= _SURE * report.expected_gain_error:
        return report
    at_base, base_attainment = copy.deepcopy(model.policy.state_dict()), attain()
    error = fit_mean_action(model, _demonstrations(episodes, predicted), seed=seed)
    report = report._replace(
        imitation_error=round(error, 6), base_attainment=base_attainment, attainment=attain()
    )
    if not report.imitates:
        model.policy.load_state_dict(at_base)
    return report


def _demonstrations(episodes: Sequence[Tried], predicted: Gains) -> Demonstrations:
    """What is seen under the base and under the chosen action, and that action."""
    seen, actions = [], []
    for tried, choice in zip(episodes, predicted.choices(), strict=True):
        for observations in {0: tried.seen[0], int(choice): tried.seen[choice]}.values():
            seen.append(observations)
            actions.append(np.tile(np.array(ACTIONS[choice], np.float32), (len(observations), 1)))
    return Demonstrations(np.concatenate(seen), np.concatenate(actions))


def _report(gains: npt.NDArray[np.float64], predicted: Gains) -> SearchReport:
    count = len(gains)
    choices = predicted.choices()
    expected = gains[np.arange(count), predicted.choices(held_out=True)]
    return SearchReport(
        episodes=count,
        mean_gains=gains.mean(axis=0).round(5).tolist(),
        standard_errors=(gains.std(axis=0, ddof=1) / count**0.5).round(5).tolist(),
        chosen=[round(float(np.mean(choices == k)), 5) for k in range(len(ACTIONS))],
        best_gain=round(float(gains.max(axis=1).mean()), 5),
        expected_gain=round(float(expected.mean()), 5),
        expected_gain_error=round(float(expected.std(ddof=1) / count**0.5), 5),
        penalty=predicted.penalty,
    )
