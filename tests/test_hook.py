"""The hook around vLLM's real scheduler: unseen where it changes nothing, harmless when broken.

The scheduler, its KV-cache manager and its assertions are vLLM's own; only the model is left out.
"""

import logging
import math
from types import SimpleNamespace

import pytest
from driving import Flapping, build_core, drive, random_requests

from batchpilot.agents.catalog import SELF_CONTAINED, PolicySpec
from batchpilot.agents.limits import BatchLimits, Binding, Decision, Source
from batchpilot.env.engine import EngineRequest
from batchpilot.scheduler_hook.vllm_adapter import VllmAdapter

SCHEDULING = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
STARTUP = BatchLimits(32, 256)


class Fixed:
    """One decision for ever; remembers what it is shown."""

    def __init__(self, seqs, tokens=256):
        self.decision = Decision(BatchLimits(seqs, tokens), Source.LEARNED, "test")
        self.records = []

    def observe(self, step):
        self.records.append(step)

    def decide(self, snapshot):
        return self.decision


def stock(seed, **config):
    return drive(build_core(mode="off", **config), random_requests(seed))


@SCHEDULING
@pytest.mark.parametrize("priority", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(3))
def test_the_start_up_limits_schedule_exactly_what_stock_vllm_schedules(
    seed, priority, async_scheduling
):
    config = {"scheduling_policy": priority, "async_scheduling": async_scheduling}
    steered = drive(build_core(**config), random_requests(seed))
    assert steered == stock(seed, **config)


@SCHEDULING
def test_observe_decides_but_changes_nothing(async_scheduling):
    core = build_core(mode="observe", async_scheduling=async_scheduling)
    core.hook.set_policy(Fixed(seqs=1, tokens=70))
    assert drive(core, random_requests(0)) == stock(0, async_scheduling=async_scheduling)
    assert core.hook.decision.limits == BatchLimits(1, 70)
    assert core.hook.applied_limits == STARTUP


@SCHEDULING
def test_a_sequence_limit_holds_in_every_step(async_scheduling):
    core = build_core(async_scheduling=async_scheduling)
    core.hook.set_policy(Fixed(seqs=5))
    run = drive(core, random_requests(0))
    assert max(map(len, run.steps)) == 5
    assert len(run.finished) == 60


@SCHEDULING
def test_a_token_budget_holds_in_every_step(async_scheduling):
    core = build_core(async_scheduling=async_scheduling)
    core.hook.set_policy(Fixed(seqs=8, tokens=80))
    run = drive(core, random_requests(0))
    assert 64 < max(sum(step.values()) for step in run.steps) <= 80
    assert len(run.finished) == 60


@SCHEDULING
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_limits_flapping_at_random_lose_no_request_and_no_token(
    seed, prefix_caching, async_scheduling
):
    core = build_core(async_scheduling=async_scheduling, enable_prefix_caching=prefix_caching)
    core.hook.set_policy(Flapping(seed))
    requests = random_requests(seed, count=30)
    run = drive(core, requests)
    assert run.output_tokens == {r.request_id: r.output_tokens for r in requests}
    assert core.hook.passthrough_reason is None


@SCHEDULING
@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_every_policy_completes_every_request(name, async_scheduling):
    core = build_core(async_scheduling=async_scheduling)
    core.hook.set_policy(PolicySpec.parse(name).build({"itl_slo_ms": 0.5}))
    requests = random_requests(1)
    run = drive(core, requests)
    assert run.output_tokens == {r.request_id: r.output_tokens for r in requests}
    assert core.hook.passthrough_reason is None


