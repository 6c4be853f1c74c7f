from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, Decision, EngineSnapshot, Source, StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.engine import EngineRequest, EngineStep
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig
from batchpilot.env.workloads import build_workload, engine_requests

StartEngine = Callable[..., LiveEngine]


def request(name: str, prompt_tokens: int = 8, output_tokens: int = 4, **more: int):
    # Ids follow from the name, so that prompts are distinct and runs the same.
    first = 100 + sum(map(ord, name)) % 500
    return EngineRequest(
        name, [first + i % 300 for i in range(prompt_tokens)], output_tokens, **more
    )


def drain(engine: LiveEngine) -> list[EngineStep]:
    steps = []
    while engine.has_unfinished_requests():
        steps.append(engine.step())
    return steps


def tokens(steps: Iterable[EngineStep]) -> Counter[str]:
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.new_tokens)
    return total


class Watcher:
    """Holds one limit and remembers what it is told."""

    def __init__(self, max_num_seqs: int) -> None:
        self.limits = BatchLimits(max_num_seqs, 256)
        self.seen: list[EngineSnapshot] = []
        self.records: list[StepRecord] = []

    def observe(self, step: StepRecord) -> None:
        self.records.append(step)

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        self.seen.append(snapshot)
        return Decision(self.limits, Source.STATIC, "watch")


@pytest.fixture(scope="module")
def shared(tiny_engine: StartEngine) -> LiveEngine:
    return tiny_engine()


@pytest.fixture
def engine(shared: LiveEngine) -> LiveEngine:
    """The shared engine, as good as new."""
    shared.abort_all()
    shared.set_policy(None)
    shared.reset()
    return shared


@pytest.mark.live
def test_facts(engine: LiveEngine):
    assert engine.facts.startup_limits == BatchLimits(16, 256)
    assert (engine.facts.total_blocks, engine.facts.block_size) == (64, 32)
    assert engine.max_model_len == 1024
    assert engine.applied_limits == BatchLimits(16, 256)
    assert engine.decision is None


@pytest.mark.live
def test_every_request_gets_exactly_its_tokens(engine: LiveEngine):
    workload = build_workload("lognormal:40:30:prompt_max=200:output_max=100", num_requests=40)
    requests = engine_requests(workload, vocab_size=engine.model.vocab_size)
    for item in requests:
        engine.add_request(item)
    steps = drain(engine)
    assert tokens(steps) == {r.request_id: r.output_tokens for r in requests}
    finished = [name for step in steps for name in step.finished]
    assert sorted(finished) == sorted(r.request_id for r in requests)
    assert all(count > 0 for step in steps for count in step.new_tokens.values())
    records = [step.record for step in steps if step.record is not None]
    assert sum(len(record.arrived) for record in records) == 40
    assert max(record.running for record in records) == 16
    clocks = [step.clock_seconds for step in steps]
    assert clocks == sorted(clocks)
    assert 0 < clocks[0] < clocks[-1] < engine.clock_seconds


@pytest.mark.live
def test_a_full_cache_preempts_and_everything_still_completes(engine: LiveEngine):
    # Sixteen at 32 + 200 tokens need 128 blocks of 32; there are 64.
    for index in range(16):
        engine.add_request(request(f"r{index}", 32, 200))
    steps = drain(engine)
    assert tokens(steps) == {f"r{index}": 200 for index in range(16)}
    assert sum(step.record.preemptions for step in steps if step.record) > 0


@pytest.mark.live
def test_abort(engine: LiveEngine):
    engine.add_request(request("short", output_tokens=5))
    engine.add_request(request("long", output_tokens=500))
    engine.step()
    engine.abort_request("long")
    engine.abort_request("never heard of")
    steps = drain(engine)
    assert "long" not in {name for step in steps for name in step.finished}
    assert tokens(steps)["long"] == 0
    engine.add_request(request("long", output_tokens=3))
    assert tokens(drain(engine)) == {"long": 3}


@pytest.mark.live
def test_abort_all(engine: LiveEngine):
    for index in range(20):
        engine.add_request(request(f"r{index}", output_tokens=500))
    engine.step()
    assert engine.abort_all() == 20
    assert engine.abort_all() == 0
    assert not engine.has_unfinished_requests()
    engine.reset()
    assert engine.snapshot().used_blocks == 0


@pytest.mark.live
def test_reset_wants_an_idle_engine(engine: LiveEngine):
    engine.add_request(request("a"))
    engine.add_request(request("b"))
    with pytest.raises(RuntimeError, match="cannot reset with 2 unfinished requests"):
        engine.reset()
    drain(engine)
    engine.reset()


@pytest.mark.live
def test_reset_drops_the_prefix_cache(engine: LiveEngine):
    def prefill_tokens() -> int:
        engine.add_request(request("same prompt", 96, 2))
        return sum(step.record.prefill_tokens for step in drain(engine) if step.record)

    assert prefill_tokens() == 96
    assert prefill_tokens() < 96
    engine.reset()
    assert prefill_tokens() == 96


@pytest.mark.live
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (EngineRequest("r", [], 4), "the prompt is empty"),
        (EngineRequest("r", [100], 0), "output_tokens=0 is below 1"),
        (EngineRequest("r", [100, 1024], 4), "token ids 100 to 1024 are not all in 0 to 1023"),
        (EngineRequest("r", [-1], 4), "token ids -1 to -1"),
        (request("r", 1000, 25), "1000 prompt . 25 output tokens are more than 1024"),
        (request("taken"), "request id 'taken' is in use"),
    ],
)
def test_requests_that_cannot_be_served(engine: LiveEngine, bad: EngineRequest, error: str):
    engine.add_request(request("taken"))
    with pytest.raises(ValueError, match=error):
        engine.add_request(bad)
    assert tokens(drain(engine)) == {"taken": 4}


