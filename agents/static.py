"""`static`: fixed limits, the baseline every other policy is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.parameters import Parameters, parameter


@dataclass(frozen=True)
class StaticParameters(Parameters):
    """Which pair `static` holds."""

    max_num_seqs: int | None = parameter(
        None, minimum=1, help="sequences in RUNNING; the start-up value when left out"
    )
    max_num_batched_tokens: int | None = parameter(
        None, minimum=1, help="tokens a step; the start-up value when left out"
    )


class StaticPolicy:
    """Fixed limits: what vLLM does by itself, or another fixed pair without a restart.

    Formula: none. Without parameters both limits are the start-up ones.

    Limitations: the best pair moves with the traffic; a pair that is right for short prompts
    preempts on long ones.
    """

    def __init__(self, params: StaticParameters) -> None:
        """Keeps the pair."""
        self._params = params
        self._decision: Decision | None = None

    def observe(self, step: StepRecord) -> None:
        """Learns nothing."""

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The pair, whatever is seen."""
        if self._decision is None:
            startup = snapshot.engine.startup_limits
            limits = BatchLimits(
                self._params.max_num_seqs or startup.max_num_seqs,
                self._params.max_num_batched_tokens or startup.max_num_batched_tokens,
            )
            self._decision = Decision(limits, Source.STATIC, "fixed")
        return self._decision