@SCHEDULING
def test_records_account_for_every_token_request_and_preemption(async_scheduling):
    core = build_core(async_scheduling=async_scheduling)
    policy = Fixed(seqs=32)
    core.hook.set_policy(policy)
    requests = random_requests(2)
    run = drive(core, requests)
    records = policy.records
    prompts = sum(len(r.prompt_token_ids) for r in requests)
    recomputed = sum(r.recomputed_tokens for r in records)
    assert sum(r.preemptions for r in records) == core.hook.stats.preemptions > 0
    assert sum(len(r.arrived) for r in records) == 60
    assert sum(sum(r.arrived) for r in records) == prompts
    assert all(r.decode_seqs + bool(r.prefill_tokens) <= r.running + 1 for r in records)
    scheduled = sum(sum(step.values()) for step in run.steps)
    assert sum(r.decode_seqs + r.prefill_tokens for r in records) == scheduled
    # Asynchronous scheduling has a token in flight when it preempts: it is delivered, not remade.
    slack = 0 if not async_scheduling else core.hook.stats.preemptions
    outputs = sum(r.output_tokens for r in requests) - len(requests)
    assert abs(scheduled - (prompts + outputs + recomputed)) <= slack
    finished = [f for r in records for f in r.finished]
    assert {(f.prompt_tokens, f.output_tokens) for f in finished} <= {
        (len(r.prompt_token_ids), r.output_tokens) for r in requests
    }
    assert len(finished) >= 59  # the last one ends after the last step
    assert all(f.completed for f in finished)
    assert {r.binding for r in records} >= {Binding.NONE, Binding.KV_CACHE}


def test_an_aborted_request_is_reported_as_cut_short():
    core = build_core(async_scheduling=False)
    policy = Fixed(seqs=32)
    core.hook.set_policy(policy)
    requests = random_requests(3, count=10)

    def abort_one(step):
        if step == 3:
            core.abort_request("r0")

    run = drive(core, requests, before_step=abort_one)
    cut = [f for r in policy.records for f in r.finished if not f.completed]
    assert [f.prompt_tokens for f in cut] == [len(requests[0].prompt_token_ids)]
    assert len(run.finished) == 9


def test_prompts_are_counted_as_done_and_those_that_went_are_not():
    core = build_core(async_scheduling=False, max_num_seqs=4)
    for number in range(10):
        core.add_request(EngineRequest(f"r{number}", [5] * 9, 5))
    assert core.hook.snapshot().prompts_done == 0
    list(core.complete(core.schedule()))
    assert core.hook.snapshot().prompts_done == 4
    for number in range(6, 10):
        core.abort_request(f"r{number}")
    snapshot = core.hook.snapshot()
    assert (snapshot.waiting, snapshot.prompts_done) == (2, 4)
    drive(core, [])
    assert core.hook.snapshot().prompts_done == 6


@SCHEDULING
def test_a_prompt_that_is_aborted_half_way_counts_neither_as_prefill_nor_as_running(
    async_scheduling,
):
    core = build_core(async_scheduling=async_scheduling, max_num_batched_tokens=32)
    seen = []

    class Watching(Fixed):
        def decide(self, snapshot):
            seen.append((snapshot.running, snapshot.prefill_seqs))
            return super().decide(snapshot)

    core.hook.set_policy(Watching(seqs=32, tokens=32))

    def abort_all(step):
        if step == 3:
            core.abort_request("long")
            core.abort_request("short")

    requests = [EngineRequest("short", [5] * 8, 50), EngineRequest("long", [7] * 400, 50)]
    drive(core, [*requests, EngineRequest("later", [9] * 300, 5)], before_step=abort_all)
    assert (0, 0) in seen
    assert all(0 <= prefills <= running for running, prefills in seen)


CALL_SITES = [
    "policy.decide",
    "policy.observe",
    "listener",
    "adapter.is_new",
    "adapter.before_schedule",
    "adapter.snapshot",
    "adapter.apply",
    "adapter.preempting",
    "adapter.after_schedule",
    "adapter.is_idle",
    "clock",
]


