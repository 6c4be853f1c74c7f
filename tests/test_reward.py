from __future__ import annotations

import pytest

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.limits import BatchLimits, EngineFacts
from batchpilot.env.engine import EngineStep
from batchpilot.env.profiles import StepTimeModel
from batchpilot.env.reward import (
    IntervalService,
    MeanLengths,
    RewardTerms,
    ServiceLedger,
    profile_capacity,
)
from batchpilot.env.workloads import WorkloadRequest


def step(clock: float, *names: str, finished: tuple[str, ...] = ()) -> EngineStep:
    return EngineStep(clock, dict.fromkeys(names, 1), finished)


def ledger(itl_slo_ms: float | None = 100, ttft_slo_ms: float | None = 1000) -> ServiceLedger:
    return ServiceLedger(LatencyTargets(itl_slo_ms, ttft_slo_ms))


def test_tokens_are_good_while_their_request_is_inside_its_targets():
    served = ledger()
    served.submitted("quick", 0.0, 3)
    served.submitted("late", 0.0, 2)
    served.stepped(step(0.5, "quick"))
    served.stepped(step(0.55, "quick"))
    served.stepped(step(1.5, "quick", "late", finished=("quick",)))
    # quick's third token comes 0.5 s a token after its first; late's first after 1.5 s.
    assert served.close_interval(1.5) == IntervalService(
        tokens=4, good_tokens=2, judged=2, late=2, completed=1, inside=0, missed=2
    )


def test_a_request_that_catches_up_is_inside_again():
    served = ledger()
    served.submitted("a", 0.0, 4)
    served.stepped(step(0.1, "a"))
    served.stepped(step(0.25, "a"))
    behind = served.close_interval(0.25)
    assert (behind.late, behind.missed, behind.on_track, behind.off_track) == (1, 0, 0.0, 0.5)
    served.stepped(step(0.26, "a"))
    assert served.close_interval(0.26).on_track == 0.75
    served.stepped(step(0.27, "a", finished=("a",)))
    assert served.close_interval(0.3) == IntervalService(
        tokens=1, good_tokens=1, judged=1, completed=1, inside=1
    )
    assert served.slo_attainment == 1.0


def test_a_fate_is_known_once_and_for_all():
    served = ledger()
    for name in ("waits", "slow", "first late"):
        served.submitted(name, 0.0, 4)
    served.stepped(step(0.5, "slow"))
    # 0.3 s is all that slow's three tokens may take after its first.
    assert served.close_interval(0.9) == IntervalService(
        tokens=1, good_tokens=1, judged=1, missed=1
    )
    served.stepped(step(1.5, "first late"))
    assert served.close_interval(1.6).missed == 2
    assert served.slo_attainment == 0.0
    for clock in (1.7, 1.8):
        served.stepped(step(clock, "waits", "slow", "first late"))
    served.stepped(step(1.9, "waits", "slow", "first late", finished=("waits", "slow")))
    assert served.close_interval(2.0).missed == 0
    assert (served.inside, served.missed) == (0, 3)


def test_whoever_waits_too_long_counts_each_interval():
    served = ledger()
    served.submitted("a", 0.0, 1)
    served.submitted("b", 0.5, 1)
    assert served.close_interval(1.0).cost == 0.0
    assert served.close_interval(1.2) == IntervalService(judged=1, late=1, missed=1)
    assert served.close_interval(1.6).late == 2
    assert served.unfinished == 2


def test_without_targets_everything_is_good():
    served = ledger(None, None)
    served.submitted("a", 0.0, 2)
    served.stepped(step(50.0, "a"))
    served.stepped(step(99.0, "a", finished=("a",)))
    assert served.close_interval(99.0) == IntervalService(
        tokens=2, good_tokens=2, judged=1, completed=1, inside=1
    )


def test_an_end_before_the_last_token_is_outside():
    served = ledger(None, None)
    served.submitted("a", 0.0, 5)
    served.stepped(step(1.0, "a", finished=("a",)))
    assert served.slo_attainment == 0.0


def test_the_total():
    assert RewardTerms(0.75, 0.25, 0.125, 0.0625, -0.5).total == -0.1875


def test_mean_lengths():
    requests = (WorkloadRequest(0.0, 10, 1), WorkloadRequest(0.0, 20, 2))
    assert MeanLengths.of(requests) == MeanLengths(15.0, 1.5)


def step_time(**values: float) -> StepTimeModel:
    names = StepTimeModel.names()
    return StepTimeModel(**{**dict.fromkeys(names, 0.0), "floor_ms": 10.0, **values})


@pytest.mark.parametrize(
    ("limits", "blocks", "capacity"),
    [
        (BatchLimits(50, 10_000), 10_000, 5000),  # 50 sequences, 10 ms
        (BatchLimits(500, 10_000), 150, 1000),  # 1,500 tokens of cache hold ten of 150
        (BatchLimits(500, 60), 10_000, 3000),  # a step of 60 tokens: half of them prompts
    ],
)
def test_capacity_of_a_profile(limits: BatchLimits, blocks: int, capacity: float):
    facts = EngineFacts(limits, blocks, 10)
    assert profile_capacity(step_time(), facts, MeanLengths(100, 100)) == capacity


def test_capacity_where_fewer_sequences_are_faster():
    # t = 10 + 0.02 D^2 would be best at D = 22; the form has P^2, and P = D here.
    model = step_time(prefill_squared_ms=0.02)
    best = profile_capacity(
        model, EngineFacts(BatchLimits(500, 5000), 10**5, 10), MeanLengths(9, 9)
    )
    assert best == pytest.approx(22 / (0.010 + 0.02e-3 * 22**2), rel=0.01)
