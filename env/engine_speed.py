"""How fast the virtual engine steps with a given number running, and how fast vLLM alone could be.

Both serve the same requests: one as `VirtualEngine` does, the other on vLLM's own scheduler without
the hook, of which only the time inside `schedule()` and `update_from_output()` counts. No engine
that runs vLLM's scheduler can be faster than that, so the ratio is what is ours to improve.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from batchpilot.agents.catalog import PolicySpec
from batchpilot.env.engine import EngineRequest
from batchpilot.env.models import tiny_model_path
from batchpilot.env.scheduler_core import SchedulerCore, SchedulerCoreConfig
from batchpilot.env.virtual_engine import VOCAB_SIZE, VirtualEngine, VirtualEngineConfig

PROFILE = "llama-3.1-8b-h100"
MEAN_PROMPT_TOKENS, MEAN_OUTPUT_TOKENS, LONGEST = 128, 256, 2048
_WAITING = 8


class EngineSpeed(NamedTuple):
    """Steps per second of wall time, at one batch size.

    Attributes:
        prefix_caching: Whether vLLM hashes blocks to find them again.
        running: Sequences that got a token in a step, on average.
        engine: Steps per second of the virtual engine under a static policy.
        vllm_alone: Steps per second if nothing but vLLM's scheduler took time.
    """

    prefix_caching: bool
    running: float
    engine: float
    vllm_alone: float


def measure_engine(
    running: int, steps: int, *, rounds: int = 3, prefix_caching: bool = True
) -> EngineSpeed:
    """The best of several rounds of both, taken in turn, so that other load hits both alike.

    Args:
        running: Sequences that run; more always wait.
        steps: Of a round.
        rounds: How many of each.
        prefix_caching: Whether vLLM caches prefixes.
    """
    engine = _Saturated(running, prefix_caching)
    alone = _VllmAlone(running, prefix_caching)
    pairs = [(engine.play(steps), alone.play(steps)) for _ in range(rounds)]
    return EngineSpeed(
        prefix_caching,
        engine.tokens / engine.steps,
        steps / min(seconds for seconds, _ in pairs),
        steps / min(seconds for _, seconds in pairs),
    )


def _requests(seed: int = 0) -> Iterator[EngineRequest]:
    """The same endless stream for both."""
    chance = np.random.default_rng(seed)

    def length(mean: int) -> int:
        return min(1 + int(chance.exponential(mean)), LONGEST)

    for number in count():
        prompt = chance.integers(VOCAB_SIZE, size=length(MEAN_PROMPT_TOKENS)).tolist()
        yield EngineRequest(str(number), prompt, length(MEAN_OUTPUT_TOKENS))


class _Saturated:
    """A virtual engine that always has requests waiting."""

    def __init__(self, running: int, prefix_caching: bool) -> None:
        self._engine = VirtualEngine(
            VirtualEngineConfig(
                profile=PROFILE, max_num_seqs=running, enable_prefix_caching=prefix_caching
            )
        )
        self._engine.set_policy(PolicySpec.parse("static").build({}))
        self._requests = _requests()
        for _ in range(running + _WAITING):
            self._engine.add_request(next(self._requests))
        self.steps = self.tokens = 0
        self.play(4 * running)
        self.steps = self.tokens = 0

    def play(self, steps: int) -> float:
        """Seconds that so many steps took."""
        gc.collect()
        started = time.perf_counter()
        for _ in range(steps):
            step = self._engine.step()
            self.tokens += len(step.new_tokens)
            for _ in step.finished:
                self._engine.add_request(next(self._requests))
        self.steps += steps
        return time.perf_counter() - started


class _VllmAlone:
    """vLLM's scheduler without the hook, its own two functions timed and nothing else."""

    def __init__(self, running: int, prefix_caching: bool) -> None:
        config = SchedulerCoreConfig(
            max_num_seqs=running,
            kv_blocks=2 + running * 2 * LONGEST // 16,
            max_model_len=2 * LONGEST,
            enable_prefix_caching=prefix_caching,
            mode="off",
        )
        self._core = SchedulerCore(config, tiny_model_path())
        scheduler = self._core.scheduler
        scheduler.schedule = self._timed(scheduler.schedule)
        scheduler.update_from_output = self._timed(scheduler.update_from_output)
        self._requests = _requests()
        self._in_flight: deque[Any] = deque()
        self._seconds = 0.0
        for _ in range(running + _WAITING):
            self._core.add_request(next(self._requests))
        self.play(4 * running)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self._seconds += time.perf_counter() - started
            return result

        return call

    def play(self, steps: int) -> float:
        """Seconds that vLLM's functions took of so many steps."""
        gc.collect()
        self._seconds = 0.0
        for _ in range(steps):
            self._in_flight.append(self._core.schedule())
            if len(self._in_flight) > 1:
                for output in self._core.complete(self._in_flight.popleft()):
                    if output.finish_reason is not None:
                        self._core.add_request(next(self._requests))
        return self._seconds