@SCHEDULING
@pytest.mark.parametrize("fails_at", [0, 20], ids=["at once", "later"])
@pytest.mark.parametrize("site", CALL_SITES)
def test_an_exception_anywhere_ends_the_steering_and_nothing_else(
    site, fails_at, async_scheduling, caplog, monkeypatch
):
    core = build_core(async_scheduling=async_scheduling)
    policy, hook = Fixed(seqs=3, tokens=80), core.hook
    hook.set_policy(policy)
    break_at(monkeypatch, hook, policy, site, fails_at)
    requests = random_requests(4)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger="vllm.batchpilot"):
        run = drive(core, requests)
    assert run.output_tokens == {r.request_id: r.output_tokens for r in requests}
    if site == "adapter.preempting":  # three sequences never fill this cache
        assert not logged(caplog)
        return
    assert len(logged(caplog)) == 1
    assert "batchpilot stops steering this engine" in caplog.text
    assert "broken on purpose" in caplog.text
    assert not hook.active
    assert hook.applied_limits == STARTUP
    assert core.scheduler.max_num_active_reqs == STARTUP.max_num_seqs
    assert core.scheduler.max_num_scheduled_tokens == STARTUP.max_num_batched_tokens


def logged(caplog):
    """What batchpilot logged; one record may reach the capture through two loggers."""
    ours = [r for r in caplog.records if r.name == "vllm.batchpilot" and r.levelname != "INFO"]
    return list({id(record): record for record in ours}.values())


def break_at(monkeypatch, hook, policy, site, fails_at):
    """Makes one call site raise from its `fails_at`-th call on."""
    calls = 0

    def wrap(function):
        def broken(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > fails_at:
                raise RuntimeError("broken on purpose")
            return function(*args, **kwargs)

        return broken

    if site == "listener":
        hook.set_listener(wrap(lambda record: None))
    elif site == "clock":
        hook.set_clock(wrap(lambda: 0.0))
    else:
        owner = {"policy": policy, "adapter": hook._adapter}[site.split(".")[0]]
        name = site.split(".")[1]
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


def test_a_failure_while_preempting_leaves_the_preemption_to_vllm(monkeypatch, caplog):
    core = build_core(async_scheduling=False)
    policy = Fixed(seqs=32)
    core.hook.set_policy(policy)
    break_at(monkeypatch, core.hook, policy, "adapter.preempting", 2)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert drive(core, random_requests(0)) == stock(0, async_scheduling=False)
    assert len(logged(caplog)) == 1
    assert not core.hook.active


def test_a_new_policy_takes_over_after_a_failed_one(monkeypatch):
    core = build_core()
    broken = Fixed(seqs=3)
    core.hook.set_policy(broken)
    break_at(monkeypatch, core.hook, broken, "policy.decide", 0)
    drive(core, random_requests(0))
    assert not core.hook.active
    core.hook.set_policy(Fixed(seqs=4))
    run = drive(core, random_requests(1))
    assert core.hook.active
    assert max(map(len, run.steps)) == 4


@pytest.mark.parametrize("missing", ["block_size", "kv_cache_manager"])
def test_a_scheduler_that_lacks_a_part_runs_as_stock_vllm(missing, caplog, monkeypatch):
    from batchpilot.scheduler_hook import vllm_adapter

    expected = stock(0)  # vLLM sets its loggers up while the first scheduler is built
    monkeypatch.setattr(
        vllm_adapter, "PARTS", (*vllm_adapter.PARTS, f"{missing}_renamed_in_a_later_release")
    )
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm.batchpilot"):
        core = build_core()
    assert f"has no {missing}_renamed_in_a_later_release" in core.hook.passthrough_reason
    assert [r.levelname for r in logged(caplog)] == ["WARNING"]
    assert drive(core, random_requests(0)) == expected
    with pytest.raises(RuntimeError, match="does not steer this engine"):
        core.hook.snapshot()


def test_a_limit_attribute_renamed_in_an_untested_release_is_a_passthrough_too(monkeypatch):
    from batchpilot.scheduler_hook import vllm_adapter

    core = build_core()
    monkeypatch.delattr(core.scheduler, "max_num_active_reqs")
    monkeypatch.setattr(vllm_adapter, "vllm_version", "0.40.0")
    with pytest.raises(vllm_adapter.UnsupportedEngineError, match="max_num_active_reqs"):
        vllm_adapter.adapt(core.scheduler, allow_untested=True)


def test_a_new_policy_hears_nothing_of_the_run_before():
    core = build_core(async_scheduling=False)
    core.hook.set_policy(Fixed(seqs=32))
    drive(core, random_requests(0, count=5))
    core.add_request(EngineRequest("late", [5] * 9, 3))  # heard by the old policy, if by any
    policy = Fixed(seqs=32)
    core.hook.set_policy(policy)
    drive(core, random_requests(1, count=5))
    assert sum(len(r.arrived) for r in policy.records) == 5


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.15.1", False), ("0.16.0", True), ("0.32.0+cpu", True), ("0.34.0", False), ("dev", False)],
)
def test_only_known_releases_are_steered_unless_the_operator_allows_it(version, known, monkeypatch):
    from batchpilot.scheduler_hook import vllm_adapter

    core = build_core()
    monkeypatch.setattr(vllm_adapter, "vllm_version", version)
    if known:
        assert vllm_adapter.adapt(core.scheduler)
    else:
        with pytest.raises(vllm_adapter.UnsupportedEngineError, match="allow_untested_vllm"):
            vllm_adapter.adapt(core.scheduler)
        assert vllm_adapter.adapt(core.scheduler, allow_untested=True)


