"""Clients of a live engine that ask again as soon as they are answered."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from batchpilot.agents.limits import BatchLimits, Source
from batchpilot.env.engine import EngineRequest
from batchpilot.env.live_engine import LiveEngine

#: Token ids of prompts, all of them in the vocabulary of every model used here.
FIRST_TOKEN, TOKENS = 100, 400
#: Steps that may bring no token while requests are unfinished, before something is stuck.
MOST_EMPTY_STEPS = 1000
_NUMBERS = itertools.count()


@dataclass
class Stretch:
    """Serving for a while.

    Attributes:
        tokens: Output tokens made.
        seconds: How long it took.
        served: Requests that got all their tokens.
        decisions: Steps, by who decided.
        limits: Limits that were in force in a step.
    """

    tokens: int = 0
    seconds: float = 0.0
    served: int = 0
    decisions: Counter[Source] = field(default_factory=Counter)
    limits: set[BatchLimits] = field(default_factory=set)

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds


class Traffic:
    """So many requests at any time, one stretch after the other, without a pause between.

    Args:
        engine: Serves them.
        concurrency: Requests at once.
        prompt_tokens: Of each.
        output_tokens: Of each, on average: from a fifth to nine fifths of it, so that requests do
            not end and begin in step.
    """

    def __init__(
        self,
        engine: LiveEngine,
        concurrency: int = 24,
        prompt_tokens: int = 16,
        output_tokens: int = 40,
    ) -> None:
        self.asked = 0
        self.served = 0
        self._engine = engine
        self._concurrency = concurrency
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._open: dict[str, int] = {}  # output tokens still to come

    def serve(self, until: Callable[[], bool]) -> Stretch:
        """Serves until told to stop; what is open by then goes on in the next stretch."""
        stretch, began = Stretch(), time.monotonic()
        while not until():
            while len(self._open) < self._concurrency:
                self._ask()
            self._step(stretch)
        stretch.seconds = time.monotonic() - began
        return stretch

    def finish(self) -> int:
        """Serves what is open and nothing new; returns how many requests were lost."""
        stretch, empty = Stretch(), 0
        while self._engine.has_unfinished_requests() and empty < MOST_EMPTY_STEPS:
            before = stretch.tokens
            self._step(stretch)
            empty = 0 if stretch.tokens > before else empty + 1
        return self.asked - self.served

    def _ask(self) -> None:
        number, self.asked = next(_NUMBERS), self.asked + 1
        name = f"r{number}"
        prompt = [FIRST_TOKEN + (number * 31 + i * 7) % TOKENS for i in range(self._prompt_tokens)]
        tokens = round(self._output_tokens * (0.2 + 1.6 * (number * 0.618 % 1.0)))
        self._engine.add_request(EngineRequest(name, prompt, tokens))
        self._open[name] = tokens

    def _step(self, stretch: Stretch) -> None:
        engine = self._engine
        step = engine.step()
        for name, count in step.new_tokens.items():
            self._open[name] -= count
            stretch.tokens += count
        for name in step.finished:
            if self._open.pop(name) == 0:
                self.served += 1
                stretch.served += 1
        if engine.decision is not None:
            stretch.decisions[engine.decision.source] += 1
        stretch.limits.add(engine.applied_limits)
