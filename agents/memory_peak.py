"""`memory-peak`: admit while the memory that the batch will need at its worst still fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import NormalDist

import numpy as np

from batchpilot.agents.future_peak import Growing, admissible
from batchpilot.agents.lengths import LengthEstimate, LengthEstimator
from batchpilot.agents.limits import Decision, EngineSnapshot, SequenceState, StepRecord
from batchpilot.agents.memory import (
    MemoryParameters,
    MemoryPolicy,
    memory_decision,
    startup_decision,
)
from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.agents.survival import Floats

#: Most requests that one look lets in: those that wait, then as many to come of the mean prompt.
CANDIDATES = 64
#: A look costs O(N); one every N / 32 steps at most keeps a step O(1) on average.
SEQUENCES_LOOKED_AT_PER_STEP = 32
#: An estimate whose stated error is larger is not used: the first completions are enough.
LARGEST_RELATIVE_ERROR = 1.0
#: Overflows risked, at most, while as many requests are let in as run: so many, over their number.
TURNOVER_RISK = 120.0
#: Until lengths are known, sequences are taken to grow by a third of what they hold.
COLD_START_MEMORY_FACTOR = 0.75


@dataclass(frozen=True)
class MemoryPeakParameters(Parameters):
    """Parameters of `memory-peak`."""

    memory_overflow_probability: float = parameter(
        0.15, above=0, below=0.5, help="eps_M: how often the peak to come may overflow, at most"
    )
    recheck_steps: int = parameter(
        16, minimum=1, help="steps after which a closed door is tried again without an event"
    )


class MemoryPeakPolicy:
    """Admits while the peak of the future, not the memory of now, fits the KV cache.

    Formula (after LightLLM's Past-Future scheduler, arXiv:2507.10150): in step t from now sequence
    i, of age a_i and with c_i tokens held, holds c_i + t with probability p_i(t) that it lives to
    see it. The limit is N + j for the largest j such that N running and the next j waiting requests
    keep

        max over t of sum (c_i + t) p_i + theta sqrt(sum (c_i + t)^2 p_i (1 - p_i)) <= eta

    with theta = PhiInv(1 - min(eps_M, `TURNOVER_RISK` / N^2)). About every request's coming is such
    a bet: while a batch of N is replaced once it makes N of them, each to gain a share 1/N, and an
    overflow costs the same in any. c_i counts blocks really held: what prefix caching shares or
    block ends waste is scaled in. Where not every layer keeps every token, c_i + t is what a
    context that long holds (`KvGrowth`). What is held outside RUNNING is taken off eta.

    Regimes: until lengths are known to within `LARGEST_RELATIVE_ERROR` it is `memory` with three
    quarters of the cache to fill, as if every sequence were to grow by a third. Then it lets a
    batch grow while young sequences still have room to grow old, and closes the door early when
    many will peak together.

    Limitations: it does not know a request's own length, only the distribution of all; a shift of
    lengths is learned within some tens of completions. A look at every sequence costs O(N log N),
    so it grants places to as many requests as fit, those that wait and then others of the mean
    prompt, and looks again once they are in or after `recheck_steps`; a shut door is tried again
    when a sequence ends, no more often than every N / 32 steps. One that ends in between makes no
    room, and a preemption takes the grant back.

    Attributes:
        held_share: KV tokens held for each token of context of those that run, at most 1, as of the
            newest look: prefixes that sequences share are held once.
    """

    def __init__(
        self,
        params: MemoryPeakParameters,
        lengths: LengthEstimator | None = None,
        cold_start_memory_factor: float = COLD_START_MEMORY_FACTOR,
    ) -> None:
        """Starts without lengths, or with an estimator that another policy reads too."""
        self._overflow_probability = params.memory_overflow_probability
        self._recheck_steps = params.recheck_steps
        self._by_blocks = MemoryPolicy(MemoryParameters(memory_factor=cold_start_memory_factor))
        self._lengths = lengths or LengthEstimator()
        self._decision: Decision | None = None
        self._idle: Decision | None = None
        self._running = 0
        self._grant = 0
        self._guesses = True
        self._steps_since_look = params.recheck_steps
        self._must_look = True
        self.held_share = 1.0

    def observe(self, step: StepRecord) -> None:
        """Counts arrivals and completions; a preemption shuts the door until the next look."""
        self._lengths.observe(step)
        if step.preemptions:
            self._grant = 0

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Opens the door for as many as a look finds room for; they may come in over many steps."""
        running, waiting = snapshot.running, snapshot.waiting
        self._steps_since_look += 1
        if running > self._running:
            self._grant = max(0, self._grant - (running - self._running))
        # Fewer run than a step ago: some have ended or were preempted, and the peak has moved.
        elif running < self._running:
            self._must_look = True
        self._running = running
        if not waiting:
            self._must_look, self._grant = True, 0
            self._decision = self._idle = self._idle or startup_decision(snapshot, "nothing waits")
        elif self._decision is None or self._may_look(snapshot):
            self._decision = self._look(snapshot)
        else:
            reason = "peak of future memory, as last looked at"
            self._decision = memory_decision(
                snapshot, self._granted(snapshot), reason, self._decision
            )
        return self._decision

    def _granted(self, snapshot: EngineSnapshot) -> int:
        """The sequences granted; 0 for nobody more.

        Where nobody more could come in, nothing has been looked at and memory shuts no door.
        """
        is_full = snapshot.running >= snapshot.engine.startup_limits.max_num_seqs
        return snapshot.running + self._grant if self._grant or is_full else 0

    def _may_look(self, snapshot: EngineSnapshot) -> bool:
        """Whether a look is due: not where nobody could come in, nor while those granted do."""
        if snapshot.running >= snapshot.engine.startup_limits.max_num_seqs:
            return False
        if self._must_look and (self._grant == 0 or self._guesses):
            return self._steps_since_look > snapshot.running // SEQUENCES_LOOKED_AT_PER_STEP
        return self._steps_since_look >= self._recheck_steps

    def _look(self, snapshot: EngineSnapshot) -> Decision:
        running = snapshot.read_running()
        waiting = snapshot.read_waiting(min(CANDIDATES, snapshot.waiting))
        lengths = self._lengths.latest
        if self._lengths.is_stale:
            # Preempted requests wait at the head of the queue; they too have an age.
            lengths = self._lengths.estimate([s.output_tokens for s in (*running, *waiting)])
        self._steps_since_look = 0
        if lengths is None or lengths.relative_error > LARGEST_RELATIVE_ERROR or not running:
            self._must_look = self._guesses = True
            decision = self._by_blocks.decide(snapshot)
            self._grant = max(0, decision.limits.max_num_seqs - snapshot.running)
            return decision
        self._guesses = False
        # Who comes before the next look shall not wait for it.
        to_come = SequenceState(0, 0, round(lengths.prompt_mean))
        candidates = [*waiting, *[to_come] * (CANDIDATES - len(waiting))]
        self._grant = self._admissible(snapshot, running, candidates, lengths)
        # Once those are in there may be room for more.
        self._must_look = self._grant > 0
        return memory_decision(snapshot, self._granted(snapshot), "peak of future memory")

    def _admissible(
        self,
        snapshot: EngineSnapshot,
        running: Sequence[SequenceState],
        waiting: Sequence[SequenceState],
        lengths: LengthEstimate,
    ) -> int:
        computed_now, ages, left = _columns(running)
        new_computed, new_ages, new_left = _columns(waiting)
        engine, growth = snapshot.engine, snapshot.engine.kv_growth
        tokens_in_blocks = snapshot.blocks_of_running * engine.block_size
        computed = float(computed_now.sum())
        scale = self.held_share = 1.0
        if computed and tokens_in_blocks > 0:
            scale = tokens_in_blocks / float(growth.held(computed_now).sum())
            self.held_share = min(tokens_in_blocks / computed, 1.0)
        # What each holds once its prompt is in.
        context, new_context = computed_now + left, new_computed + new_left
        return admissible(
            Growing(growth.held(context) * scale, ages, context),
            Growing(growth.held(new_context) * scale, new_ages, new_context),
            lengths.output,
            capacity=snapshot.blocks_for_running * engine.block_size,
            deviations=self._deviations(len(running)),
            growth=growth,
        )

    def _deviations(self, running: int) -> float:
        """Standard deviations kept in reserve beside so many sequences."""
        risked = min(self._overflow_probability, TURNOVER_RISK / (running * running))
        return NormalDist().inv_cdf(1 - risked)


def _columns(sequences: Sequence[SequenceState]) -> Floats:
    """KV tokens, output tokens and prefill tokens left of each; shape (3, n)."""
    numbers = np.fromiter(chain.from_iterable(sequences), np.float64, 3 * len(sequences))
    return numbers.reshape(-1, 3).T
