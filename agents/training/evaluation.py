"""How well an agent or a policy serves: episodes of seeds that no training has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

#: Seeds of evaluations start here; training draws its own from small seeds.
EVALUATION_SEED = 1_000_000


class EpisodeResult(NamedTuple):
    """One episode.

    Attributes:
        seed: Its seed.
        reward: Sum of rewards.
        slo_attainment: Share of requests inside their targets, of those whose fate is known.
        inside: Requests inside their targets.
        missed: Requests outside.
        seconds: Engine time.
        shielded_share: Share of engine steps in which the shield changed the proposal.
        preemptions: Sequences preempted.
        tokens_per_s: Output tokens per second, on average.
    """

    seed: int
    reward: float
    slo_attainment: float
    inside: int
    missed: int
    seconds: float
    shielded_share: float
    preemptions: int
    tokens_per_s: float

    @property
    def goodput_per_s(self) -> float:
        """Requests inside their targets per second."""
        return self.inside / self.seconds


@dataclass(frozen=True)
class Evaluation:
    """Episodes under one agent or policy.

    Attributes:
        label: Who decided.
        episodes: In the order of their seeds.
    """

    label: str
    episodes: Sequence[EpisodeResult]

    def mean(self, name: str) -> float:
        """The mean of a field or property of `EpisodeResult`."""
        return float(np.mean([getattr(episode, name) for episode in self.episodes]))

    @property
    def pooled_attainment(self) -> float:
        """Share inside of all requests of all episodes."""
        inside = sum(episode.inside for episode in self.episodes)
        return inside / max(1, inside + sum(episode.missed for episode in self.episodes))

    def figures(self) -> dict[str, float | int]:
        """Means, as JSON values."""
        names = ("reward", "slo_attainment", "goodput_per_s", "shielded_share", "tokens_per_s")
        return {
            "episodes": len(self.episodes),
            **{name: round(self.mean(name), 5) for name in names},
            "pooled_attainment": round(self.pooled_attainment, 5),
            "preemptions": sum(episode.preemptions for episode in self.episodes),
        }


#: From observations, and whether each begins an episode, to an action for each environment.
Act = Callable[[Any, Any], Any]


def evaluate_agent(
    model: BaseAlgorithm, vector: VecEnv, episodes: int, *, seed: int = EVALUATION_SEED
) -> Evaluation:
    """Plays episodes of an agent's deterministic actions; see `play_episodes`."""
    state: Any = None

    def act(seen: Any, starts: Any) -> Any:
        nonlocal state
        actions, state = model.predict(seen, state=state, episode_start=starts, deterministic=True)
        return actions

    return Evaluation("agent", play_episodes(vector, act, episodes, seed))


def evaluate_base(
    label: str, vector: VecEnv, episodes: int, *, seed: int = EVALUATION_SEED
) -> Evaluation:
    """Plays episodes of the action 0, which is the vector's base policy itself.

    Args:
        label: The policy.
        vector: Built by `EnvRecipe.under`.
        episodes: As in `play_episodes`.
        seed: As in `play_episodes`.
    """
    zero = np.zeros((vector.num_envs, *(vector.action_space.shape or ())), np.float32)
    return Evaluation(label, play_episodes(vector, lambda *_: zero, episodes, seed))


def play_episodes(vector: VecEnv, act: Act, episodes: int, seed: int) -> list[EpisodeResult]:
    """Plays one episode for each of the seeds from `seed` on.

    Which environment plays a seed does not matter: results are the same for vectors of any size.

    Args:
        vector: Environments; their own episodes are ended.
        act: Decides.
        episodes: How many.
        seed: The first.
    """
    results: list[EpisodeResult] = []
    while len(results) < episodes:
        first = seed + len(results)
        results += _play_together(vector, act, first)
    return results[:episodes]


def _play_together(vector: VecEnv, act: Act, seed: int) -> list[EpisodeResult]:
    """One episode in each environment."""
    count = vector.num_envs
    vector.seed(seed)
    seen: Any = vector.reset()
    starts = np.ones(count, dtype=bool)
    infos: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    over = np.zeros(count, dtype=bool)
    while not over.all():
        seen, _, dones, newest = vector.step(act(seen, starts))
        for index in np.flatnonzero(~over):
            infos[index].append(newest[index])
        over |= dones
        starts = dones
    return [_summary(seed + index, kept) for index, kept in enumerate(infos)]


def _summary(seed: int, infos: Sequence[dict[str, Any]]) -> EpisodeResult:
    def total(name: str) -> Any:
        return sum(info[name] for info in infos)

    return EpisodeResult(
        seed=seed,
        reward=float(infos[-1]["episode"]["r"]),
        slo_attainment=infos[-1]["slo_attainment"],
        inside=total("inside"),
        missed=total("missed"),
        seconds=infos[-1]["clock_s"],
        shielded_share=infos[-1]["episode_shielded_share"],
        preemptions=total("preemptions"),
        tokens_per_s=total("throughput_tokens_per_s") / len(infos),
    )
