"""The vocabulary of every decision: what is seen, what is decided, what a step cost.

All values are immutable. Names follow vLLM's own where vLLM has one. What is made anew in every
step is a named tuple, which costs a third of a frozen dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from batchpilot.agents.kv_growth import EVERY_TOKEN, KvGrowth


class Source(StrEnum):
    """Who made a decision."""

    STATIC = "static"
    MEMORY = "memory"
    SLA = "sla"
    MEMORY_SLA = "memory_sla"
    PREDICTIVE = "predictive"
    LEARNED = "learned"
    REMOTE = "remote"
    FALLBACK = "fallback"


class Binding(StrEnum):
    """What keeps the next waiting request out."""

    KV_CACHE = "kv_cache"
    MAX_NUM_SEQS = "max_num_seqs"
    TOKEN_BUDGET = "token_budget"
    NONE = "none"


# Reading a member through its class takes 0.1 us, which every step would pay several times.
_KV_CACHE, _MAX_NUM_SEQS = Binding.KV_CACHE, Binding.MAX_NUM_SEQS
_TOKEN_BUDGET, _NONE = Binding.TOKEN_BUDGET, Binding.NONE


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The two limits batchpilot steers.

    Attributes:
        max_num_seqs: Most sequences in RUNNING.
        max_num_batched_tokens: Most tokens one step may schedule, decodes and prefills together.
    """

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What does not change while an engine runs.

    Attributes:
        startup_limits: The limits the engine was started with; its buffers are sized by them.
        total_blocks: KV blocks that requests can use.
        block_size: Tokens per KV block.
        tokens_per_decode: Most tokens one decoding sequence takes of a step: 1, more when
            speculating.
        unchunked_prefill_tokens: Prompt tokens that must fit one step: the longest prompt without
            chunked prefill, whole images where those may not be split; else 0.
        prefill_block_tokens: Tokens a prefill advances by where it must end on a block (Mamba
            layers whose state is cached); 0 where any number will do.
        kv_growth: What a sequence holds of the KV cache, by its context.
    """

    startup_limits: BatchLimits
    total_blocks: int
    block_size: int
    tokens_per_decode: int = 1
    unchunked_prefill_tokens: int = 0
    prefill_block_tokens: int = 0
    kv_growth: KvGrowth = EVERY_TOKEN

    @property
    def kv_capacity_tokens(self) -> int:
        """The papers' eta: tokens the KV cache can hold."""
        return self.total_blocks * self.block_size


class SequenceState(NamedTuple):
    """One sequence, running or waiting.

    Attributes:
        kv_tokens: Tokens it holds in the KV cache now; 0 while it waits.
        output_tokens: Tokens it has generated so far: its age, for a length estimator.
        prefill_tokens_left: Tokens it must still compute before it generates (again); 0 when it
            decodes.
    """

    kv_tokens: int
    output_tokens: int
    prefill_tokens_left: int


def _none_running() -> Sequence[SequenceState]:
    return ()


def _none_waiting(count: int) -> Sequence[SequenceState]:
    del count
    return ()


class EngineSnapshot(NamedTuple):
    """What is seen just before a step.

    Attributes:
        engine: What does not change.
        clock_seconds: Engine time, monotonic; virtual in a simulation.
        running: Sequences in RUNNING (the papers' N), of which `prefill_seqs` still prefill.
        waiting: Requests that wait for admission.
        prefill_seqs: Sequences in RUNNING that have not finished their prompt.
        used_blocks: KV blocks that requests hold.
        binding: What kept the next request out in the previous step.
        prompt_computed: Tokens computed of the oldest prompt in RUNNING that is not finished.
        prompt_left: Tokens still to compute of it; 0 where none is, or nobody knows.
        read_running: Reads every running sequence; O(N), call it only when an admission is at hand.
        read_waiting: Reads up to `count` next waiting requests in queue order; may return fewer.
        prompts_done: Prompts that have been scheduled to their end since the start, so that a
            request that is gone can be told from one that had its first token; None where nobody
            knows.
        tokens_per_decode: Tokens one decoding sequence took of a step lately, where that is less
            than the engine's most, for drafts are not always found; None where nobody knows.
        outside_blocks: Of `used_blocks`, those held outside RUNNING: by paused streaming sessions,
            by requests whose KV is being loaded or, finished, sent elsewhere.
    """

    engine: EngineFacts
    clock_seconds: float
    running: int
    waiting: int
    prefill_seqs: int = 0
    used_blocks: int = 0
    binding: Binding = Binding.NONE
    prompt_computed: int = 0
    prompt_left: int = 0
    read_running: Callable[[], Sequence[SequenceState]] = _none_running
    read_waiting: Callable[[int], Sequence[SequenceState]] = _none_waiting
    prompts_done: int | None = None
    tokens_per_decode: float | None = None
    outside_blocks: int = 0

    @property
    def decode_seqs(self) -> int:
        """Sequences in RUNNING that decode."""
        return self.running - self.prefill_seqs

    def decode_tokens(self, sequences: int) -> int:
        """Tokens that so many decoding sequences are about to take of the step."""
        each = self.tokens_per_decode
        if each is None:
            return sequences * self.engine.tokens_per_decode
        return math.ceil(sequences * each)

    @property
    def blocks_for_running(self) -> int:
        """KV blocks that sequences in RUNNING hold or can have."""
        return self.engine.total_blocks - self.outside_blocks

    @property
    def blocks_of_running(self) -> int:
        """KV blocks that sequences in RUNNING hold."""
        return self.used_blocks - self.outside_blocks

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return self.used_blocks / self.engine.total_blocks


