from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.engine import EngineRequest
from batchpilot.env.profiles import FitError, GpuProfile, StepTimeModel
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig

MS = 1e-3


def profile(num_blocks=201, **step_time):
    """Steps of 10 ms, and 1 ms for each prompt token, unless told otherwise."""
    coefficients = {
        "floor_ms": 0.0,
        "linear_base_ms": 0.0,
        "token_ms": 0.0,
        "decode_seq_ms": 0.0,
        "kv_token_ms": 0.0,
        "mixed_kv_token_ms": None,
        "prefill_squared_ms": 0.0,
        "overhead_ms": 10.0,
        "overhead_decode_seq_ms": 0.0,
    }
    return GpuProfile(
        step_time=StepTimeModel(**{**coefficients, **step_time}),
        fit_error=FitError(0.0, 0.0, 1),
        name="hand-made",
        model="none",
        gpu="none",
        tensor_parallel=1,
        kv_bytes_per_token=1,
        num_blocks=num_blocks,
        block_size=16,
        max_model_len=4096,
        noise=0.0,
        source="made up",
        licence="none",
    )


def engine(step_time=None, num_blocks=201, **config):
    config = {"max_num_seqs": 16, "max_num_batched_tokens": 256, **config}
    return VirtualEngine(
        VirtualEngineConfig(profile=profile(num_blocks, **(step_time or {})), **config)
    )


def request(name, prompt=20, output=4, priority=0, token=7):
    return EngineRequest(name, [token] * prompt, output, priority)


def run(virtual):
    """Steps to the end: what came, and when."""
    steps = []
    while virtual.has_unfinished_requests():
        steps.append(virtual.step())
        assert len(steps) < 20_000
    return steps


def token_times(steps, name):
    return [round(step.clock_seconds, 9) for step in steps if step.new_tokens.get(name)]


BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@BOTH
def test_tokens_come_when_their_step_ends(asynchronous):
    virtual = engine(async_scheduling=asynchronous)
    virtual.add_request(request("a"))
    steps = run(virtual)
    assert token_times(steps, "a") == [0.01, 0.02, 0.03, 0.04]
    assert [step.finished for step in steps] == [(), (), (), ("a",)]
    assert [round(step.record.seconds, 9) for step in steps] == [0.01] * 4


@BOTH
def test_a_step_is_charged_what_it_holds(asynchronous):
    # 1 ms a decode, 0.1 ms a context token, 0.01 ms a prompt token squared.
    form = {"decode_seq_ms": 1.0, "kv_token_ms": 0.1, "prefill_squared_ms": 0.01, "overhead_ms": 0}
    virtual = engine(form, async_scheduling=asynchronous)
    virtual.add_request(request("a", prompt=20, output=3))
    steps = run(virtual)
    # The prompt, then two decodes whose contexts are 21 and 22 tokens with the new one.
    seconds = [0.01 * 400, 1 + 0.1 * 21, 1 + 0.1 * 22]
    assert [step.record.seconds / MS for step in steps] == pytest.approx(seconds)


@BOTH
def test_each_prompt_of_a_step_pays_for_its_own_attention(asynchronous):
    virtual = engine({"prefill_squared_ms": 0.01, "overhead_ms": 5}, async_scheduling=asynchronous)
    for token, length in enumerate((20, 30, 400)):
        virtual.add_request(request(f"r{token}", prompt=length, output=1, token=token))
    steps = run(virtual)
    # 256 tokens a step: two prompts whole and 206 tokens of the third; then 206 to 400, which also
    # attend to what is there.
    assert [step.record.prefill_tokens for step in steps] == [256, 194]
    squares = [20**2 + 30**2 + 206**2, 400**2 - 206**2]
    assert [step.record.prefill_squares for step in steps] == squares
    assert [step.record.seconds / MS for step in steps] == pytest.approx(
        [5 + 0.01 * square for square in squares]
    )


