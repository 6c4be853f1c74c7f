from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.workloads import (
    DEFAULT_NUM_REQUESTS,
    Workload,
    WorkloadRequest,
    build_workload,
    engine_requests,
)

HEADER = "arrival_s,input_tokens,output_tokens"


@pytest.fixture
def trace(tmp_path: Path):
    def write(*lines: str) -> Path:
        path = tmp_path / "trace.csv"
        path.write_text("\n".join(lines))
        return path

    return write


def test_fixed_saturated():
    workload = build_workload("fixed:prompt_tokens=128:output_tokens=64", num_requests=3)
    assert workload.requests == (WorkloadRequest(0.0, 128, 64),) * 3
    assert (workload.prompt_tokens, workload.output_tokens) == (384, 192)
    assert workload.name == "fixed:prompt_tokens=128:output_tokens=64"


def test_values_without_a_key_take_the_parameters_in_order():
    assert (
        build_workload("fixed:128:64").requests
        == build_workload("fixed:prompt_tokens=128:output_tokens=64").requests
        == build_workload("fixed:128:output_tokens=64").requests
    )


def test_chat_under_a_seed():
    requests = build_workload("chat", num_requests=4, arrivals="poisson:2", seed=7).requests
    assert [(round(r.arrival_seconds, 3), r.prompt_tokens, r.output_tokens) for r in requests] == [
        (0.773, 73, 85),
        (0.92, 92, 59),
        (1.044, 58, 122),
        (1.117, 36, 300),
    ]


@given(st.integers(0, 2**32), st.sampled_from(["chat", "lognormal:50:80", "fixed:9:9"]))
@settings(max_examples=25, deadline=None)
def test_the_seed_decides_everything(seed: int, text: str):
    first = build_workload(text, num_requests=20, arrivals="poisson:4", seed=seed)
    again = build_workload(text, num_requests=20, arrivals="poisson:4", seed=seed)
    assert first == again
    assert engine_requests(first, vocab_size=512, seed=seed) == engine_requests(
        again, vocab_size=512, seed=seed
    )


def test_another_seed_gives_another_workload():
    assert build_workload("chat", seed=1).requests != build_workload("chat", seed=2).requests


def test_arrivals_leave_lengths_alone():
    saturated = build_workload("chat", seed=3).requests
    poisson = build_workload("chat", seed=3, arrivals="poisson:5").requests
    assert [(r.prompt_tokens, r.output_tokens) for r in saturated] == [
        (r.prompt_tokens, r.output_tokens) for r in poisson
    ]


def test_lognormal_mean_is_the_mean_of_the_lengths():
    requests = build_workload(
        "lognormal:prompt_mean=200:output_mean=300:prompt_sigma=0.5:output_sigma=0.25"
        ":prompt_max=100000:output_max=100000",
        num_requests=20_000,
    ).requests
    logs = [math.log(r.prompt_tokens) for r in requests]
    mean_log = sum(logs) / len(logs)
    sigma = math.sqrt(sum((x - mean_log) ** 2 for x in logs) / len(logs))
    # Standard errors: 0.75 and 0.53 tokens, 0.0025; the bounds are five of them.
    assert sum(r.prompt_tokens for r in requests) / 20_000 == pytest.approx(200, abs=3.8)
    assert sum(r.output_tokens for r in requests) / 20_000 == pytest.approx(300, abs=2.7)
    assert sigma == pytest.approx(0.5, abs=0.0125)