@pytest.mark.parametrize(("aligned", "floor"), [(True, 16), (False, 0), (None, 0)])
def test_a_hybrid_model_whose_prefills_end_on_blocks_is_seen(aligned, floor, monkeypatch):
    from batchpilot.scheduler_hook import vllm_adapter

    core = build_core()
    if aligned is None:  # a release that knows no such models
        monkeypatch.delattr(core.scheduler, "need_mamba_block_aligned_split")
    else:
        monkeypatch.setattr(core.scheduler, "need_mamba_block_aligned_split", aligned)
    assert vllm_adapter.adapt(core.scheduler).facts.prefill_block_tokens == floor


@pytest.mark.parametrize(
    ("chunked", "whole_images", "expected"),
    [(True, False, 0), (False, False, 4096), (True, True, 256), (False, True, 256)],
)
def test_what_must_fit_one_step_keeps_the_token_budget_up(
    chunked, whole_images, expected, monkeypatch
):
    from batchpilot.scheduler_hook import vllm_adapter

    core = build_core(max_num_batched_tokens=256)
    config = core.scheduler.scheduler_config
    monkeypatch.setattr(config, "enable_chunked_prefill", chunked)
    monkeypatch.setattr(config, "disable_chunked_mm_input", whole_images)
    monkeypatch.setattr(core.scheduler.vllm_config.model_config, "max_model_len", 4096)
    assert vllm_adapter.adapt(core.scheduler).facts.unchunked_prefill_tokens == expected


def test_a_pipeline_is_steered_only_without_a_target_between_tokens(monkeypatch):
    from batchpilot.scheduler_hook import vllm_adapter

    core = build_core()
    parallel = core.scheduler.vllm_config.parallel_config
    monkeypatch.setattr(parallel, "pipeline_parallel_size", 2)
    assert vllm_adapter.adapt(core.scheduler)
    with pytest.raises(vllm_adapter.UnsupportedEngineError, match="pipeline_parallel_size=2"):
        vllm_adapter.adapt(core.scheduler, has_target=True)