class FinishedRequest(NamedTuple):
    """A request that left RUNNING for good.

    Attributes:
        prompt_tokens: Length of its prompt.
        output_tokens: Tokens it generated.
        completed: False when it was aborted: its output would have gone on.
    """

    prompt_tokens: int
    output_tokens: int
    completed: bool


class StepRecord(NamedTuple):
    """What one engine step did and cost.

    Attributes:
        seconds: Time from the previous step's result to this one's, or from its scheduling where
            the engine stood idle before: what an inter-token latency feels.
        running: Sequences in RUNNING once the step was scheduled.
        decode_seqs: Sequences that decoded in it.
        prefill_tokens: Prompt tokens it computed (recomputed ones included).
        kv_tokens: Tokens held in the KV cache, from the blocks in use.
        preemptions: Sequences it preempted.
        recomputed_tokens: KV tokens those preemptions threw away, to be computed again.
        finished: Requests that ended since the previous step was scheduled.
        arrived: Prompt lengths of the requests that arrived since then.
        binding: What kept the next request out of it.
        regular: False where `seconds` says little of the batch: the first steps after start and
            the first after an idle gap.
        prefill_squares: What its prompts' tokens attended to: over the prompts, each computed from
            its token `start` to its token `end`, the sum of end^2 - start^2. 0 beside prompt tokens
            where nobody knows.
        cached_tokens: Prompt tokens that the requests it admitted for the first time found in the
            prefix cache, or had from elsewhere: they are not computed.
    """

    seconds: float
    running: int
    decode_seqs: int
    prefill_tokens: int
    kv_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    finished: tuple[FinishedRequest, ...] = ()
    arrived: tuple[int, ...] = ()
    binding: Binding = Binding.NONE
    regular: bool = True
    prefill_squares: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """Limits, and why.

    Attributes:
        limits: What to apply.
        source: Who decided.
        reason: A short phrase for logs; constant per branch, so that deciding allocates little.
        binding: What keeps the next request out; filled in by the shield.
        is_whole: It is part of a plan over several steps, such as prompts that wait to be computed
            together: who shifts limits leaves it as it is.
        wanted_seqs: What `max_num_seqs` would be if fewer ran, where it is no more than what runs
            for that reason alone; 0 where nobody knows, but the door is shut; None where the limit
            means itself.
    """

    limits: BatchLimits
    source: Source
    reason: str
    binding: Binding = Binding.NONE
    is_whole: bool = False
    wanted_seqs: int | None = None

    @property
    def wanted(self) -> BatchLimits:
        """The limits as they would be if fewer ran, as far as that is known."""
        seqs, limits = self.wanted_seqs, self.limits
        if not seqs or seqs >= limits.max_num_seqs:
            return limits
        return BatchLimits(seqs, limits.max_num_batched_tokens)


def binding_constraint(
    *, running: int, waiting: int, max_num_seqs: int, scheduled_tokens: int, token_budget: int
) -> Binding:
    """Names what kept the next request out of a step that has just been scheduled.

    Args:
        running: Sequences in RUNNING after the step was scheduled.
        waiting: Requests still waiting.
        max_num_seqs: The sequence limit it was scheduled under.
        scheduled_tokens: Tokens it scheduled.
        token_budget: The token limit it was scheduled under.
    """
    if waiting == 0:
        return _NONE
    if running >= max_num_seqs:
        return _MAX_NUM_SEQS
    if scheduled_tokens >= token_budget:
        return _TOKEN_BUDGET
    return _KV_CACHE