@given(st.floats(1, 5000), st.floats(0, 50), st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_lognormal_stays_between_one_and_the_maximum(mean: float, sigma: float, most: int):
    text = f"lognormal:{mean}:{mean}:{sigma}:{sigma}:{most}:{most}"
    for request in build_workload(text, num_requests=30).requests:
        assert 1 <= request.prompt_tokens <= most
        assert 1 <= request.output_tokens <= most


def test_poisson_rate():
    times = [
        r.arrival_seconds
        for r in build_workload("fixed:1:1", num_requests=10_000, arrivals="poisson:8").requests
    ]
    assert times == sorted(times)
    assert times[0] > 0
    # The sum of 10,000 gaps: mean 1250 s, standard deviation 12.5 s.
    assert times[-1] == pytest.approx(1250, abs=62.5)


@pytest.mark.parametrize("arrivals", ["poisson:8", "poisson:rate=8"])
def test_rate_scale_divides_times(arrivals: str):
    plain = build_workload("fixed:1:1", num_requests=50, arrivals=arrivals).requests
    faster = build_workload("fixed:1:1", num_requests=50, arrivals=arrivals, rate_scale=4).requests
    assert [r.arrival_seconds / 4 for r in plain] == [r.arrival_seconds for r in faster]


def test_default_number_of_requests():
    assert len(build_workload("chat").requests) == DEFAULT_NUM_REQUESTS


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("poem", r"unknown workload 'poem'; known: chat, fixed, lognormal, a \.csv file"),
        ("", "unknown workload ''"),
        ("fixed", "prompt_tokens is required"),
        ("fixed:128", "output_tokens is required"),
        ("fixed:1:2:3", "'3' is one value too many"),
        ("fixed:prompt_tokens=1:2", "'2' is one value too many, or lacks its key="),
        ("fixed:1:prompt_tokens=2", "prompt_tokens is given twice"),
        ("fixed:prompt_tokens=:output_tokens=1", "'prompt_tokens=' is not key=value"),
        ("fixed:1::2", "'' is not key=value"),
        ("fixed:0:1", "prompt_tokens=0 must be at least 1"),
        ("fixed:-5:1", "prompt_tokens=-5 must be at least 1"),
        ("fixed:1.5:1", "prompt_tokens='1.5' is not a whole number"),
        ("fixed:prompt=1:output_tokens=1", "unknown key 'prompt'; allowed: prompt_tokens, output"),
        ("lognormal:nan:5", "prompt_mean='nan' is not a finite number"),
        ("lognormal:5:5:-1", "prompt_sigma=-1.0 must be at least 0"),
    ],
)
def test_bad_workload_text(text: str, error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload(text)


@pytest.mark.parametrize(
    ("arrivals", "error"),
    [
        ("bus", "unknown arrivals 'bus'; known: saturated, poisson, trace"),
        ("poisson", "rate is required"),
        ("poisson:0", "rate=0.0 must be greater than 0"),
        ("poisson:-3", "rate=-3.0 must be greater than 0"),
        ("poisson:nan", "rate='nan' is not a finite number"),
        ("poisson:fast", "rate='fast' is not a finite number"),
        ("saturated:1", "'1' is one value too many"),
        ("trace", "needs a workload from a CSV file"),
    ],
)
def test_bad_arrivals(arrivals: str, error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload("chat", arrivals=arrivals)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_requests": 0}, "num_requests=0 must be at least 1"),
        ({"rate_scale": 0.0}, "rate_scale=0.0 must be a number greater than 0"),
        ({"rate_scale": math.nan}, "rate_scale=nan"),
        ({"rate_scale": math.inf}, "rate_scale=inf"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_bad_numbers(settings: dict[str, float], error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload("chat", **settings)


def test_trace_is_replayed_as_it_stands(trace):
    path = trace("id,output_tokens, arrival_s ,input_tokens", "a,5,0.5,10", "", "b,6,2.0,20", "")
    workload = build_workload(path)
    assert workload.name == "trace.csv"
    assert workload.requests == (WorkloadRequest(0.5, 10, 5), WorkloadRequest(2.0, 20, 6))
    assert [request.line for request in workload.requests] == [2, 4]
    assert build_workload(str(path), arrivals="trace") == workload


def test_trace_scaled_and_cut(trace):
    path = trace(HEADER, "1,10,5", "2,20,6", "3,30,7", "broken")
    requests = build_workload(path, num_requests=2, rate_scale=2).requests
    assert requests == (WorkloadRequest(0.5, 10, 5), WorkloadRequest(1.0, 20, 6))


def test_trace_lengths_with_other_arrivals(trace):
    path = trace(HEADER, "1,10,5", "2,20,6")
    requests = build_workload(path, arrivals="saturated").requests
    assert requests == (WorkloadRequest(0.0, 10, 5), WorkloadRequest(0.0, 20, 6))
    assert build_workload(path, arrivals="poisson:1").requests[0].arrival_seconds > 0


def test_trace_with_fewer_requests_than_asked(trace):
    assert len(build_workload(trace(HEADER, "0,1,1"), num_requests=10).requests) == 1


def test_trace_as_a_spreadsheet_writes_it(tmp_path: Path):
    path = tmp_path / "from a spreadsheet.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"arrival_s","input_tokens","output_tokens"\r\n"0","12.0","3"\r\n'
    )
    assert build_workload(str(path)).requests == (WorkloadRequest(0.0, 12, 3),)


def test_a_file_needs_no_csv_suffix(tmp_path: Path):
    path = tmp_path / "requests"
    path.write_text(f"{HEADER}\n0,1,1\n")
    assert len(build_workload(str(path)).requests) == 1


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], r"trace\.csv is empty; its first line must be: arrival_s,input_tokens,output_tokens"),
        (["", "  "], r"trace\.csv is empty"),
        ([HEADER], r"trace\.csv has a header but no requests"),
        (["arrival_s,input_tokens", "0,1"], r"trace\.csv line 1: no column output_tokens"),
        (["0,1,1"], r"trace\.csv line 1: no column arrival_s; the header is '0,1,1'"),
        ([HEADER, "0,1,1", "1,2"], r"trace\.csv line 3: output_tokens is missing"),
        ([HEADER, "0,,1"], r"trace\.csv line 2: input_tokens is missing"),
        ([HEADER, "0,1,1", "", "x,1,1"], r"line 4: arrival_s='x' is not a finite number"),
        ([HEADER, "nan,1,1"], r"line 2: arrival_s='nan' is not a finite number"),
        ([HEADER, "inf,1,1"], r"line 2: arrival_s='inf' is not a finite number"),
        ([HEADER, "-1,1,1"], r"line 2: arrival_s=-1\.0 must be at least 0"),
        ([HEADER, "0,-4,1"], r"line 2: input_tokens=-4 must be at least 1"),
        ([HEADER, "0,1,0"], r"line 2: output_tokens=0 must be at least 1"),
        ([HEADER, "0,1.5,1"], r"line 2: input_tokens='1\.5' is not a whole number"),
        ([HEADER, "0,nan,1"], r"line 2: input_tokens='nan' is not a whole number"),
        ([HEADER, "2,1,1", "1,1,1"], r"line 3: arrival_s=1 is before the line above \(2\)"),
    ],
)
def test_bad_trace(trace, lines: list[str], error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload(trace(*lines))


def test_trace_that_is_not_text(tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read workload file .*trace\.csv"):
        build_workload(path)


def test_trace_with_an_endless_cell(trace):
    with pytest.raises(ConfigError, match=r"trace\.csv line 2: field larger than"):
        build_workload(trace(HEADER, "1" * 200_000))


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_trace_that_is_not_there(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="cannot read workload file"):
        build_workload(tmp_path / name)


def test_missing_csv_is_not_taken_for_a_name():
    with pytest.raises(ConfigError, match=r"cannot read workload file nowhere\.csv"):
        build_workload("nowhere.csv")


def test_check_fits_names_the_line(trace):
    workload = build_workload(trace(HEADER, "0,1,1", "", "1,100,29"))
    workload.check_fits(129)
    with pytest.raises(ConfigError) as caught:
        workload.check_fits(128)
    assert str(caught.value) == (
        "workload 'trace.csv' line 4: 100 prompt + 29 output tokens are more than the 128 that "
        "the model allows (max_model_len)"
    )


def test_check_fits_names_the_request():
    workload = Workload("chat", (WorkloadRequest(0.0, 1, 1), WorkloadRequest(0.0, 9, 2)))
    with pytest.raises(ConfigError, match="workload 'chat' request 1: 9 prompt"):
        workload.check_fits(10)


def test_prompts_have_the_lengths_and_ids_asked():
    workload = build_workload("chat", num_requests=100)
    requests = engine_requests(workload, vocab_size=1024, seed=5)
    assert [r.request_id for r in requests] == [f"request-{i}" for i in range(100)]
    assert [len(r.prompt_token_ids) for r in requests] == [
        r.prompt_tokens for r in workload.requests
    ]
    assert [r.output_tokens for r in requests] == [r.output_tokens for r in workload.requests]
    tokens = {token for r in requests for token in r.prompt_token_ids}
    # An eighth of the vocabulary is left out below, a quarter above.
    assert (min(tokens), max(tokens)) == (128, 767)


@given(st.integers(8, 200_000), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_prompts_are_distinct_and_inside_the_vocabulary(vocab_size: int, seed: int):
    workload = build_workload("fixed:32:1", num_requests=20)
    prompts = [r.prompt_token_ids for r in engine_requests(workload, vocab_size=vocab_size)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 20
    assert all(0 < token < vocab_size for prompt in prompts for token in prompt)


def test_prompts_follow_their_seed():
    workload = build_workload("fixed:32:1", num_requests=2)
    assert engine_requests(workload, vocab_size=512, seed=1) != engine_requests(
        workload, vocab_size=512, seed=2
    )


def test_tiny_vocabulary():
    with pytest.raises(ConfigError, match="vocab_size=7 must be at least 8"):
        engine_requests(build_workload("chat"), vocab_size=7)
