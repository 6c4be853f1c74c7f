"""`learned`: limits from a trained network, relative to what an analytic policy decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchpilot.agents.acting import FOLLOWS_ACTION, ActingPolicy
from batchpilot.agents.features import LatencyTargets, observation
from batchpilot.agents.history import Floats32, ObservationHistory
from batchpilot.agents.learned_model import ModelError, PolicyModel
from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, StepRecord
from batchpilot.agents.manifest import Manifest
from batchpilot.agents.parameters import parameter
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shield import SafetyBounds, shield
from batchpilot.agents.telemetry import WindowBuilder

MODEL_FAILED = "the network failed: the base policy decides"


@dataclass(frozen=True)
class LearnedParameters(LatencyTargets):
    """Parameters of `learned`: which trained policy, and the targets it is to keep."""

    artefact: str = parameter(
        "", help="a folder (with a slash in it), NAME@VERSION, or NAME: the version in force"
    )
    group: str = parameter("default", help="the engine group whose version in force is meant")


class LearnedPolicy:
    """Limits from a trained network, which acts once an interval; its actions hold in between.

    Formula: every decision interval of engine time the steps since the last are summed into a
    window, the window becomes an observation (`batchpilot.agents.features`), the network gives an
    action for it, and `batchpilot.agents.actions` maps the action to limits: for the residual
    designs relative to what the base policy decides, step by step. Action 0 is the base policy.

    Regimes: before its first steps it sees an empty window, as in training. Time that the engine
    stood idle becomes empty windows. Where the network fails or gives no number, the base policy
    decides, until the next interval.

    Limitations: it knows what its training showed it; a model, a GPU or a traffic far from that
    may be served worse than by its base. The limits in force that it sees are its own after the
    shield with default bounds: tighter ones set by an operator it does not know.

    Args:
        model: The network.
        manifest: What it takes and gives.
        base: What actions are relative to, and who stands in.
        targets: The latency targets; those not set are the manifest's.
    """

    def __init__(
        self, model: PolicyModel, manifest: Manifest, base: LimitPolicy, targets: LatencyTargets
    ) -> None:
        """Starts before the first window."""
        trained = manifest.targets
        self.manifest = manifest
        self.targets = LatencyTargets(
            targets.itl_slo_ms or trained.itl_slo_ms, targets.ttft_slo_ms or trained.ttft_slo_ms
        )
        self.observed: Floats32 | None = None
        self.failures = 0
        self._model = model
        self._acting = ActingPolicy(manifest.action, base)
        self._history = ObservationHistory(manifest.history)
        self._interval = manifest.decision_interval_s
        self._bounds = SafetyBounds()
        self._decided: Decision | None = None
        self._decided_for: EngineSnapshot | None = None
        self._start()

    def observe(self, step: StepRecord) -> None:
        """Adds the step to the window, and shows it to the base policy."""
        self._builder.add(step)
        self._busy_seconds += step.seconds
        self._acting.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Lets the network act where an interval is over; then follows its newest action."""
        now = snapshot.clock_seconds
        if now < self._window_from:  # the engine's clock was set back: another run begins
            self._start()
        if now - self._window_from >= self._interval or self._decided is None:
            self._act(snapshot, now)
        self._decided = self._acting.decide(snapshot)
        self._decided_for = snapshot
        return self._decided

    def _start(self) -> None:
        self._builder = WindowBuilder(self.targets.itl_slo_seconds)
        self._history.clear()
        self._model.clear()
        self._acting.act(None)
        self._busy_seconds = 0.0
        self._window_from = -math.inf
        self._decided = self._decided_for = None

    def _act(self, snapshot: EngineSnapshot, now: float) -> None:
        """Closes the window, and asks the network what to do."""
        elapsed = now - self._window_from if self._decided is not None else 0.0
        idle = min(elapsed - self._busy_seconds, elapsed - self._interval)
        empty = int(idle // self._interval)
        if empty > 0:
            self._see_idle(snapshot, elapsed - empty * self._interval, empty)
        else:
            self._see(snapshot, elapsed)
        self._window_from, self._busy_seconds = now, 0.0
        assert self.observed is not None
        try:
            action = self.manifest.action.chosen(self._model.run(self.observed).tolist())
        except (ModelError, ValueError):
            self.failures += 1
            self._acting.act(None, MODEL_FAILED)
        else:
            self._acting.act(action, FOLLOWS_ACTION)

    def _see_idle(self, snapshot: EngineSnapshot, busy_part: float, empty: int) -> None:
        """The engine stood idle for whole intervals, each of which is a window of its own."""
        idle = EngineSnapshot(snapshot.engine, snapshot.clock_seconds, running=0, waiting=0)
        self._see(idle, busy_part)
        for _ in range(min(empty, self.manifest.history)):
            self._see(idle, self._interval)

    def _see(self, snapshot: EngineSnapshot, seconds: float) -> None:
        window = self._builder.close(snapshot, seconds=seconds, limits=self._in_force(snapshot))
        seen = observation(window, snapshot.engine, self.targets)
        self.observed = self._history.push(seen)

    def _in_force(self, snapshot: EngineSnapshot) -> BatchLimits:
        """The limits of the newest step, as the shield made them."""
        if self._decided is None or self._decided_for is None:
            return snapshot.engine.startup_limits
        return shield(self._decided.limits, self._decided_for, self._bounds).limits
