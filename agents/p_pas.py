"""`p-pas`: a smaller token budget while several prefills would share a step with decodes."""

from __future__ import annotations

from dataclasses import dataclass

from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.parameters import Parameters, parameter


@dataclass(frozen=True)
class PPasParameters(Parameters):
    """Parameters of `p-pas`."""

    contended_tokens: int = parameter(
        2048, minimum=1, help="token budget while prefills contend with decodes"
    )
    contending_prefills: int = parameter(
        2, minimum=1, help="active prefills from which on they contend"
    )


class PPasPolicy:
    """P-PAS: two token budgets, chosen by how many prefills are active beside decodes.

    Formula: max_num_batched_tokens = `contended_tokens` while at least `contending_prefills`
    prefills are active and something decodes, else the start-up value; max_num_seqs is the start-up
    value. Active prefills of the coming step are those in RUNNING that have not finished their
    prompt and those waiting that the sequence limit has room for. Source: arXiv:2608.15171.

    Regimes: a single long prompt, or prompts with nothing decoding, go through at full speed; a
    burst of prompts beside decodes is cut into smaller steps.

    Limitations: the smaller budget is a constant, not made from a target or the GPU's speed, and an
    engine whose start-up budget is not above it sees no difference. It does nothing about memory.
    """

    def __init__(self, params: PPasParameters) -> None:
        """Keeps the parameters; the two decisions are made when the engine is known."""
        self._params = params
        self._decisions: tuple[Decision, Decision] | None = None

    def observe(self, step: StepRecord) -> None:
        """Learns nothing: the snapshot says all it needs."""

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The full budget, or the contended one."""
        if self._decisions is None:
            self._decisions = self._both(snapshot.engine.startup_limits)
        room = snapshot.engine.startup_limits.max_num_seqs - snapshot.running
        prefills = snapshot.prefill_seqs + min(snapshot.waiting, max(room, 0))
        contended = prefills >= self._params.contending_prefills and snapshot.decode_seqs > 0
        return self._decisions[contended]

    def _both(self, startup: BatchLimits) -> tuple[Decision, Decision]:
        least = min(self._params.contended_tokens, startup.max_num_batched_tokens)
        return (
            Decision(startup, Source.SLA, "prefills do not contend"),
            Decision(
                BatchLimits(startup.max_num_seqs, least), Source.SLA, "prefills beside decodes"
            ),
        )
