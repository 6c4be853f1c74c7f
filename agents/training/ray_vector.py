"""Environments on Ray: actors on one machine or many, behind Stable-Baselines3's VecEnv.

The driver keeps what it takes to play each running episode again (see `ReplayableEnv`). A worker
that dies is replaced, its episodes are played again up to the step that was lost, and training goes
on as if nothing had happened: with virtual environments to the last digit. A live environment
starts its episode afresh.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from stable_baselines3.common.vec_env import VecEnv

from batchpilot.agents.training.recipes import EnvRecipe, prepare_worker

logger = logging.getLogger(__name__)

#: A worker that dies this often in one step dies of the step itself.
MOST_REPLACEMENTS = 3
#: Workers of training and of evaluation take turns, so that each needs half a core.
_CORES_PER_WORKER = 0.5


class Worker:
    """Some of a vector's environments, in a process of Ray's.

    Args:
        recipe: Of each.
        count: How many.
    """

    def __init__(self, recipe: EnvRecipe, count: int) -> None:
        """Builds them."""
        prepare_worker()
        self._envs = [recipe.build() for _ in range(count)]

    def spaces(self) -> tuple[Any, Any]:
        """Observation and action space."""
        return self._envs[0].observation_space, self._envs[0].action_space

    def reset(self, seeds: Sequence[int | None]) -> list[tuple[Any, Any, Any]]:
        """Starts an episode in each: observation, info, and how it began."""
        results = []
        for env, seed in zip(self._envs, seeds, strict=True):
            seen, info = env.reset(seed=seed)
            results.append((seen, info, env.get_state()))
        return results

    def step(self, actions: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Steps each; where an episode ends, the next has begun when this returns.

        Returns:
            Observation, reward, whether it ended, info, and how the next episode began, or None.
        """
        return [_step(env, action) for env, action in zip(self._envs, actions, strict=True)]

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Plays episodes again."""
        for env, state in zip(self._envs, states, strict=True):
            if state:
                env.set_state(state)

    def call(self, index: int, name: str, args: Any, kwargs: Any) -> Any:
        """Calls a method of one environment."""
        return getattr(self._envs[index], name)(*args, **kwargs)

    def read(self, index: int, name: str) -> Any:
        """An attribute of one environment."""
        return self._envs[index].get_wrapper_attr(name)

    def close(self) -> None:
        """Closes them."""
        for env in self._envs:
            env.close()


def _step(env: Any, action: Any) -> tuple[Any, ...]:
    seen, reward, terminated, truncated, info = env.step(action)
    over = terminated or truncated
    info["TimeLimit.truncated"] = truncated and not terminated
    began = None
    if over:
        info["terminal_observation"] = seen
        seen, _ = env.reset()
        began = env.get_state()
    return seen, float(reward), over, info, began


class RayVecEnv(VecEnv):
    """A vector of environments that Ray actors share.

    Results do not hang on how many actors there are: each environment has its own seed.

    Args:
        recipe: Of each environment.
        count: How many environments.
        workers: How many actors; no more than environments.

    Raises:
        RuntimeError: A worker dies again and again in the same step.
    """

    def __init__(self, recipe: EnvRecipe, count: int, workers: int) -> None:
        """Connects to the cluster of `RAY_ADDRESS`, or starts one here, and starts the actors."""
        workers = min(workers, count)
        _connect(workers)
        self._recipe = recipe
        self._shares = [part.tolist() for part in np.array_split(np.arange(count), workers)]
        self._states: list[dict[str, Any]] = [{} for _ in range(count)]
        self.workers = [self._start(share) for share in self._shares]
        self._restoring: dict[int, Any] = {}
        self.replaced = 0
        self._actions: list[Any] = []
        self._pending: list[Any] = []
        observation_space, action_space = ray.get(self.workers[0].spaces.remote())
        super().__init__(count, observation_space, action_space)

    def reset(self) -> Any:
        """Starts an episode in each."""
        seeds = list(self._seeds)
        results = self._ask_all(
            lambda worker, share: worker.reset.remote([seeds[i] for i in share])
        )
        self._reset_seeds()
        self._reset_options()
        for index, (_, info, state) in enumerate(results):
            self.reset_infos[index] = info
            self._states[index] = state
        return np.stack([seen for seen, *_ in results])

    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        """Sends each worker its actions."""
        self._actions = list(actions)
        self._pending = [
            self._send_step(worker, share)
            for worker, share in zip(self.workers, self._shares, strict=True)
        ]

    def step_wait(self) -> Any:
        """Waits for all of them."""
        results = self._ask_all(self._send_step, self._pending)
        for index, (*_, began) in enumerate(results):
            action = np.asarray(self._actions[index]).tolist()
            self._states[index] = began or _with_action(self._states[index], action)
        seen, rewards, overs, infos, _ = zip(*results, strict=True)
        return np.stack(seen), np.array(rewards), np.array(overs), list(infos)

    def close(self) -> None:
        """Ends the actors; the cluster stays for other vectors."""
        for worker in self.workers:
            ray.kill(worker)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of each environment."""
        return [
            self._ask_one(index, lambda worker, own: worker.read.remote(own, attr_name))
            for index in self._get_indices(indices)
        ]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not offered: a replaced worker would not know."""
        raise NotImplementedError("environments on Ray are set by their recipe alone")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of each environment."""
        results = []
        for index in self._get_indices(indices):
            if method_name == "set_state":
                self._states[index] = dict(method_args[0])
            results.append(
                self._ask_one(
                    index,
                    lambda worker, own: worker.call.remote(
                        own, method_name, method_args, method_kwargs
                    ),
                )
            )
        return results

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Every environment is watched by a `Monitor`, and by nothing else anyone asks for."""
        known = wrapper_class.__name__ == "Monitor"
        return [known for _ in self._get_indices(indices)]

    def _start(self, share: Sequence[int]) -> Any:
        actor = ray.remote(num_cpus=_CORES_PER_WORKER)(Worker)
        return actor.remote(self._recipe, len(share))

    def _send_step(self, worker: Any, share: Sequence[int]) -> Any:
        return worker.step.remote([self._actions[index] for index in share])

    def _ask_one(self, index: int, ask: Callable[[Any, int], Any]) -> Any:
        """Asks the worker that has one environment."""
        number = next(n for n, share in enumerate(self._shares) if index in share)
        own = self._shares[number].index(index)
        return self._answer(number, lambda worker, _: ask(worker, own))

    def _ask_all(
        self, ask: Callable[[Any, Sequence[int]], Any], sent: Sequence[Any] | None = None
    ) -> list[Any]:
        """Asks every worker at once; the answers in the order of the environments."""
        pending = sent or [
            ask(worker, share) for worker, share in zip(self.workers, self._shares, strict=True)
        ]
        answers = [self._answer(n, ask, reference) for n, reference in enumerate(pending)]
        return [answer for part in answers for answer in part]

    def _answer(
        self, number: int, ask: Callable[[Any, Sequence[int]], Any], reference: Any = None
    ) -> Any:
        """A worker's answer, or that of the one that takes its place."""
        for _ in range(MOST_REPLACEMENTS):
            try:
                if reference is None:
                    reference = ask(self.workers[number], self._shares[number])
                if number in self._restoring:
                    ray.get(self._restoring[number])
                    del self._restoring[number]
                return ray.get(reference)
            except RayActorError as error:
                logger.warning("a worker died and is replaced: %s", _first_line(error))
                self._replace(number)
                reference = None
        raise RuntimeError(f"worker {number} died {MOST_REPLACEMENTS} times in the same step")

    def _replace(self, number: int) -> None:
        """Starts another worker and plays its episodes again."""
        share = self._shares[number]
        worker = self._start(share)
        self.workers[number] = worker
        self.replaced += 1
        self._restoring[number] = worker.restore.remote([self._states[index] for index in share])


def _with_action(state: dict[str, Any], action: Any) -> dict[str, Any]:
    state["actions"].append(action)
    return state


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _connect(workers: int) -> None:
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING)
        return
    ray.init(
        num_cpus=max(1, workers),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
