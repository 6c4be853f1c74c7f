from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.request_stream import RequestStream
from batchpilot.env.workloads import WorkloadSpec


def stream(spec: WorkloadSpec, horizon_seconds: float = 10.0, **settings: Any) -> RequestStream:
    usual = {"vocab_size": 1000, "max_model_len": 100_000, "refill_below": 8}
    return RequestStream(spec, horizon_seconds=horizon_seconds, **{**usual, **settings})


def drain(requests: RequestStream, until: float = 1e9) -> list[Any]:
    return list(requests.due(until, lambda: 0))


def test_requests_come_when_they_are_due():
    requests = stream(WorkloadSpec("fixed:5:5", "poisson:10"))
    first = requests.next_seconds
    assert first is not None
    assert drain(requests, first / 2) == []
    (arrival,) = itertools.islice(requests.due(first, lambda: 0), 1)
    assert (arrival.seconds, len(arrival.request.prompt_token_ids)) == (first, 5)


@pytest.mark.parametrize("rate", [1, 40, 400])
def test_a_synthetic_workload_lasts_to_the_horizon(rate: int):
    times = [a.seconds for a in drain(stream(WorkloadSpec("fixed:5:5", f"poisson:{rate}")))]
    assert times == sorted(times)
    assert times[-1] < 10.0
    # A Poisson count, five standard deviations.
    assert len(times) == pytest.approx(rate * 10, abs=5 * (rate * 10) ** 0.5)


def test_saturated_arrivals_never_run_dry():
    requests = stream(WorkloadSpec("chat", "saturated"))
    ids = set()
    for second in range(100):
        arrivals = list(requests.due(float(second), lambda: 2))
        assert len(arrivals) == 6
        assert {arrival.seconds for arrival in arrivals} == {float(second)}
        ids |= {arrival.request.request_id for arrival in arrivals}
    assert len(ids) == 600
    assert list(requests.due(100.0, lambda: 8)) == []


def test_a_number_of_requests_ends_it():
    requests = stream(WorkloadSpec("chat", "saturated", num_requests=5))
    assert len(drain(requests)) == 5
    assert requests.next_seconds is None


def test_the_seed_decides_everything():
    def prompts(seed: int) -> list[Any]:
        requests = stream(WorkloadSpec("chat", "saturated", seed=seed), refill_below=100)
        return [drain(requests) for _ in range(4)]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    lines = [f"{second},{second + 1},1" for second in range(1000)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    return path


def test_a_trace_is_cut_at_the_horizon(trace: Path):
    arrivals = drain(stream(WorkloadSpec(str(trace), rate_scale=2.0)))
    assert [arrival.seconds for arrival in arrivals] == [i / 2 for i in range(20)]


def test_a_random_stretch_of_a_trace(trace: Path):
    starts = set()
    for seed in range(10):
        arrivals = drain(stream(WorkloadSpec(str(trace), seed=seed), random_start=True))
        lengths = [len(arrival.request.prompt_token_ids) for arrival in arrivals]
        assert lengths == list(range(lengths[0], lengths[0] + 10))
        assert 0 <= arrivals[0].seconds < 1
        starts.add(lengths[0])
    assert len(starts) == 10
    assert max(starts) <= 991


def test_a_trace_shorter_than_the_horizon_is_taken_whole(trace: Path):
    assert len(drain(stream(WorkloadSpec(str(trace)), 5000.0, random_start=True))) == 1000


@pytest.fixture
def quiet(tmp_path: Path) -> Path:
    """Bursts far from each other; a request's length names its second."""
    path = tmp_path / "quiet.csv"
    lines = [f"{second},{second + 1},1" for second in (0, 1, 2, 3, 1000, 1001, 1002)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    return path


@pytest.mark.parametrize("stretch", ["", ":start_s=2", ":end_s=1001.5", ":start_s=500"])
def test_a_random_stretch_is_never_empty(quiet: Path, stretch: str):
    seen = set()
    for seed in range(50):
        spec = WorkloadSpec(f"trace:{quiet}{stretch}", seed=seed)
        arrivals = drain(stream(spec, 120.0, random_start=True))
        assert 0 <= arrivals[0].seconds <= arrivals[-1].seconds <= 120
        seen |= {len(arrival.request.prompt_token_ids) - 1 for arrival in arrivals}
    assert 1001 in seen
    assert (3 in seen) == (stretch != ":start_s=500")


def test_a_stretch_without_any_request_is_said(quiet: Path):
    spec = WorkloadSpec(f"trace:{quiet}:start_s=10:end_s=900")
    with pytest.raises(ConfigError, match="no request from start_s="):
        stream(spec, 120.0, random_start=True)


def test_the_draw_of_a_start_is_kept_where_something_comes(trace: Path):
    for seed in range(5):
        drawn = np.random.default_rng([seed, 100]).uniform(0.0, 989.0)
        first, *_ = drain(stream(WorkloadSpec(str(trace), seed=seed), random_start=True))
        assert len(first.request.prompt_token_ids) == int(drawn) + 2
        assert first.seconds == pytest.approx(1 - drawn % 1)


@pytest.mark.parametrize("arrivals", [" saturated", "saturated ", ""])
def test_blanks_around_saturated_say_nothing(arrivals: str):
    requests = stream(WorkloadSpec("fixed:5:5", arrivals))
    assert [len(list(requests.due(0.0, lambda: 2))) for _ in range(50)] == [6] * 50


@pytest.mark.parametrize(
    ("arrivals", "second"),
    [("poisson:1,saturated@60", 30), ("saturated,poisson:4@60", 0), ("poisson:1, saturated@4", 2)],
)
def test_arrivals_that_would_never_reach_the_horizon(arrivals: str, second: int):
    error = rf"arrivals '{arrivals}': from {second} s on .* horizon_s=100; give num_requests"
    with pytest.raises(ConfigError, match=error):
        stream(WorkloadSpec("fixed:5:5", arrivals, rate_scale=2.0), 100.0)
    limited = WorkloadSpec("fixed:5:5", arrivals, num_requests=500)
    assert len(drain(stream(limited, 100.0))) == 500


def test_all_at_once_after_the_horizon_is_as_good_as_never():
    times = [a.seconds for a in drain(stream(WorkloadSpec("fixed:5:5", "poisson:9,saturated@10")))]
    assert len(times) > 50
    assert times[-1] < 10.0


def test_what_is_too_long_is_refused(trace: Path):
    with pytest.raises(ConfigError, match=r"'trace\.csv' line 6: 5 prompt \+ 1 output"):
        stream(WorkloadSpec(str(trace)), max_model_len=5)


def test_a_random_start_in_a_trace_whose_times_count_from_1970(tmp_path: Path):
    path = tmp_path / "epoch.csv"
    rows = [f"{1_700_000_000 + second},5,1" for second in range(600)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]))
    spec = WorkloadSpec(f"trace:{path}:start_s=1700000000")
    times = [a.seconds for a in drain(stream(spec, 100.0, random_start=True))]
    assert len(times) == 100
    assert 0.0 <= times[0] < 1.0
