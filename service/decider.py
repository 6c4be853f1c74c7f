"""Shows an engine's reports to a policy as if it stood beside the engine, and shields its answer.

What answers a report holds for many steps, of which nobody here knows what will run: limits are
what the policy wants, and the engine's own shield holds them up for as long as more run.

A policy learns from step records. With DETAIL_STEPS a report brings them; with DETAIL_WINDOW it
brings their sums, and the policy is shown as many mean steps as there were: what is bound by what
is kept, as are all sums, to within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    Decision,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    SequenceState,
    StepRecord,
)
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shield import Clamp, SafetyBounds, shield_ahead
from batchpilot.agents.telemetry import WindowBuilder
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.wire import BINDINGS, sequences, step_record

#: Most mean steps, and most mean requests, that one report shows a policy: bounds its cost.
MOST_SHOWN = 1000
#: Share of what runs that is leased where a policy lets nobody in and cannot say how many it wants.
SHUT_SHARE = 0.95
#: The sums of a window that `mean_steps` makes steps of.
_SHOWN_SUMS = (
    "steps",
    "busy_seconds",
    "decode_tokens",
    "prefill_tokens",
    "running_seconds",
    "kv_token_seconds",
    "preemptions",
    "recomputed_tokens",
    "arrived",
    "arrived_prompt_tokens",
    "finished",
    "finished_output_tokens",
    "kv_bound_steps",
    "seqs_bound_steps",
    "tokens_bound_steps",
)


class ShieldedDecision(NamedTuple):
    """What a policy wanted, and what the shield made of it."""

    decision: Decision
    limits: BatchLimits
    clamp: Clamp


class Decider:
    """One policy for one engine.

    Args:
        policy: Fresh; it hears only of this engine.
        facts: The engine's.
        bounds: What the engine's operator and its group allow.
    """

    def __init__(self, policy: LimitPolicy, facts: EngineFacts, bounds: SafetyBounds) -> None:
        """Starts the engine's clock at 0: only differences matter to a policy."""
        self._policy = policy
        self._facts = facts
        self._bounds = bounds
        self._clock_seconds = 0.0
        self._has_begun = False

    def decide(self, report: pb.Report) -> ShieldedDecision:
        """Learns from a report and decides on the state at its end.

        Raises:
            Exception: Whatever the policy raises.
        """
        window = report.window
        self._clock_seconds += window.seconds
        snapshot = self._snapshot(report)
        if not self._has_begun:  # in an engine, too, a policy decides before it sees a step
            self._has_begun = True
            self._policy.decide(snapshot)
        if report.steps:
            decision = self._replay(report, snapshot)
        else:
            observe = self._policy.observe
            for step, count in mean_steps(window):
                for _ in range(count):
                    observe(step)
            decision = self._policy.decide(snapshot)
        wanted = _for_a_lease(decision, snapshot.running)
        limits, clamp = shield_ahead(wanted, self._facts, self._bounds)
        return ShieldedDecision(decision, limits, clamp)

    def _replay(self, report: pb.Report, last: EngineSnapshot) -> Decision:
        """Decides after every step, as in the engine: some policies count time or decisions.

        The state after each step but the last is put together from what the step tells; queue and
        sequences are those of the report's end, the only ones known. Steps before those, which only
        the sums tell of, are shown as mean ones that teach no step time.
        """
        steps = [step_record(message) for message in report.steps]
        for step, count in mean_steps(rest_of_window(report.window, steps, last)):
            for _ in range(count):
                self._policy.observe(step._replace(regular=False))
        clock = last.clock_seconds - sum(step.seconds for step in steps)
        for step in steps[:-1]:
            clock += step.seconds
            self._policy.observe(step)
            self._policy.decide(
                last._replace(
                    clock_seconds=clock,
                    running=step.running,
                    prefill_seqs=step.running - step.decode_seqs,
                    used_blocks=min(
                        step.kv_tokens // self._facts.block_size, self._facts.total_blocks
                    ),
                    binding=step.binding,
                )
            )
        self._policy.observe(steps[-1])
        return self._policy.decide(last)

    def _snapshot(self, report: pb.Report) -> EngineSnapshot:
        window = report.window
        running, waiting = report.running, report.waiting
        return EngineSnapshot(
            engine=self._facts,
            clock_seconds=self._clock_seconds,
            running=window.running,
            waiting=window.waiting,
            prefill_seqs=window.prefill_seqs,
            used_blocks=window.used_blocks,
            binding=BINDINGS[report.binding],
            read_running=cache(lambda: sequences(running)),
            read_waiting=_first(cache(lambda: sequences(waiting))),
            tokens_per_decode=(
                report.tokens_per_decode if report.HasField("tokens_per_decode") else None
            ),
            outside_blocks=report.outside_blocks,
        )