@BOTH
def test_what_the_prefix_cache_holds_is_told_once_and_costs_nothing(asynchronous):
    virtual = engine({"token_ms": 1.0, "overhead_ms": 0.0}, async_scheduling=asynchronous)
    virtual.add_request(request("first", prompt=100, output=3))
    steps = run(virtual)
    assert [step.record.cached_tokens for step in steps] == [0] * len(steps)
    virtual.add_request(request("same", prompt=100, output=3))
    virtual.add_request(request("longer", prompt=200, output=3))
    records = [step.record for step in run(virtual)]
    # Whole blocks of 16 that are shared: 96 tokens of each.
    assert [r.cached_tokens for r in records] == [192] + [0] * (len(records) - 1)
    assert records[0].prefill_tokens == 4 + 104
    assert records[0].prefill_squares == (100**2 - 96**2) + (200**2 - 96**2)


def test_a_preempted_request_that_finds_its_own_blocks_again_has_found_no_prefix():
    virtual = engine(num_blocks=21, enable_prefix_caching=True)
    for token, name in enumerate(("a", "b")):
        virtual.add_request(request(name, prompt=100, output=100, token=token))
    records = [step.record for step in run(virtual)]
    assert sum(r.preemptions for r in records) > 0
    assert sum(r.cached_tokens for r in records) == 0


@BOTH
def test_a_prompt_longer_than_the_budget_gives_its_token_with_the_last_chunk(asynchronous):
    virtual = engine({"token_ms": 1.0, "overhead_ms": 0.0}, async_scheduling=asynchronous)
    virtual.add_request(request("a", prompt=600, output=2))
    steps = run(virtual)
    assert [step.record.prefill_tokens for step in steps] == [256, 256, 88, 0]
    assert [sum(step.new_tokens.values()) for step in steps] == [0, 0, 1, 1]
    assert token_times(steps, "a") == [0.6, 0.601]


@pytest.mark.parametrize(("asynchronous", "first_token"), [(False, 0.03), (True, 0.04)])
def test_a_request_that_comes_during_a_step_waits_for_its_end(asynchronous, first_token):
    virtual = engine(async_scheduling=asynchronous)
    virtual.add_request(request("a", output=10))
    steps = [virtual.step()]
    # The second step runs from 10 to 20 ms. What comes in it is handed over at its end, and with
    # asynchronous scheduling the third step is scheduled by then.
    steps.append(virtual.step())
    virtual.add_request(request("b"))
    steps += run(virtual)
    assert token_times(steps, "b")[0] == first_token


def test_asynchronous_scheduling_looks_a_step_ahead():
    virtual = engine(async_scheduling=True)
    seen = []

    class Watching:
        def observe(self, step):
            seen.append("result")

        def decide(self, snapshot):
            seen.append("schedule")
            return PolicySpec.parse("static").build().decide(snapshot)

    virtual.set_policy(Watching())
    virtual.add_request(request("a", output=3))
    run(virtual)
    assert seen[:4] == ["schedule", "schedule", "result", "schedule"]


@BOTH
def test_a_prefix_seen_before_is_not_computed_again(asynchronous):
    virtual = engine(async_scheduling=asynchronous)
    virtual.add_request(request("a", prompt=64))
    run(virtual)
    virtual.add_request(request("b", prompt=80))
    assert run(virtual)[0].record.prefill_tokens == 16
    virtual.reset()
    virtual.add_request(request("c", prompt=80))
    assert run(virtual)[0].record.prefill_tokens == 80


def test_without_prefix_caching_it_is():
    virtual = engine(enable_prefix_caching=False)
    for name in "ab":
        virtual.add_request(request(name, prompt=64))
        assert run(virtual)[0].record.prefill_tokens == 64


def test_idle_time_passes_at_once():
    virtual = engine()
    virtual.wait_until(1000.0)
    assert virtual.clock_seconds == 1000.0
    virtual.wait_until(5.0)
    assert virtual.clock_seconds == 1000.0
    virtual.add_request(request("a", output=1))
    assert run(virtual)[0].clock_seconds == pytest.approx(1000.01)


def test_the_hook_sees_virtual_time():
    virtual = engine()
    virtual.wait_until(7.0)
    assert virtual.snapshot().clock_seconds == 7.0