@pytest.mark.live
def test_the_longest_request_fits(engine: LiveEngine):
    engine.add_request(request("r", 1000, 24))
    assert tokens(drain(engine)) == {"r": 24}


@pytest.mark.live
def test_a_policy_steers(engine: LiveEngine):
    policy = Watcher(max_num_seqs=3)
    engine.set_policy(policy)
    for index in range(9):
        engine.add_request(request(f"r{index}"))
    steps = drain(engine)
    assert max(record.running for record in policy.records) == 3
    assert policy.records == [step.record for step in steps if step.record]
    assert engine.applied_limits == BatchLimits(3, 256)
    assert engine.decision is not None
    assert engine.decision.reason == "watch"
    assert policy.seen[0].waiting == 9


@pytest.mark.live
def test_no_policy_restores_the_start_up_limits(engine: LiveEngine):
    engine.set_policy(PolicySpec.parse("static:max_num_seqs=2").build())
    engine.add_request(request("r"))
    drain(engine)
    engine.set_policy(None)
    for index in range(9):
        engine.add_request(request(f"r{index}"))
    running = [step.record.running for step in drain(engine) if step.record]
    assert max(running) == 9
    assert engine.applied_limits == BatchLimits(16, 256)


@pytest.mark.live
def test_a_policy_that_fails_ends_the_measurement(engine: LiveEngine):
    policy = Watcher(max_num_seqs=3)
    policy.decide = None  # type: ignore[assignment, method-assign]
    engine.set_policy(policy)
    engine.add_request(request("r"))
    with pytest.raises(RuntimeError, match="batchpilot does not steer this engine"):
        engine.step()
    engine.abort_all()
    engine.set_policy(None)
    engine.add_request(request("r"))
    assert tokens(drain(engine)) == {"r": 4}


@pytest.mark.live
def test_watermark_keeps_blocks_free(engine: LiveEngine):
    def peak_running(watermark: float) -> int:
        engine.set_policy(None, watermark=watermark)
        for index in range(8):
            engine.add_request(request(f"r{index}", 224, 30))
        return max(step.record.running for step in drain(engine) if step.record)

    # Each needs 8 of 64 blocks from start to end, and half of 65 (vLLM counts its own) stay free:
    # a fourth is admitted at 40 free blocks, a fifth would be at 32.
    assert peak_running(0.5) == 4
    assert peak_running(0.0) == 8


@pytest.mark.live
@pytest.mark.parametrize("watermark", [-0.1, 1.0, float("nan")])
def test_bad_watermark(engine: LiveEngine, watermark: float):
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        engine.set_policy(None, watermark=watermark)


@pytest.mark.live
def test_waiting_lets_the_clock_run(engine: LiveEngine):
    now = engine.clock_seconds
    engine.wait_until(now + 0.05)
    assert engine.clock_seconds >= now + 0.05
    engine.wait_until(0.0)
    assert engine.snapshot().clock_seconds >= now + 0.05


@pytest.mark.live
def test_priority_in_a_second_engine(tiny_engine: StartEngine, shared: LiveEngine):
    with tiny_engine(scheduling_policy="priority", max_num_seqs=1) as engine:
        with pytest.raises(RuntimeError, match="this engine is closed"):
            shared.step()
        for name, priority in (("late", 2), ("soon", 0), ("then", 1)):
            engine.add_request(request(name, output_tokens=20, priority=priority))
        steps = drain(engine)
        assert [name for step in steps for name in step.finished] == ["soon", "then", "late"]
        assert tokens(steps) == {"late": 20, "soon": 20, "then": 20}
    engine.close()
    for use in (engine.step, engine.reset, engine.snapshot, lambda: engine.set_policy(None)):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            use()


SPECULATION = """
from batchpilot.env.engine import EngineRequest
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig

ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
with LiveEngine(LiveEngineConfig(model="tiny", kv_blocks=200, speculative=ngram)) as engine:
    engine.add_request(EngineRequest("r", [100, 101, 102, 103] * 8, 40))
    total = 0
    while engine.has_unfinished_requests():
        total += sum(engine.step().new_tokens.values())
    print(engine.facts.tokens_per_decode, total)
"""


@pytest.mark.live
def test_speculation(tmp_path: Path):
    # In a process of its own: vLLM starts no other engine after it.
    environment = {**os.environ, "BATCHPILOT_CACHE": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", SPECULATION], capture_output=True, text=True, env=environment
    )
    assert process.stdout == "3 40\n", process.stderr


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_batched_tokens": "many"}, "max_num_batched_tokens='many' is not a whole"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy='lifo' is not one of: fcfs, priority"),
        (
            {"max_num_seqs": 64, "max_num_batched_tokens": 32},
            "max_num_batched_tokens=32 must be at least max_num_seqs=64",
        ),
    ],
)
def test_bad_settings(settings: dict[str, object], error: str):
    with pytest.raises(ConfigError, match=error):
        LiveEngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "gpt-5"}, "no model 'gpt-5'"),
        ({"extra_engine_args": {"seed": 3}}, "extra_engine_args: seed is set by this engine"),
        ({"extra_engine_args": {"colour": 3}}, "vLLM refuses .*'colour'"),
        ({"max_model_len": 10_000}, "vLLM refuses this configuration: .*max_model_len"),
    ],
)
@pytest.mark.live
def test_settings_that_vllm_refuses(tiny_engine: StartEngine, settings: dict, error: str):
    with pytest.raises(ConfigError, match=f"(?s){error}"):
        tiny_engine(**settings)


def test_nothing_heavy_is_imported_before_an_engine_starts():
    script = (
        "import sys; import batchpilot.env.live_engine; "
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert process.stdout == "[]\n"
