"""Canary: who is on which side, and when the new policy goes back or stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.canary import (
    Canary,
    CanaryParameters,
    CanaryVerdict,
    is_canary,
    window_scores,
)
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot
from batchpilot.agents.telemetry import TelemetryWindow, WindowBuilder

FACTS = EngineFacts(BatchLimits(64, 2048), total_blocks=100, block_size=16)
IDLE = WindowBuilder().close(
    EngineSnapshot(FACTS, 1.0, running=0, waiting=0), seconds=1.0, limits=FACTS.startup_limits
)
BUSY = replace(
    IDLE, steps=10, busy_seconds=1.0, running_seconds=8.0, decode_tokens=400, prefill_tokens=600
)
ENGINES = [f"host-{number}/0" for number in range(40)]
PARAMETERS = CanaryParameters(share=0.5, min_windows=20, windows=200, median_busy_seconds=100)


def trial(params: CanaryParameters = PARAMETERS) -> tuple[Canary, str, str]:
    """A canary, and the name of an engine on each side."""
    canary = Canary(params, "chat@2")
    new = next(engine for engine in ENGINES if canary.is_canary(engine))
    old = next(engine for engine in ENGINES if not canary.is_canary(engine))
    return canary, new, old


def feed(canary: Canary, engine: str, count: int, window: TelemetryWindow, seed: int = 0) -> None:
    """Windows that scatter by a tenth around one."""
    rng = np.random.default_rng(seed)
    for factor in rng.normal(1.0, 0.1, count):
        tokens = max(1, round(window.decode_tokens * factor))
        late = round(window.slow_decode_tokens * tokens / window.decode_tokens)
        canary.observe(engine, replace(window, decode_tokens=tokens, slow_decode_tokens=late))


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_the_engines_of_a_smaller_one(engine, first, second):
    less, more = sorted((first, second))
    if is_canary(engine, share=less, salt="x"):
        assert is_canary(engine, share=more, salt="x")


def test_the_share_is_about_that_of_the_engines_and_another_trial_takes_others():
    engines = [f"engine-{number}" for number in range(10_000)]
    chosen = {e for e in engines if is_canary(e, share=0.1, salt="a")}
    others = {e for e in engines if is_canary(e, share=0.1, salt="b")}
    assert 900 < len(chosen) < 1100
    assert len(chosen & others) < 200


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, 40)])
def test_the_ends_of_the_share(share, count):
    assert sum(is_canary(engine, share=share, salt="x") for engine in ENGINES) == count


def test_scores_of_a_window():
    window = replace(BUSY, slow_decode_tokens=100, waiting=2, recomputed_tokens=250)
    assert window_scores(window) == (30.0, 0.25, 0.2)  # 300 tokens in 1 s for 10 sequences
    assert window_scores(IDLE) is None


def test_before_there_is_enough_to_compare_nothing_happens():
    canary, new, old = trial()
    feed(canary, new, 19, BUSY)
    feed(canary, old, 100, BUSY)
    assert canary.verdict() is CanaryVerdict.WAIT
    assert canary.reason == "too few windows: 19 with it, 100 without"
    for _ in range(100):
        canary.observe(new, IDLE)
    assert canary.canary.windows == 19


def test_one_that_is_as_good_is_promoted_in_the_end():
    canary, new, old = trial()
    feed(canary, new, 199, BUSY, seed=1)
    feed(canary, old, 199, BUSY, seed=2)
    assert canary.verdict() is CanaryVerdict.WAIT
    assert canary.reason == "no worse in 199 windows, 199 s of the median engine"
    feed(canary, new, 1, BUSY)
    assert canary.verdict() is CanaryVerdict.PROMOTE
    assert canary.reason == "no worse in 200 windows, 200 s of the median engine"


def large_trial() -> tuple[Canary, list[str], str]:
    """A canary of many engines, each of which has one window of a second."""
    canary, _, old = trial()
    engines = [f"host-{number}" for number in range(1000)]
    many = [engine for engine in engines if canary.is_canary(engine)]
    assert len(many) > PARAMETERS.windows
    for engine in many:
        feed(canary, engine, 1, BUSY, seed=1)
    feed(canary, old, 200, BUSY, seed=1)
    return canary, many, old


def test_a_large_fleet_with_many_windows_waits_until_its_median_engine_has_worked_long_enough():
    canary, many, _ = large_trial()
    assert canary.verdict() is CanaryVerdict.WAIT
    assert canary.reason == f"no worse in {len(many)} windows, 1 s of the median engine"
    most = len(many) // 2 + 1
    for engine in many[:most]:
        feed(canary, engine, 98, BUSY, seed=1)
    assert canary.verdict() is CanaryVerdict.WAIT
    for engine in many[:most]:
        feed(canary, engine, 1, BUSY, seed=1)
    assert canary.verdict() is CanaryVerdict.PROMOTE


def test_a_large_fleet_goes_back_at_once():
    canary, many, _ = large_trial()
    for engine in many:
        feed(canary, engine, 2, replace(BUSY, slow_decode_tokens=400))
    assert canary.canary.median_busy_seconds == 3.0
    assert canary.verdict() is CanaryVerdict.ROLL_BACK


def test_an_engine_that_waited_for_requests_has_not_tried_the_policy_meanwhile():
    canary, new, _ = trial()
    canary.observe(new, replace(BUSY, seconds=28_800.0))
    assert canary.canary.median_busy_seconds == 1.0


def test_ranks_count_their_time_apart_and_an_engine_that_has_gone_no_longer():
    canary, new, _ = trial()
    for rank in range(8):
        canary.observe(new, BUSY, rank)
    assert canary.canary.median_busy_seconds == 1.0
    canary.observe(new, BUSY, 7)
    canary.forget_all_but({(new, 7)})
    assert canary.canary.median_busy_seconds == 2.0
    assert canary.canary.windows == 9
    canary.forget_all_but(set())
    assert canary.canary.median_busy_seconds == 0.0


@pytest.mark.parametrize(
    ("worse", "reason"),
    [
        (replace(BUSY, decode_tokens=300), "tokens in time per running sequence fell by 2"),
        (replace(BUSY, slow_decode_tokens=100), "tokens in time per running sequence fell by 2"),
        (replace(BUSY, waiting=4), "tokens in time per running sequence fell by 3"),
        (replace(BUSY, recomputed_tokens=250), "work thrown away rose from 0.0% to 20"),
    ],
)
def test_one_that_is_worse_goes_back(worse, reason):
    canary, new, old = trial()
    feed(canary, new, 20, worse, seed=1)
    feed(canary, old, 20, BUSY, seed=2)
    assert canary.verdict() is CanaryVerdict.ROLL_BACK
    assert canary.reason.startswith(reason)


def test_late_tokens_alone_are_enough():
    canary, new, old = trial()
    # As many tokens in time, but a tenth more that are late.
    feed(canary, new, 40, replace(BUSY, decode_tokens=440, slow_decode_tokens=44), seed=1)
    feed(canary, old, 40, BUSY, seed=2)
    assert canary.verdict() is CanaryVerdict.ROLL_BACK
    assert canary.reason == "late tokens rose from 0.0% to 10.0%"


def test_a_difference_inside_the_allowance_is_none():
    canary, new, old = trial()
    feed(canary, new, 200, replace(BUSY, decode_tokens=396), seed=1)
    feed(canary, old, 200, BUSY, seed=1)
    assert canary.verdict() is CanaryVerdict.PROMOTE


def test_a_better_canary_is_never_rolled_back():
    canary, new, old = trial()
    feed(canary, new, 50, BUSY, seed=1)
    feed(canary, old, 50, replace(BUSY, slow_decode_tokens=200, waiting=9), seed=2)
    assert canary.verdict() is CanaryVerdict.WAIT


def test_a_decision_that_fails_ends_it_at_once():
    canary, new, old = trial()
    canary.failed(old)
    assert canary.verdict() is CanaryVerdict.WAIT
    canary.failed(new)
    assert canary.verdict() is CanaryVerdict.ROLL_BACK
    assert canary.reason == "1 decisions of the canary failed"


def test_false_alarms_are_rare_when_it_is_asked_once():
    alarms = 0
    for seed in range(200):
        canary, new, old = trial()
        feed(canary, new, 60, BUSY, seed=seed)
        feed(canary, old, 60, BUSY, seed=1000 + seed)
        alarms += canary.verdict() is CanaryVerdict.ROLL_BACK
    assert alarms <= 4
