"""One episode of an environment: requests in, step records out, limits applied."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchpilot.agents.acting import ActingPolicy
from batchpilot.agents.actions import Action, ActionScale
from batchpilot.agents.limits import BatchLimits, Binding, Decision, EngineSnapshot
from batchpilot.agents.telemetry import TelemetryWindow, WindowBuilder
from batchpilot.env.engine import Engine
from batchpilot.env.env_parameters import EnvParameters
from batchpilot.env.request_stream import RequestStream
from batchpilot.env.reward import IntervalService, ServiceLedger
from batchpilot.env.virtual_engine import VirtualEngine
from batchpilot.env.workloads import WorkloadSpec

#: Engine steps without time passing after which something is wrong.
_MOST_STANDSTILL_STEPS = 10_000


class DirectedPolicy(ActingPolicy):
    """The environment's hand on the hook: an acting policy that remembers what it proposed.

    Formula: that of `ActingPolicy`.
    """

    proposed: BatchLimits | None = None

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """The action's limits, for the shield to clamp."""
        decision = super().decide(snapshot)
        self.proposed = decision.limits
        return decision


@dataclass(frozen=True)
class OpenedEngine:
    """An engine, and what an environment must know of it.

    Attributes:
        engine: The engine.
        vocab_size: Token ids of prompts stay below it.
        max_model_len: Longest prompt and output together.
        capacity_tokens_per_s: What it can give at most on the workload's mean lengths.
        mean_output_tokens: Of the workload.
    """

    engine: Engine
    vocab_size: int
    max_model_len: int
    capacity_tokens_per_s: float
    mean_output_tokens: float

    @property
    def capacity_requests_per_s(self) -> float:
        """Requests of mean length that it can finish at most."""
        return self.capacity_tokens_per_s / self.mean_output_tokens


@dataclass(frozen=True, slots=True)
class Interval:
    """What one decision interval brought.

    Attributes:
        proposed: What the action asked for in the newest engine step; start-up limits before the
            first.
        window: The interval's telemetry.
        service: How its requests were served.
        shielded: Whether the shield changed the newest proposal.
        shielded_share: Share of its engine steps in which the shield did.
        episode_shielded_share: The same of the whole episode so far.
        binding: What kept the next request out of its newest engine step.
        clock_seconds: Since the start of the episode.
    """

    proposed: BatchLimits
    window: TelemetryWindow
    service: IntervalService
    shielded: bool
    shielded_share: float
    episode_shielded_share: float
    binding: Binding
    clock_seconds: float


class Episode:
    """One episode on an engine: requests in, records out, limits applied."""

    def __init__(self, opened: OpenedEngine, params: EnvParameters, spec: WorkloadSpec) -> None:
        """Empties the engine and takes its policy's place."""
        self._engine = opened.engine
        self._params = params
        _reset_engine(self._engine, spec.seed)
        facts = self._engine.facts
        if params.action_design == "absolute":
            ActionScale(
                params.actions.lowest, facts.startup_limits
            )  # checks that there is a choice
        self._policy = DirectedPolicy(params.actions, params.build_base_policy())
        self._engine.set_policy(self._policy)
        self._stream = RequestStream(
            spec,
            horizon_seconds=params.horizon_s,
            vocab_size=opened.vocab_size,
            max_model_len=min(opened.max_model_len, facts.kv_capacity_tokens + 1),
            refill_below=facts.startup_limits.max_num_seqs,
            random_start=params.random_start,
        )
        self.ledger = ServiceLedger(params)
        self._open_ids: set[str] = set()
        self._builder = WindowBuilder(params.itl_slo_seconds)
        self._started_at = self._window_from = self._engine.clock_seconds
        self._shielded_steps = 0
        self._episode_steps = self._episode_shielded_steps = 0
        self._binding = Binding.NONE

    @property
    def is_over(self) -> bool:
        """Whether the horizon is reached."""
        return self._seconds >= self._params.horizon_s

    @property
    def _seconds(self) -> float:
        return self._engine.clock_seconds - self._started_at

    def run_interval(self, action: Action) -> Interval:
        """Serves until the interval's time is up."""
        self._policy.act(action)
        until = self._engine.clock_seconds + self._params.decision_interval_s
        self._shielded_steps, self._binding = 0, Binding.NONE
        standstill = 0
        while self._engine.clock_seconds < until:
            before = self._engine.clock_seconds
            self._submit_due()
            if self._engine.has_unfinished_requests():
                self._step()
            else:
                self._idle(until)
            standstill = standstill + 1 if self._engine.clock_seconds <= before else 0
            if standstill > _MOST_STANDSTILL_STEPS:
                raise RuntimeError(f"the engine's clock stands still at {before:g} s")
        return self._report()

    def close_window(self) -> TelemetryWindow:
        """The telemetry since the last window."""
        now = self._engine.clock_seconds
        seconds, self._window_from = now - self._window_from, now
        return self._builder.close(
            self._engine.snapshot(), seconds=seconds, limits=self._engine.applied_limits
        )

    def abandon(self) -> None:
        """Aborts what is unfinished."""
        for request_id in sorted(self._open_ids):
            self._engine.abort_request(request_id)
        self._open_ids.clear()

    def _submit_due(self) -> None:
        seconds = self._engine.clock_seconds - self._started_at
        for arrival in self._stream.due(seconds, self._waiting):
            # One that came while a step ran has waited since then.
            arrived_at = self._started_at + arrival.seconds
            request = arrival.request
            self.ledger.submitted(request.request_id, arrived_at, request.output_tokens)
            self._engine.add_request(request)
            self._open_ids.add(request.request_id)

    def _waiting(self) -> int:
        return self._engine.snapshot().waiting

    def _step(self) -> None:
        step = self._engine.step()
        self.ledger.stepped(step)
        self._open_ids.difference_update(step.finished)
        if step.record is not None:
            self._builder.add(step.record)
            self._binding = step.record.binding
            if self._engine.applied_limits != self._policy.proposed:
                self._shielded_steps += 1

    def _idle(self, until: float) -> None:
        """Lets time pass to the next arrival, or to the interval's end where that is earlier."""
        planned = self._stream.next_seconds
        arrival = math.inf if planned is None else self._started_at + planned
        self._engine.wait_until(min(until, arrival))

    def _report(self) -> Interval:
        now = self._engine.clock_seconds
        proposed = self._policy.proposed or self._engine.facts.startup_limits
        steps = self._builder.steps
        self._episode_steps += steps
        self._episode_shielded_steps += self._shielded_steps
        return Interval(
            proposed=proposed,
            window=self.close_window(),
            service=self.ledger.close_interval(now),
            shielded=steps > 0 and self._engine.applied_limits != proposed,
            shielded_share=self._shielded_steps / max(1, steps),
            episode_shielded_share=self._episode_shielded_steps / max(1, self._episode_steps),
            binding=self._binding,
            clock_seconds=now - self._started_at,
        )


def _reset_engine(engine: Engine, seed: int) -> None:
    """Empties it; a virtual one also gets the episode's noise."""
    if isinstance(engine, VirtualEngine):
        engine.reset(seed)
    else:
        engine.reset()