def test_priorities_decide_who_is_next():
    virtual = engine(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in (("late", 2), ("soon", 0), ("then", 1)):
        virtual.add_request(request(name, priority=priority))
    order = [name for step in run(virtual) for name in step.finished]
    assert order == ["soon", "then", "late"]


def test_equal_priorities_keep_the_order_of_arrival():
    virtual = engine(max_num_seqs=1, scheduling_policy="priority")
    names = [f"r{index}" for index in range(12)]
    for name in names:
        virtual.add_request(request(name, output=1))
    assert [name for step in run(virtual) for name in step.finished] == names


@BOTH
def test_an_aborted_request_gives_nothing_more(asynchronous):
    virtual = engine(async_scheduling=asynchronous)
    virtual.add_request(request("a", output=50))
    virtual.add_request(request("b", output=5))
    virtual.step()
    virtual.abort_request("a")
    virtual.abort_request("nobody")
    steps = run(virtual)
    assert token_times(steps, "a") == []
    assert [name for step in steps for name in step.finished] == ["b"]
    assert virtual.abort_all() == 0
    virtual.reset()
    assert virtual.snapshot().used_blocks == 0


@BOTH
def test_a_watermark_keeps_sequences_out(asynchronous):
    def peak(watermark):
        virtual = engine(num_blocks=41, async_scheduling=asynchronous)
        virtual.set_policy(None, watermark=watermark)
        for index in range(16):
            virtual.add_request(request(f"r{index}", prompt=30, output=60, token=index))
        return max(step.record.running for step in run(virtual) if step.record)

    assert peak(0.5) < peak(0.0) == 16


def test_limits_are_applied():
    virtual = engine()
    virtual.set_policy(PolicySpec.parse("static:max_num_seqs=2").build())
    for index in range(6):
        virtual.add_request(request(f"r{index}"))
    assert max(step.record.running for step in run(virtual)) == 2
    assert virtual.applied_limits == BatchLimits(2, 256)


def random_run(virtual, seed, policy="memory"):
    rng = random.Random(seed)
    virtual.set_policy(PolicySpec.parse(policy).build())
    pending = [
        (rng.expovariate(1 / 0.03), rng.randrange(1, 200), rng.randrange(1, 80)) for _ in range(60)
    ]
    due, log = 0.0, []
    for index, (gap, prompt, output) in enumerate(pending):
        due += gap
        while virtual.has_unfinished_requests() and virtual.clock_seconds < due:
            log.append(virtual.step())
        virtual.wait_until(due)
        virtual.add_request(request(f"r{index}", prompt, output, token=index))
    return log + run(virtual)


@BOTH
def test_the_same_seed_gives_the_same_numbers_to_the_last_digit(asynchronous):
    config = {"num_blocks": 60, "noise": 0.2, "seed": 3, "async_scheduling": asynchronous}
    virtual = engine(**config)
    first = random_run(virtual, 1)
    virtual.reset()
    assert random_run(virtual, 1) == first
    assert random_run(engine(**config), 1) == first
    virtual.reset(seed=4)
    assert random_run(virtual, 1) != first
    assert sum(step.record.preemptions for step in first if step.record) > 0


def test_noise_is_the_profiles_unless_it_is_given():
    noisy = replace(profile(), noise=0.2)
    for asked, is_noisy in (({}, True), ({"noise": 0.0}, False)):
        virtual = VirtualEngine(VirtualEngineConfig(profile=noisy, max_num_seqs=16, **asked))
        virtual.add_request(request("a", output=20))
        seconds = {round(step.record.seconds, 9) for step in run(virtual) if step.record}
        assert (len(seconds) > 10) is is_noisy


def test_noise_keeps_the_mean():
    virtual = engine(noise=0.3)
    virtual.add_request(request("a", output=3000))
    seconds = [step.record.seconds for step in run(virtual)]
    mean = sum(seconds) / len(seconds)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in seconds) / len(seconds))
    assert mean == pytest.approx(0.01, rel=0.03)
    assert deviation / mean == pytest.approx(0.3, rel=0.08)
    assert min(seconds) > 0