@pytest.mark.parametrize("is_async", [True, False])
def test_the_stock_scheduler_is_the_one_vllm_would_take(is_async):
    from vllm.v1.core.sched import diffusion_scheduler

    from batchpilot.scheduler_hook import vllm_adapter

    scheduling = SimpleNamespace(async_scheduling=is_async)
    plain = SimpleNamespace(scheduler_config=scheduling, diffusion_config=None)
    older = SimpleNamespace(scheduler_config=scheduling)  # a release that knows no such models
    expected = vllm_adapter.AsyncScheduler if is_async else vllm_adapter.SyncScheduler
    assert vllm_adapter.stock_scheduler(plain) is vllm_adapter.stock_scheduler(older) is expected
    diffusion = SimpleNamespace(scheduler_config=scheduling, diffusion_config=object())
    kind = "DiffusionAsyncScheduler" if is_async else "DiffusionScheduler"
    assert vllm_adapter.stock_scheduler(diffusion) is getattr(diffusion_scheduler, kind)


def test_room_for_drafts_that_are_not_found_shrinks_within_tens_of_steps(monkeypatch):
    """Whatever of a step's budget drafts leave, vLLM gives to prompts."""
    core = build_core(async_scheduling=False)
    config = core.scheduler.scheduler_config
    monkeypatch.setattr(core.scheduler, "num_spec_tokens", 5)
    monkeypatch.setattr(config, "long_prefill_token_threshold", 128)
    adapter = VllmAdapter(core.scheduler)

    def room_after_step() -> float:
        adapter.before_schedule()
        output = core.schedule()
        adapter.after_schedule(output)
        list(core.complete(output))
        snapshot = adapter.snapshot(0.0, Binding.NONE)
        assert snapshot.decode_tokens(10) == math.ceil(10 * snapshot.tokens_per_decode)
        return snapshot.tokens_per_decode

    assert adapter.facts.tokens_per_decode == 6
    core.add_request(EngineRequest("a", [5] * 9, 60))
    assert room_after_step() == 6.0  # a prompt says nothing
    rooms = [room_after_step() for _ in range(30)]
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[-1] == 1.0
    adapter.apply(BatchLimits(8, 8))  # nor is it kept from long prompts
    assert config.long_prefill_token_threshold == 4


def test_an_engine_that_does_not_speculate_has_one_token_for_each_sequence():
    snapshot = build_core().hook.snapshot()
    assert (snapshot.tokens_per_decode, snapshot.decode_tokens(7)) == (None, 7)


