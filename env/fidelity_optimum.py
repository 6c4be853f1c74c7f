"""Whether more sequences stop helping on a virtual H100 where they do on a real one.

The ml.energy leaderboard served chats on Llama-3.1-8B, one H100, at many values of `max_num_seqs`,
always with more requests waiting. Its outputs have 397 tokens on average. Its prompts' lengths are
not published; that at a limit of 768 no more than 691 sequences ran on average says how long they
are: so many contexts fill the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from batchpilot.env.engine import EngineRequest
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig

PROFILE = "llama-3.1-8b-h100"
LIMITS = (64, 128, 256, 384, 512, 768, 1024)
#: Output tokens per second on the real GPU, where the project may cite them.
REAL_TOKENS_PER_S = {128: 7037, 256: 9010, 512: 9806, 768: 9603}
MEAN_PROMPT_TOKENS = 375
MEAN_OUTPUT_TOKENS = 397
LENGTH_SIGMA = 0.7
LONGEST = 4096
LEGEND = (
    "real: ml.energy leaderboard, vLLM's HTTP server on an H100, whose prompts' lengths are not "
    "published; theirs are chosen so that as many sequences fit the KV cache as did there (691 at "
    "768). The profile's overhead per sequence comes from the same runs."
)


@dataclass(frozen=True, slots=True)
class OptimumPoint:
    """A limit, and what the virtual GPU served under it.

    Attributes:
        max_num_seqs: The limit.
        tokens_per_s: Output tokens per second, while requests waited.
        running: Sequences in RUNNING, averaged over steps.
        preemptions: In that time, per 1,000 output tokens.
    """

    max_num_seqs: int
    tokens_per_s: float
    running: float
    preemptions: float


def measure_limit(max_num_seqs: int) -> OptimumPoint:
    """Serves a queue that never empties; counts once the first sequences have been replaced.

    Raises:
        ConfigError: The profile is not there.
    """
    config = VirtualEngineConfig(
        profile=PROFILE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(2048, max_num_seqs),
        enable_prefix_caching=False,
    )
    with VirtualEngine(config) as engine:
        for request in _requests(max_num_seqs):
            engine.add_request(request)
        finished = 0
        while finished < max_num_seqs:
            finished += len(engine.step().finished)
        return _count(engine, max_num_seqs)


def _requests(max_num_seqs: int) -> list[EngineRequest]:
    """Lognormal lengths, enough of them that two in three come after the first sequences."""
    rng = np.random.default_rng(0)
    count = 3 * max_num_seqs + 200
    location = -0.5 * LENGTH_SIGMA**2  # so that the mean is 1
    lengths = rng.lognormal(location, LENGTH_SIGMA, (count, 2))
    lengths *= (MEAN_PROMPT_TOKENS, MEAN_OUTPUT_TOKENS)
    pairs = np.clip(np.rint(lengths), 1, LONGEST).astype(int).tolist()
    return [
        EngineRequest(f"request-{i}", [7] * prompt, out) for i, (prompt, out) in enumerate(pairs)
    ]


def _count(engine: VirtualEngine, max_num_seqs: int) -> OptimumPoint:
    started = engine.clock_seconds
    tokens = preemptions = 0
    running: list[int] = []
    while engine.snapshot().waiting:
        step = engine.step()
        tokens += len(step.new_tokens)
        if step.record is not None:
            preemptions += step.record.preemptions
            running.append(step.record.running)
    return OptimumPoint(
        max_num_seqs,
        tokens / (engine.clock_seconds - started),
        float(np.mean(running)),
        1000 * preemptions / tokens,
    )


def print_optimum(points: Sequence[OptimumPoint], console: Console) -> None:
    """Prints what each limit gave, beside the real GPU's figures."""
    table = Table(title="Llama-3.1-8B on one H100, chats: output tokens per second by max_num_seqs")
    headings = ("max_num_seqs", "running", "preemptions/1k", "virtual", "real", "error", "")
    for heading in headings:
        table.add_column(heading, justify="right")
    best = max(points, key=lambda point: point.tokens_per_s)
    for point in points:
        real = REAL_TOKENS_PER_S.get(point.max_num_seqs)
        table.add_row(
            str(point.max_num_seqs),
            f"{point.running:,.0f}",
            f"{point.preemptions:.2f}",
            f"{point.tokens_per_s:,.0f}",
            f"{real:,}" if real else "",
            f"{point.tokens_per_s / real - 1:+.1%}" if real else "",
            "best" if point is best else "",
        )
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
