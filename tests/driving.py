"""Drives a model-free scheduler as vLLM's engine core does, and writes down what it did."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.env.engine import EngineRequest
from batchpilot.env.models import tiny_model_path
from batchpilot.env.scheduler_core import SchedulerCore, SchedulerCoreConfig


@dataclass
class Run:
    """What a scheduler did: tokens scheduled step by step, and tokens made by request."""

    steps: list[dict[str, int]] = field(default_factory=list)
    output_tokens: dict[str, int] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)


def build_core(**config: Any) -> SchedulerCore:
    settings = {
        "max_num_seqs": 32,
        "kv_blocks": 65,
        "block_size": 16,
        "max_num_batched_tokens": 256,
    }
    return SchedulerCore(SchedulerCoreConfig(**{**settings, **config}), tiny_model_path())


def random_requests(seed: int, count: int = 60, longest: int = 120) -> list[EngineRequest]:
    rng = random.Random(seed)
    return [
        EngineRequest(
            f"r{i}",
            [rng.randrange(3, 1000) for _ in range(rng.randrange(1, longest))],
            rng.randrange(1, longest),
            priority=rng.randrange(3),
        )
        for i in range(count)
    ]


def drive(
    core: SchedulerCore,
    requests: Sequence[EngineRequest],
    *,
    before_step: Callable[[int], None] = lambda step: None,
) -> Run:
    """Queues everything, then runs to the end, one step ahead where scheduling is asynchronous."""
    run = Run()
    for request in requests:
        core.add_request(request)
    ahead = 2 if core.config.async_scheduling else 1
    in_flight: deque[Any] = deque()
    while core.scheduler.has_requests() or in_flight:
        if core.scheduler.has_requests():
            before_step(len(run.steps))
            output = core.schedule()
            run.steps.append(dict(output.num_scheduled_tokens))
            in_flight.append(output)
            if len(in_flight) < ahead and core.scheduler.has_requests():
                continue
        for item in core.complete(in_flight.popleft()):
            tokens = run.output_tokens.get(item.request_id, 0) + len(item.new_token_ids)
            run.output_tokens[item.request_id] = tokens
            if item.finish_reason is not None:
                run.finished.append(item.request_id)
        assert len(run.steps) < 100_000, "the scheduler stands still"
    return run


class Flapping:
    """Limits at random before every step, sensible or not."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def observe(self, step: StepRecord) -> None:
        del step

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        seqs = self._rng.choice([-1, 0, 1, 2, 5, snapshot.running, 31, 32, 33, 10**6])
        tokens = self._rng.choice([-1, 0, 1, 17, 64, 255, 256, 257, 10**6])
        return Decision(BatchLimits(seqs, tokens), Source.LEARNED, "flapping")
