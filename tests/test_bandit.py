"""`bandit`: what it learns, how fast, and when it leaves the base policy alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchpilot.agents.bandit import (
    CONTEXT,
    DESIGN,
    HOLDS,
    POSITIONS,
    PRIOR,
    BanditParameters,
    BanditPolicy,
    ThompsonSampler,
    arm_features,
    overdue,
    teaches,
)
from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    Decision,
    EngineFacts,
    EngineSnapshot,
    Source,
    StepRecord,
)
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.telemetry import TelemetryWindow, WindowBuilder

FACTS = EngineFacts(BatchLimits(64, 2048), total_blocks=4096, block_size=16)
EMPTY = WindowBuilder().close(
    EngineSnapshot(FACTS, 0.0, running=0, waiting=0), seconds=2.0, limits=FACTS.startup_limits
)


class Startup:
    """A base policy that never limits anything."""

    def observe(self, step):
        del step

    def decide(self, snapshot):
        return Decision(snapshot.engine.startup_limits, Source.STATIC, "start-up")


def bandit(**settings) -> BanditPolicy:
    return BanditPolicy(BanditParameters(**{"itl_slo_ms": 50.0, **settings}), Startup())


def test_features_of_an_arm():
    found = arm_features(0.5, -1.0, (0.1, 0.2, 0.3, 0.4, 0.5))
    assert found.tolist() == pytest.approx(
        [1, 0.1, 0.2, 0.3, 0.4, 0.5]
        + [0.5, -1.0, 0.25, 1.0]
        + [0.05, 0.1, 0.15, 0.2, 0.25]
        + [-0.1, -0.2, -0.3, -0.4, -0.5]
    )
    assert len(CONTEXT) == 5


@pytest.mark.parametrize(
    ("waiting", "before", "arrived", "expected"),
    [
        (0, 10, 5, 0.0),  # no queue
        (4, 4, 4, 0.0),  # 4 in 2 s admitted: 2 s, the target itself
        (10, 4, 11, 0.5),  # 5 admitted in 2 s, 10 wait: 4 s against 2 s
        (40, 40, 0, 1 - 2 / 80),  # none admitted: as if one had been
    ],
)
def test_how_late_the_queue_is(waiting, before, arrived, expected):
    window = replace(EMPTY, busy_seconds=2.0, waiting=waiting, arrived=arrived)
    assert overdue(window, before, 2.0) == pytest.approx(expected)
    assert overdue(window, before, None) == 0.0
    assert overdue(replace(window, seconds=60.0), before, 2.0) == pytest.approx(expected)
    assert overdue(EMPTY, before, 2.0) == 0.0


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (EMPTY, False),
        (replace(EMPTY, steps=100, seqs_bound_steps=9), False),
        (replace(EMPTY, steps=100, seqs_bound_steps=5, kv_bound_steps=5), True),
        (replace(EMPTY, steps=100, decode_tokens=100, slow_decode_tokens=11), True),
    ],
)
def test_a_window_teaches_only_where_a_limit_mattered(window: TelemetryWindow, expected: bool):
    assert teaches(window) is expected


def arms() -> np.ndarray:
    return np.array([arm_features(u, v, np.zeros(5)) for u, v in POSITIONS])


def test_where_the_arms_are():
    assert POSITIONS[DESIGN.neutral] == (0.0, 0.0)
    assert POSITIONS[0] == (-1.0, -1.0)
    assert POSITIONS[-1] == pytest.approx((np.log(1.6) / -np.log(0.6), 0.0))


def play(sampler: ThompsonSampler, best: int, rounds: int, seed: int) -> list[int]:
    """Rewards that fall with the distance from the best arm, with noise."""
    rng, table = np.random.default_rng(seed), arms()
    chosen = []
    for _ in range(rounds):
        arm = sampler.choose(table)
        distance = np.sum((table[arm][6:8] - table[best][6:8]) ** 2)
        sampler.learn(table[arm], 0.5 - distance + rng.normal(0, 0.1))
        chosen.append(arm)
    return chosen


@pytest.mark.parametrize("best", [0, 4, DESIGN.neutral, 14])
def test_it_finds_the_best_arm_within_some_tens_of_rewards(best):
    sampler = ThompsonSampler(arms().shape[1], exploration=0.1, memory=0.995, seed=1)
    chosen = play(sampler, best, 60, seed=2)
    assert chosen[-20:].count(best) >= 15


def test_it_notices_that_another_arm_has_become_the_best():
    sampler = ThompsonSampler(arms().shape[1], exploration=0.1, memory=0.98, seed=1)
    play(sampler, 0, 100, seed=2)
    chosen = play(sampler, 14, 200, seed=3)
    assert chosen[-20:].count(14) >= 15


def test_weights_are_those_of_ridge_regression_when_nothing_is_forgotten():
    sampler = ThompsonSampler(2, exploration=0.1, memory=1.0, seed=0)
    xs, rewards = np.array([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]), np.array([1.0, 3.0, 0.5])
    for features, reward in zip(xs, rewards, strict=True):
        sampler.learn(features, float(reward))
    expected = np.linalg.solve(PRIOR * np.eye(2) + xs.T @ xs, xs.T @ rewards)
    assert sampler.mean == pytest.approx(expected)


class Gpu:
    """Steps as long as the token budget allows: a large one breaks the ITL target of 50 ms."""

    def __init__(self, policy: BanditPolicy) -> None:
        self.policy, self.clock = policy, 0.0

    def run(self, seconds: float) -> list[tuple[float, float]]:
        """Serves for so long; returns the factors in force, step by step."""
        until, arms_seen = self.clock + seconds, []
        while self.clock < until:
            snapshot = EngineSnapshot(FACTS, self.clock, running=32, waiting=20, prefill_seqs=4)
            limits = self.policy.decide(snapshot).limits
            arms_seen.append(self.policy.arm)
            took = 0.01 + 4e-5 * limits.max_num_batched_tokens  # 92 ms at 2,048 tokens
            self.clock += took
            self.policy.observe(
                StepRecord(
                    seconds=took,
                    running=32,
                    decode_seqs=28,
                    prefill_tokens=limits.max_num_batched_tokens - 28,
                    binding=Binding.TOKEN_BUDGET,
                )
            )
        return arms_seen


def test_within_minutes_it_keeps_a_target_that_its_base_breaks():
    gpu = Gpu(bandit(seed=3))
    gpu.run(300.0)
    tokens = [tokens for _, tokens in gpu.run(60.0)]
    assert np.mean([factor < 1.0 for factor in tokens]) > 0.9


def test_the_same_seed_gives_the_same_choices():
    assert Gpu(bandit(seed=5)).run(60.0) == Gpu(bandit(seed=5)).run(60.0)
    assert Gpu(bandit(seed=5)).run(60.0) != Gpu(bandit(seed=6)).run(60.0)


@pytest.mark.parametrize("burst", [0, 40])
def test_an_arm_is_not_to_blame_for_a_time_without_requests(
    burst: int, monkeypatch: pytest.MonkeyPatch
):
    policy, rewards = bandit(ttft_slo_ms=1000.0), []
    monkeypatch.setattr(policy._sampler, "learn", lambda features, reward: rewards.append(reward))
    busy = StepRecord(
        seconds=0.03125, running=8, decode_seqs=8, prefill_tokens=9, binding=Binding.MAX_NUM_SEQS
    )
    clock = 0.0
    while clock < 9.0:
        policy.decide(EngineSnapshot(FACTS, clock, running=8, waiting=0))
        policy.observe(busy)
        clock += busy.seconds
    assert rewards == [1.0] * 3
    policy.decide(EngineSnapshot(FACTS, clock + 60.0, running=0, waiting=burst))
    assert rewards == [1.0] * 4
    # Nothing ran: there is nothing to learn.
    policy.decide(EngineSnapshot(FACTS, clock + 120.0, running=0, waiting=burst))
    assert rewards == [1.0] * 4


def test_where_no_limit_binds_it_is_its_base():
    policy = bandit()
    for tick in range(50):
        snapshot = EngineSnapshot(FACTS, tick * 0.5, running=3, waiting=0)
        decision = policy.decide(snapshot)
        assert decision.limits == FACTS.startup_limits
        assert policy.arm == (1.0, 1.0)
        policy.observe(StepRecord(seconds=0.02, running=3, decode_seqs=3, prefill_tokens=0))
    assert decision.reason == HOLDS


def test_a_clock_set_back_begins_anew():
    policy = bandit()
    Gpu(policy).run(20.0)
    policy.decide(EngineSnapshot(FACTS, 0.0, running=1, waiting=0))
    policy.decide(EngineSnapshot(FACTS, 2.0, running=1, waiting=0))
    assert policy.arm == (1.0, 1.0)


def test_it_is_built_by_its_text_around_any_base():
    for base in ("predictive", "memory-peak", "memory+sla", "static"):
        assert PolicySpec.parse(f"bandit:base={base}").build({"itl_slo_ms": 50.0})
    with pytest.raises(ConfigError, match="policy 'memory\\+sla': itl_slo_ms is required"):
        PolicySpec.parse("bandit:base=memory+sla").build()
    with pytest.raises(ConfigError, match="base='learned' is not one of"):
        PolicySpec.parse("bandit:base=learned").build()
