"""Measures an engine's step times over batch sizes, contexts and prompts.

Three kinds of step are measured, each from the step records that batchpilot's hook writes:

    prefill   prompts of one length after each other and nothing else
    decode    a batch that grows from size to size, decoding at one context length
    mixed     prompts, one at a time, into a batch that decodes

Steps whose time says little (the first after start or after a gap), that preempted, or that held
part of a prompt are left out. What is left is summed up cell by cell, a cell being steps in a row
of the same kind and size, and only its medians go into the fit: a machine that did something else
for a moment does not count.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.runner import EngineStalledError
from batchpilot.env.calibrate.fit import StepSample
from batchpilot.env.engine import Engine, EngineRequest, EngineStep

#: Share of the KV cache that a batch may grow into, so that nothing is ever preempted.
_KV_SHARE = 0.9
#: Prompts run before anything is measured: more than the steps that the hook calls warm-up.
_WARM_UP_PROMPTS = 16
_WARM_UP_TOKENS = 128
#: Steps without a token, in a row, after which the engine stands still.
_MOST_EMPTY_STEPS = 1_000

#: Told of each part that begins: its name, how many are done, how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Grid:
    """What is measured; what does not fit the engine is left out.

    Attributes:
        batch_sizes: Sequences that decode together, ascending.
        contexts: Prompt lengths of the decoding sequences, in tokens.
        batch_tokens: Most context tokens a batch starts with: they must all be prefilled.
        steps: Measured steps of a decoding batch.
        prompts: Lengths of prompts that are measured on their own and in mixed steps.
        packed: Lengths of prompts that go into a step together.
        packed_tokens: Tokens of such a step.
        mixed_batch_sizes: Those of `batch_sizes` that mixed steps are measured at.
        repeats: Steps of each kind with prompts.
    """

    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    batch_tokens: int
    steps: int
    prompts: tuple[int, ...]
    packed: tuple[int, ...]
    packed_tokens: int
    mixed_batch_sizes: tuple[int, ...]
    repeats: int


FULL_GRID = Grid(
    batch_sizes=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 127, 192, 255),
    contexts=(32, 256, 1024),
    batch_tokens=16_384,
    steps=12,
    prompts=(32, 128, 512, 1024),
    packed=(64, 128, 256),
    packed_tokens=1024,
    mixed_batch_sizes=(4, 32),
    repeats=3,
)
#: Seconds instead of minutes, and a rough profile: to try things out.
QUICK_GRID = Grid(
    batch_sizes=(1, 4, 8, 15),
    contexts=(32, 128),
    batch_tokens=2_048,
    steps=6,
    prompts=(64, 128),
    packed=(64,),
    packed_tokens=192,
    mixed_batch_sizes=(4,),
    repeats=3,
)


@dataclass(frozen=True)
class Cell:
    """Steps in a row of one kind and size.

    Attributes:
        sample: Their medians.
        steps: How many there were.
        spread: Relative standard deviation of their times, from the median distance; None for
            fewer than three.
    """

    sample: StepSample
    steps: int
    spread: float | None


def measure(
    engine: Engine,
    grid: Grid,
    *,
    max_model_len: int,
    vocab_size: int,
    seed: int,
    progress: Progress,
) -> list[Cell]:
    """Runs the grid on an engine and sums up what its steps took.

    Args:
        engine: Idle, with prefix caching off: every prompt is to be computed. No policy steers it
            afterwards.
        grid: What to measure.
        max_model_len: Longest prompt and output together.
        vocab_size: Prompts are random token ids below this.
        seed: Of the prompts.
        progress: Told of each part.

    Raises:
        ConfigError: The engine is too small for any batch of the grid.
        EngineStalledError: The engine gives no tokens any more.
    """
    driver = _Driver(engine, max_model_len=max_model_len, vocab_size=vocab_size, seed=seed)
    parts = [*_prefill_parts(driver, grid), *_decode_parts(driver, grid)]
    driver.run_alone(_WARM_UP_TOKENS, per_step=1, steps=_WARM_UP_PROMPTS)
    measured: list[Cell] = []
    for done, (name, run) in enumerate(parts):
        progress(name, done, len(parts))
        # Part by part: a long prompt and many short ones may be the same number of tokens.
        measured += cells(run())
    driver.clear()
    engine.set_policy(None)
    progress("done", len(parts), len(parts))
    return measured


def cells(samples: Iterable[StepSample]) -> list[Cell]:
    """Sums up steps in a row of equal decode_seqs and prefill_tokens."""
    groups = itertools.groupby(samples, key=lambda s: (s.decode_seqs, s.prefill_tokens))
    return [_cell(list(group)) for _, group in groups]


def noise(measured: Sequence[Cell]) -> float:
    """Relative standard deviation of a step's time within its cell; the median over the cells."""
    spreads = [cell.spread for cell in measured if cell.spread is not None]
    return round(float(np.median(spreads)), 4) if spreads else 0.0


