"""`bandit`: learns online, without a network, by how much to stretch or shrink a base policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from batchpilot.agents.acting import ActingPolicy
from batchpilot.agents.actions import ActionDesign
from batchpilot.agents.features import FEATURE_NAMES, LatencyTargets, observation
from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, StepRecord
from batchpilot.agents.parameters import parameter
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.telemetry import TelemetryWindow, WindowBuilder

Floats = npt.NDArray[np.float64]

BASES = ("predictive", "memory-peak", "memory+sla", "memory", "static")
#: Factors of the base policy's two limits; an arm is a pair of them.
DESIGN = ActionDesign(
    design="grid",
    seqs_factors=(0.6, 0.8, 1.0, 1.25, 1.6),
    tokens_factors=(0.25, 0.5, 1.0),
)
#: What of an observation the gain of an arm may depend on.
CONTEXT = ("running", "waiting", "kv_cache_usage", "prefill_share", "mean_itl")
_CONTEXT_AT = tuple(FEATURE_NAMES.index(name) for name in CONTEXT)
#: Where each arm is: logarithms of its factors, over the largest of all.
POSITIONS = tuple(
    (
        math.log(seqs) / max(abs(math.log(factor)) for factor in DESIGN.seqs_factors),
        math.log(tokens) / max(abs(math.log(factor)) for factor in DESIGN.tokens_factors),
    )
    for seqs, tokens in map(DESIGN.grid.factors, range(DESIGN.grid.size))
)
#: Share of a window's steps in which a limit must bind, or a token be late, for it to teach.
TEACHES_FROM = 0.1
#: How firmly weights are believed to be 0 before anything is known, in rewards seen.
PRIOR = 0.05
#: The scale of rewards: what was served at best, forgotten by so much a window.
BEST_KEPT = 0.999
EXPLORES, HOLDS = "tries a margin around the base policy", "no limit binds: the base policy"


@dataclass(frozen=True)
class BanditParameters(LatencyTargets):
    """Parameters of `bandit`."""

    base: str = parameter("predictive", choices=BASES, help="the policy that is stretched")
    interval_seconds: float = parameter(2.0, above=0, help="engine time an arm holds")
    exploration: float = parameter(
        0.1, above=0, help="s: how much rewards scatter; more tries more"
    )
    memory: float = parameter(
        0.995, above=0, maximum=1, help="share of what was learned that a window leaves"
    )
    late_weight: float = parameter(1.0, minimum=0, help="cost of a late token, in tokens in time")
    seed: int = parameter(0, minimum=0, help="of the exploration")


class ThompsonSampler:
    """Bayesian linear regression of rewards, and arms drawn from what it leaves open.

    Formula (Agrawal and Goyal, "Thompson Sampling for Contextual Bandits with Linear Payoffs",
    2013, with forgetting): from A = p I on, A <- g A + (1 - g) p I + x x', b <- g b + r x; draw w
    from N(A^-1 b, s^2 A^-1) and take the arm whose x'w is greatest. p is `PRIOR`.

    Args:
        size: Numbers in x.
        exploration: s.
        memory: g, 1 forgets nothing.
        seed: Of the draws.
    """

    def __init__(self, size: int, *, exploration: float, memory: float, seed: int) -> None:
        """Starts knowing nothing."""
        self._prior = PRIOR * np.eye(size)
        self._precision = self._prior.copy()
        self._weighted = np.zeros(size)
        self._exploration = exploration
        self._memory = memory
        self._rng = np.random.default_rng(seed)

    @property
    def mean(self) -> Floats:
        """The weights as they are believed to be."""
        return np.asarray(np.linalg.solve(self._precision, self._weighted), dtype=np.float64)

    def learn(self, features: Floats, reward: float) -> None:
        """Takes in a reward and what it was for."""
        keep = self._memory
        kept = keep * self._precision + (1.0 - keep) * self._prior
        self._precision = kept + np.outer(features, features)
        self._weighted = keep * self._weighted + reward * features

    def choose(self, arms: Floats) -> int:
        """Draws weights, and returns the arm that is best under them.

        Args:
            arms: Shape (arms, size).
        """
        root = np.linalg.cholesky(self._precision)
        noise = np.linalg.solve(root.T, self._rng.standard_normal(len(self._weighted)))
        return int(np.argmax(arms @ (self.mean + self._exploration * noise)))


class BanditPolicy:
    """A contextual bandit over a small grid of margins around a base policy.

    Formula: every interval an arm, a pair of factors (f, g), shifts the base policy's two limits as
    `ResidualGrid` does. With u and v the logarithms of f and g, each over the largest of the grid,
    and context c (`CONTEXT`, of the window before), the reward of the interval is taken to be
    linear in

        x = (1, c, u, v, u^2, v^2, u c, v c)

    and Thompson sampling chooses the next arm. The reward, from the policy's own records:

        r = (tokens in time - late_weight * late tokens) / (seconds * best rate so far) - overdue

    Seconds, and those of the rates, are the steps': an arm is not to blame for a time without
    requests. A token is late where its step took longer than the ITL target. overdue = 1 - target
    / wait where the queue, at the pace it was served, waits longer than the TTFT target; 0
    otherwise, and where the engine stood idle for an interval: its queue has only just come.

    Regimes: where no limit binds and no token is late the arm does not matter: the base decides,
    and nothing is learned. Under load some tens of intervals show which way is better, some
    minutes at the default interval. All arms share what they learn, and old windows fade.

    Limitations: it sees tokens and a queue, not requests, so that it cannot tell one late request
    from another. An arm is judged by its own interval although a queue outlives it. What it tries
    costs something, all the time: where the base policy is right already, it can only lose.

    Args:
        params: How it learns.
        base: The policy that is stretched.
    """

    def __init__(self, params: BanditParameters, base: LimitPolicy) -> None:
        """Starts with the base policy's own limits."""
        self._params = params
        self._acting = ActingPolicy(DESIGN, base)
        self._sampler = ThompsonSampler(
            len(arm_features(0.0, 0.0, np.zeros(len(CONTEXT)))),
            exploration=params.exploration,
            memory=params.memory,
            seed=params.seed,
        )
        self._builder = WindowBuilder(params.itl_slo_seconds)
        self._window_from: float | None = None
        self._waiting_before = 0
        self._chosen: Floats | None = None
        self._best_rate = 0.0
        self._acting.act(DESIGN.neutral, HOLDS)

    @property
    def arm(self) -> tuple[float, float]:
        """The factors in force, of sequences and of tokens."""
        action = self._acting.action
        assert isinstance(action, int)
        return DESIGN.grid.factors(action)

    def observe(self, step: StepRecord) -> None:
        """Adds the step to the window, and shows it to the base policy."""
        self._builder.add(step)
        self._acting.observe(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Learns and chooses anew where an interval is over; then stretches the base's limits."""
        now = snapshot.clock_seconds
        if self._window_from is None or now < self._window_from:
            self._begin(snapshot, now)
        elif now - self._window_from >= self._params.interval_seconds:
            self._next(snapshot, now - self._window_from)
            self._window_from = now
        return self._acting.decide(snapshot)

    def _begin(self, snapshot: EngineSnapshot, now: float) -> None:
        self._close(snapshot, 0.0)
        self._window_from, self._chosen = now, None

    def _next(self, snapshot: EngineSnapshot, seconds: float) -> None:
        waiting_before = self._waiting_before
        window = self._close(snapshot, seconds)
        if self._chosen is not None and window.busy_seconds:
            idle = seconds - window.busy_seconds >= self._params.interval_seconds
            judged = replace(window, waiting=0) if idle else window
            self._sampler.learn(self._chosen, self._reward(judged, waiting_before))
        if not teaches(window):
            self._chosen = None
            self._acting.act(DESIGN.neutral, HOLDS)
            return
        context = observation(window, snapshot.engine, self._params)[list(_CONTEXT_AT)]
        arms = np.array([arm_features(u, v, context) for u, v in POSITIONS])
        chosen = self._sampler.choose(arms)
        self._chosen = arms[chosen]
        self._acting.act(chosen, EXPLORES)

    def _close(self, snapshot: EngineSnapshot, seconds: float) -> TelemetryWindow:
        self._waiting_before = snapshot.waiting
        startup: BatchLimits = snapshot.engine.startup_limits
        return self._builder.close(snapshot, seconds=seconds, limits=startup)

    def _reward(self, window: TelemetryWindow, waiting_before: int) -> float:
        late = window.slow_decode_tokens
        rate = window.decode_tokens / window.busy_seconds
        self._best_rate = max(self._best_rate * BEST_KEPT, rate)
        if not self._best_rate:
            return 0.0
        worth = window.decode_tokens - (1.0 + self._params.late_weight) * late
        in_time = worth / (window.busy_seconds * self._best_rate)
        return in_time - overdue(window, waiting_before, self._params.ttft_slo_seconds)


def overdue(window: TelemetryWindow, waiting_before: int, ttft_seconds: float | None) -> float:
    """By how much the queue's wait passes the target, 0 to 1: 1 - target / wait.

    The wait is the queue over the pace at which it was admitted, by Little's law.

    Args:
        window: What happened.
        waiting_before: Requests that waited when it began.
        ttft_seconds: The target; None: there is none.
    """
    if ttft_seconds is None or not window.waiting:
        return 0.0
    admitted = max(window.arrived + waiting_before - window.waiting, 1)
    wait = window.waiting * window.busy_seconds / admitted
    return 1.0 - ttft_seconds / wait if wait > ttft_seconds else 0.0


def teaches(window: TelemetryWindow) -> bool:
    """Whether another limit could have made a difference to a window."""
    bound = window.kv_bound_steps + window.seqs_bound_steps + window.tokens_bound_steps
    if window.steps and bound >= TEACHES_FROM * window.steps:
        return True
    return window.slow_decode_tokens > TEACHES_FROM * window.decode_tokens


def arm_features(u: float, v: float, context: npt.ArrayLike) -> Floats:
    """The x of `BanditPolicy`.

    Args:
        u: Where the sequence factor is, -1 to 1; 0 is a factor of 1.
        v: The same of the token factor.
        context: Shape (contexts,).
    """
    seen = np.asarray(context, dtype=np.float64)
    return np.concatenate(([1.0], seen, [u, v, u * u, v * v], u * seen, v * seen))
