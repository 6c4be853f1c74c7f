"""The hook inside a live vLLM: whatever feature is on, no limit loses or changes a request."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from conftest import SMALL
from driving import Flapping, random_requests

from batchpilot.agents.catalog import PolicySpec
from batchpilot.env.engine import EngineRequest
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig

pytestmark = pytest.mark.live

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
FEATURES = {
    "sync": {"async_scheduling": False},
    "async": {"async_scheduling": True},
    "prefix caching": {"enable_prefix_caching": True},
    "no prefix caching": {"enable_prefix_caching": False},
    "no chunked prefill": {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
    "priority": {"scheduling_policy": "priority"},
}
#: 512 tokens of KV cache for 16 sequences: memory binds.
SCARCE = {"kv_blocks": 17, "max_model_len": 512}


def run(engine, requests, *, on_step=lambda step: None):
    """Serves the requests to the end; returns output tokens by request."""
    tokens = {}
    for request in requests:
        engine.add_request(request)
    steps = 0
    while engine.has_unfinished_requests():
        on_step(steps)
        for name, count in engine.step().new_tokens.items():
            tokens[name] = tokens.get(name, 0) + count
        steps += 1
        assert steps < 20_000, "the engine stands still"
    engine.reset()
    return tokens


def wanted(requests):
    return {request.request_id: request.output_tokens for request in requests}


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_of_vllm_works_under_policies_and_flapping_limits(tiny_engine, feature):
    serve_under_every_limit(tiny_engine(**SCARCE, **FEATURES[feature]))


def serve_under_every_limit(engine):
    assert engine.facts.startup_limits.max_num_seqs == 16
    for policy in ("static", "memory", "memory-peak", "memory+sla"):
        engine.set_policy(PolicySpec.parse(policy).build({"itl_slo_ms": 5.0}))
        requests = random_requests(1, count=24)
        assert run(engine, requests) == wanted(requests), policy
    for seed in range(5):
        engine.set_policy(Flapping(seed))
        requests = random_requests(seed, count=12, longest=60)
        assert run(engine, requests) == wanted(requests), f"seed {seed}"


def test_ngram_speculation_works_under_policies_and_flapping_limits():
    # In a process of its own: once numba is loaded, vLLM 0.32 cannot start a further engine.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        most, lately = pool.submit(speculate).result(timeout=300)
    assert most == 4
    assert 1 <= lately <= most


def speculate():
    settings = {**SMALL, **SCARCE, "speculative": NGRAM, "async_scheduling": False}
    with LiveEngine(LiveEngineConfig(**settings)) as engine:
        serve_under_every_limit(engine)
        return engine.facts.tokens_per_decode, engine.snapshot().tokens_per_decode


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_limits_flapping_at_random_lose_nothing_in_100_seeds(tiny_engine, scheduling):
    engine = tiny_engine(**SCARCE, **FEATURES[scheduling])
    for seed in range(100):
        engine.set_policy(Flapping(seed))
        requests = random_requests(seed, count=6, longest=40)
        assert run(engine, requests) == wanted(requests), f"seed {seed}"


def test_the_scheduler_is_the_base_that_the_configuration_asks_for(tiny_engine):
    for is_async, name in ((True, "SteeredAsyncScheduler"), (False, "SteeredSyncScheduler")):
        assert type(tiny_engine(async_scheduling=is_async)._scheduler).__name__ == name


def test_limits_do_not_change_what_is_generated(tiny_engine):
    engine = tiny_engine(enable_prefix_caching=False)
    outputs = []
    for policy in (None, PolicySpec.parse("static:max_num_seqs=1").build()):
        engine.set_policy(policy)
        outputs.append(generate(engine, n=1))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]["a"][0]) == 20


def test_parallel_samples_of_one_prompt_all_finish(tiny_engine):
    engine = tiny_engine()
    engine.set_policy(Flapping(0))
    samples = generate(engine, n=4)
    assert [len(tokens) for tokens in samples["a"]] == [20] * 4
    assert [len(tokens) for tokens in samples["b"]] == [20] * 4


def generate(engine, n):
    """Token ids of every sample of two prompts, straight from vLLM."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        n=n,
        max_tokens=20,
        ignore_eos=True,
        temperature=0.0 if n == 1 else 1.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    llm, results = engine._llm, {}
    for name, start in (("a", 10), ("b", 50)):
        llm.add_request(name, {"prompt_token_ids": list(range(start, start + 30))}, params)
    while llm.has_unfinished_requests():
        for output in llm.step():
            results[output.request_id] = [list(sample.token_ids) for sample in output.outputs]
    engine.reset()
    return results


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_aborted_requests_free_their_places(tiny_engine, scheduling):
    engine = tiny_engine(**FEATURES[scheduling])
    engine.set_policy(PolicySpec.parse("static:max_num_seqs=4").build())
    requests = [EngineRequest(f"r{i}", [7 + i] * 20, 40) for i in range(12)]

    def abort(step):
        if step in (3, 5, 9):
            engine.abort_request(f"r{step}")

    tokens = run(engine, requests, on_step=abort)
    kept = {f"r{i}": 40 for i in range(12) if i not in (3, 5, 9)}
    assert {name: tokens[name] for name in kept} == kept
    assert engine.snapshot().running == 0
    assert engine.snapshot().used_blocks == 0
