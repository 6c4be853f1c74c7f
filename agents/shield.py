"""The shield: one pure function between any proposal and the engine.

Whoever proposes (a formula, a model, an agent, a service), the same clamp applies, in the
environment and in the hook, and in the service as far as it does not depend on what runs:

    N <= max_num_seqs <= min(start-up value, operator's bound, memory bound)
    min_prefill_chunk + N * tokens_per_decode <= max_num_batched_tokens <= start-up value

where tokens_per_decode is what a decoding sequence has been taking of a step lately.

Both count sequences in RUNNING. Places that an engine holds for others, as vLLM's newer releases do
for paused streaming sessions, come on top of the limit where it is applied.

With chunked prefill off the longest prompt takes the chunk's place, and on hybrid models whose
prefills must end on a block of Mamba state a whole block, where those are larger. Where the two
sides cross, the left one wins: vLLM asserts it, and a running sequence is never taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot
from batchpilot.agents.parameters import Parameters, parameter


class Clamp(StrEnum):
    """Why a proposal was replaced by the nearest safe limits."""

    NONE = "none"
    RUNNING = "below_running"
    LOWER_BOUND = "below_lower_bound"
    UPPER_BOUND = "above_upper_bound"
    TOKEN_BUDGET_LOW = "token_budget_too_low"
    TOKEN_BUDGET_HIGH = "token_budget_too_high"
    NOT_A_NUMBER = "not_a_number"


@dataclass(frozen=True)
class SafetyBounds(Parameters):
    """What the operator allows, inside what the engine can do."""

    min_num_seqs: int = parameter(1, minimum=1, help="never admit fewer sequences than this")
    max_num_seqs: int | None = parameter(
        None, minimum=1, help="never admit more than this; the start-up value when left out"
    )
    min_prefill_chunk: int = parameter(
        64, minimum=1, help="prompt tokens a step always has room for beside its decodes"
    )


#: Reading a member through its class costs more than all else on the common path.
_NO_CLAMP = Clamp.NONE


class ShieldedLimits(NamedTuple):
    """Safe limits, and the first reason they differ from the proposal."""

    limits: BatchLimits
    clamp: Clamp


def shield(
    proposed: BatchLimits,
    snapshot: EngineSnapshot,
    bounds: SafetyBounds,
    memory_bound_seqs: int | None = None,
) -> ShieldedLimits:
    """Replaces a proposal by the nearest safe limits.

    Args:
        proposed: What a policy wants.
        snapshot: The engine just before the step.
        bounds: What the operator allows.
        memory_bound_seqs: A sequence limit from a memory rule, where one applies.
    """
    seqs, tokens = proposed.max_num_seqs, proposed.max_num_batched_tokens
    if type(seqs) is not int or type(tokens) is not int:
        safe = shield(snapshot.engine.startup_limits, snapshot, bounds, memory_bound_seqs)
        return ShieldedLimits(safe.limits, Clamp.NOT_A_NUMBER)
    seqs, seqs_clamp = _clamp_seqs(seqs, snapshot, bounds, memory_bound_seqs)
    tokens, tokens_clamp = _clamp_tokens(tokens, snapshot, bounds)
    if seqs_clamp is _NO_CLAMP and tokens_clamp is _NO_CLAMP:
        return ShieldedLimits(proposed, _NO_CLAMP)
    clamp = tokens_clamp if seqs_clamp is _NO_CLAMP else seqs_clamp
    return ShieldedLimits(BatchLimits(seqs, tokens), clamp)


def shield_ahead(
    proposed: BatchLimits, engine: EngineFacts, bounds: SafetyBounds
) -> ShieldedLimits:
    """The part of the shield that holds whatever runs: N is 0.

    For who decides on a state that is past when the limits are applied, as a service does: a limit
    held up by the sequences that ran then lets in another for each that ends, and never falls. The
    engine's own shield holds it up for as long as they run.

    Args:
        proposed: What a policy wants.
        engine: Whose limits they are.
        bounds: What the operator allows.
    """
    return shield(proposed, EngineSnapshot(engine, 0.0, running=0, waiting=0), bounds)


def _clamp_seqs(
    proposed: int, snapshot: EngineSnapshot, bounds: SafetyBounds, memory_bound_seqs: int | None
) -> tuple[int, Clamp]:
    startup = snapshot.engine.startup_limits.max_num_seqs
    upper = startup
    if bounds.max_num_seqs is not None and bounds.max_num_seqs < upper:
        upper = bounds.max_num_seqs
    if memory_bound_seqs is not None and memory_bound_seqs < upper:
        upper = memory_bound_seqs
    value, clamp = proposed, _NO_CLAMP
    if value > upper:
        value, clamp = upper, Clamp.UPPER_BOUND
    if value < bounds.min_num_seqs:
        value, clamp = bounds.min_num_seqs, Clamp.LOWER_BOUND
    if value < snapshot.running:
        value, clamp = snapshot.running, Clamp.RUNNING
    if value < 1:
        value = 1
    return (value if value < startup else startup), clamp


def _clamp_tokens(
    proposed: int, snapshot: EngineSnapshot, bounds: SafetyBounds
) -> tuple[int, Clamp]:
    engine = snapshot.engine
    upper = engine.startup_limits.max_num_batched_tokens
    chunk = bounds.min_prefill_chunk
    if chunk < engine.prefill_block_tokens:
        chunk = engine.prefill_block_tokens
    if chunk < engine.unchunked_prefill_tokens:
        chunk = engine.unchunked_prefill_tokens
    lower = chunk + snapshot.decode_tokens(snapshot.running)
    if proposed > upper:
        return upper, Clamp.TOKEN_BUDGET_HIGH
    if proposed < lower:
        return min(lower, upper), Clamp.TOKEN_BUDGET_LOW if upper > proposed else _NO_CLAMP
    return proposed, _NO_CLAMP