def start_streaming_sessions(core, count, prompt=9):
    """Sessions whose first segment is answered, so that they pause until the next one comes."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    for place in range(count):
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        core.scheduler.add_request(
            Request(f"session{place}", [5] * prompt, sampling, pooling_params=None, resumable=True)
        )
    while core.scheduler.num_waiting_for_streaming_input < count:
        list(core.complete(core.schedule()))


def serve_for(core, steps):
    """Steps the engine; returns the most that ran at once, and how many requests ended."""
    most = ended = 0
    for _ in range(steps):
        outputs = core.complete(output := core.schedule())
        ended += sum(item.finish_reason is not None for item in outputs)
        most = max(most, len(output.num_scheduled_tokens))
    return most, ended


def test_paused_streaming_sessions_do_not_wait_for_admission():
    core = build_core(async_scheduling=False)
    start_streaming_sessions(core, 2)
    core.add_request(random_requests(0, count=1)[0])
    assert core.hook.snapshot().waiting == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_paused_streaming_sessions_do_not_take_the_places_a_policy_gives(limit):
    """vLLM counts them beside RUNNING: a limit of 3 would let nobody in for ever."""
    core = build_core(async_scheduling=False)
    start_streaming_sessions(core, 8)
    core.hook.set_policy(policy := Fixed(seqs=limit))
    for request in random_requests(0, count=5, longest=20):
        core.add_request(request)
    assert serve_for(core, 200) == (limit, 5)
    waited = [record for record in policy.records if record.binding is not Binding.NONE]
    assert {record.binding for record in waited} == {Binding.MAX_NUM_SEQS}
    assert core.scheduler.num_waiting_for_streaming_input == 8


@pytest.mark.parametrize("policy", ["memory", "memory-peak"])
def test_what_paused_streaming_sessions_hold_is_not_charged_to_those_who_run(policy):
    core = build_core(async_scheduling=False, enable_prefix_caching=False)
    start_streaming_sessions(core, 8, prompt=100)
    core.hook.set_policy(PolicySpec.parse(policy).build())
    for place in range(6):
        core.add_request(EngineRequest(f"r{place}", [5] * 4, 8))
    assert core.hook.snapshot().outside_blocks == 8 * 7 == core.hook.snapshot().used_blocks
    assert serve_for(core, 40) == (6, 6)  # a block each, of the eight that are left


def test_nothing_is_held_outside_where_all_who_hold_blocks_run():
    core = build_core(async_scheduling=False)
    core.hook.set_policy(Fixed(seqs=2))
    for request in random_requests(0, count=5):
        core.add_request(request)
    assert serve_for(core, 10)[0] == 2
    assert core.hook.snapshot().used_blocks > core.hook.snapshot().outside_blocks == 0


@pytest.fixture
def long_prompts(monkeypatch):
    """A scheduler whose long prompts take half of its budget at most, and its adapter."""
    core = build_core(async_scheduling=False, kv_blocks=201)
    config = core.scheduler.scheduler_config
    monkeypatch.setattr(config, "long_prefill_token_threshold", 128)
    core.hook._adapter = VllmAdapter(core.scheduler)
    return core


def test_a_long_prompt_leaves_those_behind_it_their_tokens_in_a_smaller_budget(long_prompts):
    """With a threshold others run behind an unfinished prompt, and vLLM serves in order."""
    core = long_prompts
    core.hook.set_policy(Fixed(seqs=8, tokens=70))
    core.add_request(EngineRequest("long", [5] * 1500, 2))
    for name in "abc":
        core.add_request(EngineRequest(name, [7] * 9, 12))
    decoded = []
    for _ in range(12):
        output = core.schedule()
        decoded.append({*output.num_scheduled_tokens})
        list(core.complete(output))
    assert decoded[3:] == [{"long", "a", "b", "c"}] * 9


def test_the_threshold_keeps_its_share_of_the_budget_and_comes_back(long_prompts):
    core, adapter = long_prompts, long_prompts.hook._adapter
    config = core.scheduler.scheduler_config
    thresholds = []
    for tokens in (256, 128, 64, 1):
        adapter.apply(BatchLimits(8, tokens))
        thresholds.append(config.long_prefill_token_threshold)
    assert thresholds == [128, 64, 32, 1]
    adapter.restore()
    assert config.long_prefill_token_threshold == 128


def test_the_start_up_limit_counts_paused_streaming_sessions_as_stock_vllm_does():
    core = build_core(async_scheduling=False, max_num_seqs=10)
    start_streaming_sessions(core, 8)
    core.hook.set_policy(policy := Fixed(seqs=10))
    for request in random_requests(0, count=5, longest=20):
        core.add_request(request)
    assert serve_for(core, 200) == (2, 5)
    assert Binding.MAX_NUM_SEQS in {record.binding for record in policy.records}


def test_time_that_passes_with_nothing_in_flight_is_no_steps_time():
    """As when a server is paused for a while, its sequences still in RUNNING."""
    core = build_core(async_scheduling=False)
    core.hook.set_policy(policy := Fixed(seqs=32))
    clock = [0.0]
    core.hook.set_clock(lambda: clock[0])

    def step_after(pause: float) -> None:
        clock[0] += pause
        output = core.schedule()
        clock[0] += 0.01
        list(core.complete(output))

    core.add_request(EngineRequest("a", [5] * 9, 60))
    for _ in range(20):
        step_after(0.0)
    step_after(60.0)
    step_after(0.0)
    *_, before, paused, after = policy.records
    assert [record.regular for record in (before, paused, after)] == [True, False, True]
    assert paused.seconds == pytest.approx(0.01)