_SHARED: dict[bool, VirtualEngine] = {}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    asynchronous=st.booleans(),
    policy=st.sampled_from(["static", "memory", "memory-peak"]),
)
def test_nothing_is_lost_and_the_cache_never_overflows(seed, asynchronous, policy):
    if asynchronous not in _SHARED:
        _SHARED[asynchronous] = engine(num_blocks=40, async_scheduling=asynchronous)
    virtual = _SHARED[asynchronous]
    virtual.reset()
    steps = random_run(virtual, seed, policy)
    clock = [step.clock_seconds for step in steps]
    assert clock == sorted(clock)
    finished = [name for step in steps for name in step.finished]
    assert sorted(finished) == sorted(f"r{index}" for index in range(60))
    rng, given_tokens = random.Random(seed), 0
    for _ in range(60):
        rng.expovariate(1)
        rng.randrange(1, 200)
        given_tokens += rng.randrange(1, 80)
    assert sum(sum(step.new_tokens.values()) for step in steps) == given_tokens
    records = [step.record for step in steps if step.record]
    assert all(record.kv_tokens <= virtual.facts.kv_capacity_tokens for record in records)
    assert all(record.running <= 16 for record in records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 0}, "the prompt is empty"),
        ({"output": 0}, "output_tokens=0 is below 1"),
        ({"prompt": 3000, "output": 300}, "are more than 3200"),
    ],
)
def test_requests_that_can_never_be_served(changes, message):
    virtual = engine()
    with pytest.raises(ValueError, match=message):
        virtual.add_request(request("a", **changes))
    assert not virtual.has_unfinished_requests()


def test_an_id_is_used_once_at_a_time():
    virtual = engine()
    virtual.add_request(request("a"))
    with pytest.raises(ValueError, match="id 'a' is in use"):
        virtual.add_request(request("a"))


def test_reset_needs_an_idle_engine():
    virtual = engine()
    virtual.add_request(request("a"))
    with pytest.raises(RuntimeError, match="1 unfinished requests"):
        virtual.reset()
    assert virtual.abort_all() == 1
    virtual.reset()
    assert virtual.clock_seconds == 0.0


def test_a_policy_that_fails_is_an_error():
    class Broken:
        def observe(self, step):
            raise ZeroDivisionError

        def decide(self, snapshot):
            raise ZeroDivisionError

    virtual = engine()
    virtual.set_policy(Broken())
    virtual.add_request(request("a"))
    with pytest.raises(RuntimeError, match="does not steer"):
        virtual.step()


def test_a_closed_engine_is_closed():
    with engine() as virtual:
        pass
    virtual.close()
    with pytest.raises(RuntimeError, match="closed"):
        virtual.step()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"profile": "no-such-gpu"}, "no-such-gpu"),
        ({"profile": profile(), "max_num_seqs": 0}, "max_num_seqs=0"),
        ({"profile": profile(), "max_num_batched_tokens": 8}, "must be at least max_num_seqs=256"),
        ({"profile": profile(), "max_model_len": 9999}, "max_model_len=9999 must be at most 4096"),
        ({"profile": profile(), "noise": -1}, "noise=-1"),
        ({"profile": profile(), "scheduling_policy": "lottery"}, "scheduling_policy='lottery'"),
    ],
)
def test_bad_settings_name_the_field_and_the_value(config, message):
    with pytest.raises(ConfigError, match=message):
        VirtualEngine(VirtualEngineConfig(**config))


@BOTH
def test_a_gpu_that_becomes_slower_takes_longer_for_every_step_from_then_on(asynchronous):
    virtual = engine(async_scheduling=asynchronous, slow_factor=1.5, slow_at_s=0.05)
    virtual.add_request(request("a", output=12))
    gaps = [step.record.seconds for step in run(virtual)]
    assert gaps[1:4] == [pytest.approx(10 * MS)] * 3
    # With a step scheduled ahead, that one still has the time it was scheduled with.
    assert gaps[7:] == [pytest.approx(15 * MS)] * 5
    virtual.reset()
    virtual.add_request(request("b", output=4))
    assert [step.record.seconds for step in run(virtual)][1:] == [pytest.approx(10 * MS)] * 3
