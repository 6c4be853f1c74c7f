"""`memory+sla`: the lesser of a memory rule's limit and a latency rule's."""

from __future__ import annotations

from dataclasses import dataclass

from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.memory import (
    MemoryCltParameters,
    MemoryCltPolicy,
    MemoryParameters,
    MemoryPolicy,
)
from batchpilot.agents.memory_peak import MemoryPeakParameters, MemoryPeakPolicy
from batchpilot.agents.parameters import parameter
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.sla import SlaGuardedPolicy, SlaParameters, SlaPolicy


@dataclass(frozen=True)
class MemorySlaParameters(SlaParameters):
    """Parameters of `memory+sla`: those of `sla`, and which two rules are combined."""

    memory: str = parameter(
        "memory", choices=("memory", "memory-clt", "memory-peak"), help="the memory rule"
    )
    sla: str = parameter("sla-guarded", choices=("sla", "sla-guarded"), help="the latency rule")


class MemorySlaPolicy:
    """Both of the paper's algorithms at once.

    Formula: b = min(b_memory, b_sla), with N <= b <= B_max.

    Regimes: whichever is the lesser decides, and the reason says which.

    Limitations: those of its two parts. The latency rule learns only while its own limit is the
    one that binds.
    """

    def __init__(self, params: MemorySlaParameters) -> None:
        """Builds the two rules."""
        self._memory = _memory_rule(params.memory)
        self._sla = (SlaGuardedPolicy if params.sla == "sla-guarded" else SlaPolicy)(params)
        self._parts: tuple[Decision, Decision] | None = None
        self._decision: Decision | None = None

    def observe(self, step: StepRecord) -> None:
        """Shows the step to both."""
        self._memory.observe(step)
        self._sla.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The lesser of the two sequence limits."""
        memory, sla = self._memory.decide(snapshot), self._sla.decide(snapshot)
        parts = self._parts
        if self._decision is None or parts is None or parts[0] is not memory or parts[1] is not sla:
            self._parts = (memory, sla)
            lesser = memory if memory.limits.max_num_seqs <= sla.limits.max_num_seqs else sla
            startup = snapshot.engine.startup_limits
            limits = BatchLimits(lesser.limits.max_num_seqs, startup.max_num_batched_tokens)
            wanted = _wanted_seqs(memory, sla)
            self._decision = Decision(limits, Source.MEMORY_SLA, lesser.reason, wanted_seqs=wanted)
        return self._decision


def _wanted_seqs(memory: Decision, sla: Decision) -> int | None:
    """What the two want together; 0 where memory lets nobody in and no one says how many."""
    of_memory, of_sla = memory.limits.max_num_seqs, sla.limits.max_num_seqs
    if memory.wanted_seqs == 0 and of_memory <= of_sla:
        return sla.wanted_seqs or 0
    wanted = min(memory.wanted_seqs or of_memory, sla.wanted_seqs or of_sla)
    return wanted if wanted < min(of_memory, of_sla) else None


def _memory_rule(name: str) -> LimitPolicy:
    if name == "memory-clt":
        return MemoryCltPolicy(MemoryCltParameters())
    if name == "memory-peak":
        return MemoryPeakPolicy(MemoryPeakParameters())
    return MemoryPolicy(MemoryParameters())