def _first(
    read: Callable[[], Sequence[SequenceState]],
) -> Callable[[int], Sequence[SequenceState]]:
    """Reads the first of what is read."""
    return lambda count: read()[:count]


def _for_a_lease(decision: Decision, running: int) -> BatchLimits:
    """A policy's limits for as long as a lease runs, which is longer than one step.

    What runs holds a policy's limit up for the step that is next. On lease it would let in another
    for each sequence that ends, so that no limit could fall while requests wait.
    """
    limits = decision.limits
    if decision.wanted_seqs != 0:
        return decision.wanted
    seqs = min(round(SHUT_SHARE * running), limits.max_num_seqs)
    return BatchLimits(seqs, limits.max_num_batched_tokens)


def rest_of_window(
    window: pb.TelemetryWindow, steps: Sequence[StepRecord], last: EngineSnapshot
) -> pb.TelemetryWindow:
    """What a report's sums tell of beside its steps: a hook leaves out the oldest of very many."""
    rest = pb.TelemetryWindow()
    if window.steps <= len(steps):
        return rest
    builder = WindowBuilder()
    for step in steps:
        builder.add(step)
    told = builder.close(last, seconds=0.0, limits=last.engine.startup_limits)
    for name in _SHOWN_SUMS:
        setattr(rest, name, max(0, getattr(window, name) - getattr(told, name)))
    return rest


def mean_steps(window: pb.TelemetryWindow) -> list[tuple[StepRecord, int]]:
    """The steps of a window as mean records, each with how often it comes.

    Those bound by the same constraint are equal. Arrivals, completions (at their mean lengths)
    and preemptions come with the last.
    """
    steps, busy = window.steps, window.busy_seconds
    if not steps:
        return []
    # Built by position: this runs for every report, and `_replace` costs four times as much.
    mean = (
        busy / steps,
        round(window.running_seconds / busy) if busy else window.running,
        round(window.decode_tokens / steps),
        round(window.prefill_tokens / steps),
        round(window.kv_token_seconds / busy) if busy else 0,
    )
    kv_bound, seqs_bound = window.kv_bound_steps, window.seqs_bound_steps
    tokens_bound = window.tokens_bound_steps
    counts = (
        (Binding.KV_CACHE, kv_bound),
        (Binding.MAX_NUM_SEQS, seqs_bound),
        (Binding.TOKEN_BUDGET, tokens_bound),
        (Binding.NONE, steps - kv_bound - seqs_bound - tokens_bound),
    )
    shown = [
        (StepRecord(*mean, 0, 0, (), (), binding), _shown(count, steps))
        for binding, count in counts
        if count
    ]
    if window.arrived or window.finished or window.preemptions:
        step, count = shown.pop()
        if count > 1:
            shown.append((step, count - 1))
        shown.append((_with_events(step, window), 1))
    return shown


def _shown(count: int, steps: int) -> int:
    """How many of so many equal steps are shown, out of all steps of a window."""
    return count if steps <= MOST_SHOWN else max(1, count * MOST_SHOWN // steps)


def _with_events(step: StepRecord, window: pb.TelemetryWindow) -> StepRecord:
    arrived, finished = window.arrived, window.finished
    prompt = round(window.arrived_prompt_tokens / arrived) if arrived else 0
    output = round(window.finished_output_tokens / finished) if finished else 0
    return StepRecord(
        *step[:5],
        window.preemptions,
        window.recomputed_tokens,
        (FinishedRequest(prompt, output, True),) * min(finished, MOST_SHOWN),
        (prompt,) * min(arrived, MOST_SHOWN),
        step.binding,
    )
