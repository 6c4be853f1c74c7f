"""The contest's parts by hand: the ladder, phases, what follows from a profile, who takes part."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import BatchLimits, StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.contest.capacity import CapacityResult, CapacityRow
from batchpilot.env.contest.capacity_tables import _capacity_overview
from batchpilot.env.contest.ladder import (
    HIGHEST,
    LOWEST,
    STEPS_PER_DOUBLING,
    highest_kept,
    rate_scale,
)
from batchpilot.env.contest.lineup import (
    DEFAULT,
    OURS,
    grid_name,
    saturated_lineup,
    short_name,
    slo_lineup,
    static_grid,
    static_pair,
)
from batchpilot.env.contest.phases import StepLatencies, phase_outcomes, regained_seconds
from batchpilot.env.contest.scenario import (
    estimated_capacity,
    mean_lengths,
    saturated_scenario,
    shifts,
    slo_scenario,
    startup_limits,
    unloaded_step_ms,
)
from batchpilot.env.contest.settings import PROFILES, ContestSettings
from batchpilot.env.contest.summary import geometric_mean, median_of, ratio, spread
from batchpilot.env.engine import EngineStep
from batchpilot.env.profiles import load_profile


@given(edge=st.integers(LOWEST - 1, HIGHEST), start=st.integers(LOWEST - 5, HIGHEST + 5))
def test_the_highest_rung_is_found_from_anywhere_and_no_rung_is_tried_twice(edge, start):
    tried = []

    def keeps(rung):
        tried.append(rung)
        return rung <= edge

    assert highest_kept(keeps, start) == (edge if edge >= LOWEST else None)
    assert len(set(tried)) == len(tried)
    assert all(LOWEST <= rung <= HIGHEST for rung in tried)


@pytest.mark.parametrize(("edge", "cost"), [(0, 3), (-1, 3), (1, 3), (5, 5), (-7, 6), (-50, 16)])
def test_a_good_guess_is_cheap(edge, cost):
    tried = []
    highest_kept(lambda rung: tried.append(rung) or rung <= edge, 0)
    assert len(tried) == cost


def test_sixteen_rungs_double_the_rate():
    assert rate_scale(0) == 1
    assert rate_scale(STEPS_PER_DOUBLING) == 2
    assert rate_scale(5) / rate_scale(4) == pytest.approx(2 ** (1 / 16))


def latencies(*steps):
    """Steps of (end, seconds, decodes)."""
    found = StepLatencies()
    for end, seconds, decodes in steps:
        record = StepRecord(seconds, decodes, decodes, prefill_tokens=0)
        found.add(EngineStep(100 + end, record=record), start_seconds=100.0)
    return found


def every_100_ms(*seconds):
    """A step each tenth of a second of the run; decodes: one."""
    return latencies(*((round(0.1 * (i + 1), 9), s, 1) for i, s in enumerate(seconds)))


def test_a_target_that_is_never_missed_is_regained_at_once():
    assert regained_seconds(every_100_ms(*[0.04] * 50), 0.0, 5.0, 0.05) == 0.0


def test_the_last_bad_second_ends_the_time_to_regain():
    # One second of misses, then none: windows that begin at 0, 0.25, 0.5 and 0.75 hold some of it,
    # and the first three are over the target on average (0.07 against 0.04 for half or more).
    steps = every_100_ms(*[0.07] * 10, *[0.04] * 40)
    assert regained_seconds(steps, 0.0, 5.0, 0.05) == pytest.approx(1.5)


def test_a_target_missed_to_the_end_is_not_regained():
    assert regained_seconds(every_100_ms(*[0.07] * 50), 0.0, 5.0, 0.05) is None


def test_gaps_count_as_often_as_sequences_wait_for_them():
    # One long step of many sequences outweighs nine short steps of one.
    steps = latencies(*[(0.1 * i, 0.01, 1) for i in range(1, 10)], (0.95, 0.09, 9), (5.0, 0.01, 1))
    assert regained_seconds(steps, 0.0, 5.0, 0.05) == 1.75  # the last second that holds it


def test_requests_belong_to_the_phase_they_arrive_in():
    requests = [(0.0, True), (9.9, False), (10.0, True), (10.1, True), (19.0, False)]
    steps = latencies((5.0, 0.02, 1), (12.0, 0.03, 99), (13.0, 0.08, 1))
    first, second = phase_outcomes(requests, steps, (0.0, 10.0), target_s=0.05)
    assert (first.submitted, first.inside, first.itl_p99_ms) == (2, 1, pytest.approx(20))
    assert (second.submitted, second.inside, second.itl_p99_ms) == (3, 2, pytest.approx(30))


def test_a_step_without_decodes_is_no_gap():
    found = StepLatencies()
    found.add(EngineStep(1.0, record=StepRecord(9.0, 1, 0, prefill_tokens=512)), 0.0)
    found.add(EngineStep(1.0), 0.0)
    assert found.ends_s == []


@pytest.mark.parametrize(
    ("profile", "limits"),
    [
        ("llama-3.1-8b-rtx4090", BatchLimits(256, 2048)),
        ("llama-3.1-8b-a100", BatchLimits(256, 2048)),
        ("llama-3.1-8b-h100", BatchLimits(1024, 8192)),
        ("qwen3-8b-h200", BatchLimits(1024, 8192)),
        ("llama-3.1-70b-h100-tp4", BatchLimits(1024, 8192)),
    ],
)
def test_start_up_limits_are_those_vllm_takes_on_the_device(profile, limits):
    assert startup_limits(load_profile(profile)) == limits


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_the_estimate_is_where_the_balanced_step_takes_the_target(name, factor):
    profile = load_profile(name)
    target = factor * unloaded_step_ms(profile)
    rate = estimated_capacity(profile, "empirical:azure-2023-conv", target)
    prompt, output = mean_lengths("empirical:azure-2023-conv")

    def step_ms(rate, milliseconds):
        decodes = rate * milliseconds / 1e3 * output
        kv_tokens = decodes * (prompt + output / 2)
        load = (round(decodes), round(rate * milliseconds / 1e3 * prompt), round(kv_tokens))
        return profile.step_time.seconds(*load) * 1e3, kv_tokens

    # At that rate some step no longer than the target holds itself; a tenth more, none does.
    grid = np.linspace(unloaded_step_ms(profile), target, 200)

    def possible(rate):
        found = [step_ms(rate, t) for t in grid]
        return any(
            step <= t and kv <= profile.kv_capacity_tokens
            for t, (step, kv) in zip(grid, found, strict=True)
        )

    assert possible(0.97 * rate)
    assert not possible(1.1 * rate)


def test_targets_follow_from_the_unloaded_step():
    profile = load_profile("llama-3.1-8b-h100")
    # The weights' read, one sequence's overhead and its share of the KV cache.
    assert unloaded_step_ms(profile) == pytest.approx(6.8399 + 0.0020601 + 0.04 + 1024 * 4.0755e-5)
    scenario = slo_scenario("llama-3.1-8b-h100", "Azure", itl_factor=2, ttft_slo_ms=1000)
    assert scenario.slo.itl_slo_ms == 13.85
    assert scenario.slo.ttft_slo_ms == 1000
    assert scenario.num_requests == round(scenario.rate_per_s * 20)
    slow = slo_scenario("llama-3.1-8b-rtx4090", "ShareGPT", itl_factor=3, ttft_slo_ms=2000)
    assert slow.num_requests == 200  # two of them may miss


def test_saturation_serves_the_cache_several_times_over():
    scenario = saturated_scenario("llama-3.1-8b-h100", "Azure", kv_blocks=4000)
    prompt, output = mean_lengths(scenario.workload)
    fit = 3999 * 16 / (prompt + output)
    assert scenario.num_requests == round(2.5 * max(fit, 75))
    assert not scenario.slo.is_set
    assert scenario.kv_blocks == 4000


def test_shifts_change_lengths_rate_or_speed_half_way():
    lengths, rate, slow = shifts("llama-3.1-8b-h100", 20.0)
    assert [shift.phase_starts_s for shift in (lengths, rate, slow)] == [(0.0, 20.0)] * 3
    assert "prompt_mean=1024:output_mean=128" in lengths.scenario.workload.split("@")[0]
    assert lengths.scenario.workload.endswith("@20")
    low, high = (float(part.split("rate=")[1].split(":")[0]) for part in rates(rate))
    assert high / low == pytest.approx(16, rel=1e-4)
    assert (lengths.slow_factor, rate.slow_factor, slow.slow_factor) == (1, 1, 1.5)
    first, second = rates(slow)
    assert second == f"{first}@20"


def rates(shift):
    return shift.scenario.arrivals.split(",")


def test_everybody_takes_part_and_the_default_comes_first():
    scenario = slo_scenario("llama-3.1-8b-h100", "Azure", itl_factor=2, ttft_slo_ms=1000)
    lineup = slo_lineup(scenario)
    assert lineup[:2] == (DEFAULT, OURS)
    assert len(set(lineup)) == len(lineup) == 22
    for label in (
        "memory-clt",
        "sla",
        "memory+sla:sla=sla",
        "trtllm",
        "p-pas",
        "gradient2",
        "aimd",
    ):
        assert label in lineup
    assert static_pair(128, 256) in static_grid(scenario)
    small = slo_scenario("llama-3.1-8b-rtx4090", "Azure", itl_factor=2, ttft_slo_ms=1000)
    assert static_pair(64, 256) in static_grid(small)  # half the sequences
    saturated = saturated_lineup(saturated_scenario("llama-3.1-8b-h100", "Azure", 4000))
    assert static_pair(16, 8192) in saturated
    assert not any(label.startswith(("sla", "memory+sla")) for label in saturated)


def test_labels_are_short_in_tables():
    assert short_name(static_pair(64, 256)) == "static 64/256"
    assert short_name("static") == "static"
    assert short_name("memory+sla:sla=sla") == "memory+sla published"


def test_pairs_of_the_grid_go_by_the_large_devices_names():
    for profile in PROFILES:
        scenario = slo_scenario(profile, "Azure", itl_factor=2.0, ttft_slo_ms=1000.0)
        assert [grid_name(label, scenario) for label in slo_lineup(scenario)][:4] == [
            *("static", "predictive", "static 64/512", "static 128/256")
        ]
    small = slo_scenario(PROFILES[0], "Azure", itl_factor=2.0, ttft_slo_ms=1000.0)
    assert static_pair(32, 512) in slo_lineup(small)
    assert grid_name(static_pair(16, 512), small) == "static 16/512"


def test_settings_say_what_cannot_be_run():
    with pytest.raises(ConfigError, match="no profile 'gpu'"):
        ContestSettings(profiles="gpu")
    with pytest.raises(ConfigError, match="unknown policy 'nobody'"):
        ContestSettings(policies="nobody")
    with pytest.raises(ConfigError, match="must be different files"):
        ContestSettings(json="same", html="same")


def test_a_short_list_has_the_default_first_and_grid_for_the_pairs():
    settings = ContestSettings(policies="memory,grid,memory")
    scenario = settings.slo_scenarios()[0]
    assert settings.lineup(scenario, ()) == (DEFAULT, "memory", *static_grid(scenario))
    assert ContestSettings().lineup(scenario, ("everybody",)) == ("everybody",)


def test_the_full_contest_crosses_lengths_and_targets():
    assert len(ContestSettings().slo_scenarios()) == 8
    assert len(ContestSettings(full=True).slo_scenarios()) == 32
    assert len(ContestSettings(quick=True).slo_scenarios()) == 4


def test_a_ratio_of_medians_stands_beside_what_each_seed_says():
    (scenario, _) = ContestSettings(profiles="llama-3.1-8b-h100").slo_scenarios()

    def row(policy, *rates):
        return CapacityRow(policy, (), rates)

    result = CapacityResult(
        scenario,
        (row("static", 1.0, 2.0, 9.0, 0.0), row("predictive", 2.0, 2.0, 3.0, 1.0)),
        common_rate_per_s=1.0,
    )
    overview = _capacity_overview([result])
    (cells,) = overview.rows
    shown = dict(zip(overview.headings, cells, strict=True))
    assert shown["seeds above, equal, below"] == "2, 1, 1"
    assert shown["requests"] == "200"
    assert shown["x best static"] == "1.33"


def test_summaries():
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert median_of([None, 3.0, 1.0, 2.0]) == 2.0
    assert median_of([None]) is None
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([0.0, 4.0]) == 0.0
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(3.0, 0.0) is None
    assert math.isclose(geometric_mean([2.0]), 2.0)