def _cell(samples: Sequence[StepSample]) -> Cell:
    seconds = np.array([sample.seconds for sample in samples])
    median = float(np.median(seconds))
    # 1.4826 makes the median distance of normal noise its standard deviation.
    spread = 1.4826 * float(np.median(np.abs(seconds - median))) / median
    kv_tokens = round(float(np.median([sample.kv_tokens for sample in samples])))
    sample = samples[0]._replace(seconds=median, kv_tokens=kv_tokens)
    return Cell(sample, len(samples), spread if len(samples) >= 3 else None)


_Part = tuple[str, Callable[[], list[StepSample]]]


def _prefill_parts(driver: _Driver, grid: Grid) -> Iterator[_Part]:
    """Prompts alone, one in a step, then several."""
    alone = [(tokens, 1) for tokens in grid.prompts]
    packed = [(tokens, grid.packed_tokens // tokens) for tokens in grid.packed]
    for tokens, per_step in alone + packed:
        # The shield gives every step room for more than a very short prompt.
        if driver.fits_alone(tokens, per_step):
            name = f"prefill, {per_step} x {tokens} tokens"
            yield name, partial(driver.run_alone, tokens, per_step, grid.repeats)


def _decode_parts(driver: _Driver, grid: Grid) -> Iterator[_Part]:
    """A growing batch for each context; each size of it is a part.

    Raises:
        ConfigError: No batch fits.
    """
    found = False
    for context in grid.contexts:
        for size in _sizes(driver, grid, context):
            first, found = size == grid.batch_sizes[0], True
            name = f"decode, {size} x {context} tokens of context"
            yield name, partial(_decode, driver, grid, size, context, new=first)
    if not found:
        raise ConfigError(
            f"the engine is too small to calibrate: no batch of {grid.contexts[0]}-token prompts "
            "fits its KV cache, max_model_len and max_num_seqs"
        )


def _sizes(driver: _Driver, grid: Grid, context: int) -> list[int]:
    """The batch sizes that fit the engine, contexts grown by all the steps up to each."""
    sizes: list[int] = []
    longest = context
    for size in grid.batch_sizes:
        mixed = len(grid.prompts) * grid.repeats if size in grid.mixed_batch_sizes else 0
        longest += grid.steps + mixed + driver.prefill_steps(size, context)
        too_much = size > 1 and size * context > grid.batch_tokens
        if too_much or not driver.fits_batch(size, longest):
            break
        sizes.append(size)
    return sizes


def _decode(driver: _Driver, grid: Grid, size: int, context: int, *, new: bool) -> list[StepSample]:
    """Grows the batch to a size, lets it decode, and sends prompts into it."""
    if new:
        driver.clear()
    samples = driver.grow(size, context)
    samples += driver.decode(grid.steps)
    if size in grid.mixed_batch_sizes:
        for tokens in grid.prompts:
            if driver.fits_beside(size, tokens):
                samples += driver.run_beside(tokens, grid.repeats)
    return samples


class _WholePrompts:
    """A policy that gives each step room for whole prompts."""

    def __init__(self) -> None:
        """Room for anything until told otherwise."""
        self.prefill_tokens: int | None = None
        self.decodes_beside = True

    def observe(self, step: StepRecord) -> None:
        """Learns nothing."""

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Room for `prefill_tokens`, and for a token of each sequence where any decode beside."""
        startup = snapshot.engine.startup_limits
        budget = startup.max_num_batched_tokens
        if self.prefill_tokens is not None:
            decodes = snapshot.running if self.decodes_beside else 0
            budget = min(budget, self.prefill_tokens + decodes)
        return Decision(BatchLimits(startup.max_num_seqs, budget), Source.STATIC, "calibrating")


class _Driver:
    """Feeds an engine and knows each request's context to the token."""

    def __init__(self, engine: Engine, *, max_model_len: int, vocab_size: int, seed: int) -> None:
        """Takes over an idle engine."""
        self._engine = engine
        self._facts = engine.facts
        self._max_model_len = min(max_model_len, self._facts.kv_capacity_tokens)
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._policy = _WholePrompts()
        self._prompt_tokens: dict[str, int] = {}
        self._contexts: dict[str, int] = {}
        self._added = 0
        engine.set_policy(self._policy)

    def fits_alone(self, tokens: int, per_step: int) -> bool:
        """Whether a step can hold so many prompts of a length, and no more than those."""
        limits = self._facts.startup_limits
        together = tokens * per_step
        return (
            64 < together <= min(limits.max_num_batched_tokens, self._facts.kv_capacity_tokens // 2)
            and 1 <= per_step < limits.max_num_seqs
            and tokens < self._max_model_len
        )

    def fits_beside(self, decode_seqs: int, tokens: int) -> bool:
        """Whether a prompt can be prefilled whole beside sequences that decode now."""
        limits = self._facts.startup_limits
        # Each sequence may hold part of a block, and take another one before the prompt ends.
        held = sum(self._contexts.values()) + (decode_seqs + 1) * 2 * self._facts.block_size
        return (
            tokens <= limits.max_num_batched_tokens - decode_seqs
            and decode_seqs < limits.max_num_seqs
            and tokens < self._max_model_len
            and held + tokens <= self._facts.kv_capacity_tokens
        )

    def fits_batch(self, size: int, longest: int) -> bool:
        """Whether sequences can grow to a length together, each prefilled whole."""
        limits = self._facts.startup_limits
        kv_tokens = size * (longest + self._facts.block_size)
        return (
            kv_tokens <= _KV_SHARE * self._facts.kv_capacity_tokens
            and longest < self._max_model_len
            and longest + size <= limits.max_num_batched_tokens
            and size < limits.max_num_seqs
        )

    def prefill_steps(self, size: int, context: int) -> int:
        """Most steps that it takes to prefill a batch."""
        room = self._facts.startup_limits.max_num_batched_tokens - size
        return size if room < context else -(-size // (room // context))

    def run_alone(self, tokens: int, per_step: int, steps: int) -> list[StepSample]:
        """Prefills prompts of one length and nothing else, so many a step."""
        self.clear()
        # Two steps more: the first comes after a gap, and before the last the queue runs dry.
        for _ in range(per_step * (steps + 2)):
            self._add(tokens, output_tokens=1)
        self._policy.prefill_tokens, self._policy.decodes_beside = tokens * per_step, False
        return self._until(lambda: not self._prompt_tokens)

    def grow(self, size: int, context: int) -> list[StepSample]:
        """Adds sequences until so many decode."""
        room = self._facts.startup_limits.max_num_batched_tokens - size
        self._policy.prefill_tokens = room // context * context
        self._policy.decodes_beside = True
        for _ in range(size - len(self._prompt_tokens)):
            self._add(context, output_tokens=self._max_model_len - context)
        return self._until(lambda: len(self._contexts) == size)

    def decode(self, steps: int) -> list[StepSample]:
        """Lets the batch decode."""
        return [sample for _ in range(steps) if (sample := self._step())]

    def run_beside(self, tokens: int, repeats: int) -> list[StepSample]:
        """Sends prompts of one length into the batch, one after the other."""
        self._policy.prefill_tokens = None
        size, samples = len(self._prompt_tokens), []
        for _ in range(repeats):
            self._add(tokens, output_tokens=1)
            samples += self._until(lambda: len(self._prompt_tokens) == size)
        # Prompts of one length make one cell, whatever was decoded between them.
        return sorted(samples, key=lambda sample: sample.prefill_tokens)

    def clear(self) -> None:
        """Ends all requests."""
        for request_id in self._prompt_tokens:
            self._engine.abort_request(request_id)
        self._prompt_tokens.clear()
        self._contexts.clear()

    def _add(self, tokens: int, output_tokens: int) -> None:
        request_id = f"calibrate-{self._added}"
        self._added += 1
        prompt = [self._random.randrange(self._vocab_size) for _ in range(tokens)]
        self._engine.add_request(EngineRequest(request_id, prompt, output_tokens))
        self._prompt_tokens[request_id] = tokens

    def _until(self, is_done: Callable[[], bool]) -> list[StepSample]:
        """Steps until something is so; returns the samples."""
        samples: list[StepSample] = []
        while not is_done():
            sample = self._step()
            if sample is not None:
                samples.append(sample)
        return samples

    def _step(self) -> StepSample | None:
        """Runs a step that brings tokens; its sample, None where it should not be measured."""
        for _ in range(_MOST_EMPTY_STEPS):
            step = self._engine.step()
            if step.new_tokens:
                return self._sample(step)
        raise EngineStalledError(f"the engine gave no token in {_MOST_EMPTY_STEPS} steps")

    def _sample(self, step: EngineStep) -> StepSample | None:
        decoded = [name for name in step.new_tokens if name in self._contexts]
        kv_tokens = sum(self._contexts[name] for name in decoded)
        first = [name for name in step.new_tokens if name not in self._contexts]
        prompts = [self._prompt_tokens[name] for name in first]
        for name, count in step.new_tokens.items():
            self._contexts[name] = self._contexts.get(name, self._prompt_tokens[name]) + count
        for name in step.finished:
            del self._contexts[name], self._prompt_tokens[name]
        record = step.record
        if record is None or not record.regular or record.preemptions:
            return None
        if record.decode_seqs != len(decoded) or record.prefill_tokens != sum(prompts):
            return None
        squares = sum(tokens * tokens for tokens in prompts)
        return StepSample(record.seconds, len(decoded), sum(prompts), kv_tokens, squares)
