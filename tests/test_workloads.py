from __future__ import annotations

import gzip
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.traces import bundled_traces, read_lengths
from batchpilot.env.workloads import (
    DEFAULT_NUM_REQUESTS,
    Workload,
    WorkloadRequest,
    build_workload,
    engine_requests,
    shared_with,
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
        (
            "poem",
            r"unknown workload 'poem'; known: chat, .*, azure-2023-conv, .*, a \.csv or ",
        ),
        ("", "unknown workload ''"),
        ("fixed", "prompt_tokens is required"),
        ("fixed:128", "output_tokens is required"),
        ("fixed:1:2:3:4", "'4' is one value too many"),
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
        ("bus", "unknown arrivals 'bus'; known: saturated, poisson, gamma, on-off, ramp, trace"),
        ("poisson", "rate is required"),
        ("poisson:0", "rate=0.0 must be greater than 0"),
        ("poisson:-3", "rate=-3.0 must be greater than 0"),
        ("poisson:nan", "rate='nan' is not a finite number"),
        ("poisson:fast", "rate='fast' is not a finite number"),
        ("saturated:1", "'1' is one value too many"),
        ("trace", "needs a workload from a trace"),
    ],
)
def test_bad_arrivals(arrivals: str, error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload("chat", arrivals=arrivals)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_requests": 0}, "num_requests=0 must be at least 1"),
        ({"rate_scale": 0.0}, "rate_scale=0.0 must be greater than 0"),
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


def test_a_damaged_archive(tmp_path: Path):
    path = tmp_path / "trace.csv.gz"
    lines = "\n".join([HEADER, *(f"{second},{second % 97 + 1},5" for second in range(5000))])
    packed = bytearray(gzip.compress(lines.encode()))
    packed[100:120] = bytes(20)
    path.write_bytes(packed)
    with pytest.raises(ConfigError, match=r"cannot read workload file .*trace\.csv\.gz: Error -3"):
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
        "the model (max_model_len) and its KV cache allow"
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


def times_of(arrivals: str, count: int = 20_000, seed: int = 0) -> list[float]:
    workload = build_workload("fixed:1:1", num_requests=count, arrivals=arrivals, seed=seed)
    times = [request.arrival_seconds for request in workload.requests]
    assert times == sorted(times)
    return times


@pytest.mark.parametrize("cv", [0.5, 3.0])
def test_gamma_gaps_have_the_rate_and_the_spread(cv: float):
    gaps = np.diff(times_of(f"gamma:8:{cv}", count=100_000))
    # Five standard errors of the mean; the spread's own depends on its kurtosis.
    assert gaps.mean() == pytest.approx(1 / 8, abs=5 * cv / 8 / math.sqrt(1e5))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_on_off_rates_hold_in_their_times():
    phase = np.mod(times_of("on-off:30:10:2:3"), 5.0)
    on = int((phase < 2.0).sum())
    # 60 of 90 in a cycle; the standard deviation of a binomial is 67.
    assert on == pytest.approx(20_000 * 2 / 3, abs=335)


def test_nothing_comes_while_off():
    times = times_of("on-off:50:0:1:4")
    assert np.mod(times, 5.0).max() <= 1.0
    assert times[-1] > 5.0


def test_a_ramp_goes_from_rate_to_rate_and_stays():
    times = np.array(times_of("ramp:2:20:100", count=3_000))
    first, second = (times < 50).sum(), ((times >= 50) & (times < 100)).sum()
    # 50 s at means of 6.5 and 15.5 a second, then 20: Poisson counts, five standard deviations.
    assert first == pytest.approx(325, abs=90)
    assert second == pytest.approx(775, abs=140)
    assert ((times >= 100) & (times < 150)).sum() == pytest.approx(1000, abs=158)


@pytest.mark.parametrize("ramp", ["ramp:5:5:10", "poisson:5"])
def test_a_flat_ramp_is_poisson(ramp: str):
    assert times_of(ramp, count=5_000)[-1] == pytest.approx(1000, abs=71)


def test_rates_that_shift():
    times = np.array(times_of("poisson:5,poisson:50@100,poisson:1@120", count=1_700))
    assert (times < 100).sum() == pytest.approx(500, abs=112)
    assert ((times >= 100) & (times < 120)).sum() == pytest.approx(1000, abs=158)
    late = times[times >= 120]
    assert len(late) / (late[-1] - 120) == pytest.approx(1.0, rel=0.4)


def test_a_shift_leaves_what_comes_before_it_alone():
    plain, shifted = times_of("poisson:5", 600), times_of("poisson:5,poisson:50@60", 600)
    before = [time for time in shifted if time < 60]
    assert before == [time for time in plain if time < 60]


def test_lengths_that_shift():
    requests = build_workload(
        "fixed:10:20,fixed:30:40@5", num_requests=200, arrivals="poisson:20"
    ).requests
    assert {(r.arrival_seconds >= 5, r.prompt_tokens, r.output_tokens) for r in requests} == {
        (False, 10, 20),
        (True, 30, 40),
    }


def test_rate_scale_runs_everything_faster():
    text, arrivals = "fixed:10:20,chat@5", "poisson:20,on-off:40:4@8"
    plain = build_workload(text, arrivals=arrivals).requests
    faster = build_workload(text, arrivals=arrivals, rate_scale=4).requests
    assert [replace(r, arrival_seconds=r.arrival_seconds / 4) for r in plain] == list(faster)


@pytest.mark.parametrize(
    ("arrivals", "error"),
    [
        ("poisson:1,poisson:2", r"'poisson:2' must end in @SECONDS, more than 0, where"),
        ("poisson:1,poisson:2@0", "must end in @SECONDS, more than 0"),
        ("poisson:1,poisson:2@9,poisson:3@8", "'poisson:3@8' must end in @SECONDS, more than 9"),
        ("poisson:1,poisson:2@nan", "must end in @SECONDS"),
        ("poisson:1,bus@9", "unknown arrivals 'bus'"),
        ("poisson:1@5", "rate='1@5' is not a finite number"),
        ("gamma:1:0", "cv=0.0 must be greater than 0"),
        ("on-off:0", "on_rate=0.0 must be greater than 0"),
        ("ramp:1:0", "end_rate=0.0 must be greater than 0"),
    ],
)
def test_bad_arrival_shapes(arrivals: str, error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload("chat", arrivals=arrivals)


def test_sharegpt_lengths_are_the_recorded_pairs():
    requests = build_workload("sharegpt", num_requests=20_000).requests
    recorded = read_lengths(bundled_traces()["sharegpt-lengths"].path)
    pairs = {(line.row.input_tokens, line.row.output_tokens) for line in recorded}
    assert len(recorded) == 30_731
    assert {(r.prompt_tokens, r.output_tokens) for r in requests} <= pairs
    mean = sum(line.row.output_tokens for line in recorded) / len(recorded)
    assert sum(r.output_tokens for r in requests) / 20_000 == pytest.approx(mean, rel=0.05)


def test_recorded_lengths_are_cut(tmp_path: Path):
    path = tmp_path / "mine.csv"
    path.write_text("output_tokens,input_tokens\n5,900\n")
    requests = build_workload(f"empirical:{path}:prompt_max=100:output_max=3").requests
    assert {(r.prompt_tokens, r.output_tokens) for r in requests} == {(100, 3)}


def test_bad_lengths_file(tmp_path: Path):
    path = tmp_path / "mine.csv"
    path.write_text("output_tokens,input_tokens\n5,0\n")
    with pytest.raises(ConfigError, match=r"mine\.csv line 2: input_tokens=0 must be at least 1"):
        build_workload(f"empirical:{path}")


@pytest.mark.parametrize(
    ("name", "requests", "last_s"),
    [
        ("azure-2023-conv", 19_366, 3501.721937),
        ("llmservingsim-sharegpt", 300, 29.183763203),
        ("servegen-deepseek-r1", 14_281, 3600.0),
        ("servegen-m-large", 14_449, 3600.0),
    ],
)
def test_bundled_traces(name: str, requests: int, last_s: float):
    workload = build_workload(name)
    assert (len(workload.requests), workload.requests[-1].arrival_seconds) == (requests, last_s)
    assert workload.name == name


def test_every_bundled_trace_says_whose_it_is():
    for trace in bundled_traces().values():
        assert trace.path.is_file()
        assert trace.source.startswith("https://")
        assert all((trace.summary, trace.licence, trace.credit, trace.changes))


def test_a_stretch_of_a_trace(trace):
    path = trace(HEADER, "1,10,5", "2,20,6", "3,300,70", "4,40,8")
    workload = build_workload(f"trace:{path}:start_s=2:end_s=4:prompt_max=30:output_max=7")
    assert workload.requests == (WorkloadRequest(0.0, 20, 6), WorkloadRequest(1.0, 30, 7))
    assert [request.line for request in workload.requests] == [3, 4]


def test_times_since_1970_are_refused_with_where_to_begin(trace):
    path = trace(HEADER, "1700000099.25,10,5", "1700000100.25,20,6")
    with pytest.raises(ConfigError, match="seconds since the trace began") as refused:
        build_workload(str(path))
    _, _, remedy = str(refused.value).rpartition(" ")
    assert remedy == f"trace:{path}:start_s=1700000099.25"
    assert [r.arrival_seconds for r in build_workload(remedy).requests] == [0.0, 1.0]


@pytest.mark.parametrize("lines", [("9,10,5",), ("400,10,5", "5000,10,5")])
def test_a_trace_may_begin_a_little_late(trace, lines):
    first = float(lines[0].split(",")[0])
    assert build_workload(str(trace(HEADER, *lines))).requests[0].arrival_seconds == first


def test_a_clock_of_three_seconds_is_spread_by_default():
    jittered = build_workload("mooncake-conversation:end_s=600", seed=1).requests
    plain = build_workload("mooncake-conversation:end_s=600:jitter_s=0").requests
    assert len(jittered) == len(plain)
    assert len({r.arrival_seconds for r in plain}) < 300
    assert len({r.arrival_seconds for r in jittered}) == len(jittered)
    by_line = {r.line: r for r in plain}
    moves = [r.arrival_seconds - by_line[r.line].arrival_seconds for r in jittered]
    assert 0 <= min(moves) < 0.1
    assert 2.9 < max(moves) < 3
    assert jittered != build_workload("mooncake-conversation:end_s=600", seed=2).requests


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("azure-2023-conv:start_s=5000", "no request from start_s=5000 to end_s=inf; its last is"),
        ("azure-2023-conv:start_s=5:end_s=5", "end_s=5 must be more than start_s=5"),
        ("azure-2023-conv:speed=2", "unknown key 'speed'; allowed: path, start_s"),
        ("azure-2023-conv:jitter_s=-1", "jitter_s=-1.0 must be at least 0"),
        ("trace", "path is required"),
        ("trace:sharegpt-lengths", "has no arrival times; use empirical:sharegpt-lengths"),
        ("trace:nowhere", "cannot read workload file nowhere"),
    ],
)
def test_bad_replay(text: str, error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload(text)


def test_a_gzipped_trace(tmp_path: Path):
    path = tmp_path / "mine.csv.gz"
    path.write_bytes(gzip.compress(f"{HEADER}\n0,1,1\n".encode()))
    assert build_workload(path).requests == (WorkloadRequest(0.0, 1, 1),)
    path.write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match=r"cannot read workload file .*mine\.csv\.gz"):
        build_workload(path)


def test_shared_prefixes_are_shared_tokens(trace):
    lines = ["0,40,1,0", "1,24,1,16", "2,64,1,32", "3,8,1,", "4,64,1,64", "5,70,1,70"]
    workload = build_workload(trace(f"{HEADER},shared_prefix_tokens", *lines))
    # The newest that is long enough; the last shares more than any before it has.
    assert shared_with(workload.requests) == [None, 0, 0, None, 2, None]
    prompts = [r.prompt_token_ids for r in engine_requests(workload, vocab_size=5000)]
    assert [len(prompt) for prompt in prompts] == [40, 24, 64, 8, 64, 70]
    assert prompts[1][:16] == prompts[0][:16]
    assert prompts[1][16:] != prompts[0][16:24]
    assert prompts[2][:32] == prompts[0][:32]
    assert prompts[4] == prompts[2]


@pytest.mark.parametrize(
    "lengths", ["fixed:30:5", "chat", "lognormal:30:5", "sharegpt:prompt_max=200"]
)
def test_a_system_prompt_comes_before_every_prompt(lengths):
    plain = build_workload(lengths, num_requests=20)
    workload = build_workload(f"{lengths}:system_prompt=64", num_requests=20)
    assert [r.prompt_tokens for r in workload.requests] == [
        64 + r.prompt_tokens for r in plain.requests
    ]
    prompts = [r.prompt_token_ids for r in engine_requests(workload, vocab_size=5000)]
    assert len({prompt[:64] for prompt in prompts}) == 1
    assert len({prompt[64:] for prompt in prompts}) == 20


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_newest_long_enough_prompt_is_found(rows: list[tuple[int, float]]):
    requests = [WorkloadRequest(0.0, p, 1, None, int(p * share)) for p, share in rows]
    for index, found in enumerate(shared_with(requests)):
        shared = requests[index].shared_prefix_tokens
        fitting = [i for i in range(index) if requests[i].prompt_tokens >= shared]
        assert found == (fitting[-1] if shared and fitting else None)


def test_more_shared_than_there_is(trace):
    path = trace(f"{HEADER},shared_prefix_tokens", "0,4,1,5")
    with pytest.raises(ConfigError, match=r"line 2: shared_prefix_tokens=5 is more than input_to"):
        build_workload(path)


@pytest.fixture
def workload_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "workload.yaml"
        path.write_text(text)
        return path

    return write


def test_a_workload_file_is_the_text_in_other_words(workload_file):
    path = workload_file(
        """
        workload:
          - chat: {output_max: 400}
          - lognormal: {prompt_mean: 1000, output_mean: 50}
            at_s: 6
        arrivals:
          - poisson: 4
          - gamma: {rate: 16, cv: 2}
            at_s: 3.5
        num_requests: 90
        rate_scale: 1.5
        seed: 3
        """
    )
    text = build_workload(
        "chat:output_max=400,lognormal:1000:50@6",
        arrivals="poisson:4,gamma:16:2@3.5",
        num_requests=90,
        rate_scale=1.5,
        seed=3,
    )
    assert build_workload(path).requests == text.requests
    assert build_workload(str(path), num_requests=5).requests != text.requests
    assert len(build_workload(str(path), num_requests=5).requests) == 5
    again = build_workload(path, rate_scale=2, seed=1)
    assert (
        again.requests
        == build_workload(
            "chat:output_max=400,lognormal:1000:50@6",
            arrivals="poisson:4,gamma:16:2@3.5",
            num_requests=90,
            rate_scale=3,
            seed=4,
        ).requests
    )


def test_a_workload_file_finds_the_trace_beside_it(trace, workload_file):
    trace(HEADER, "0,7,8")
    requests = build_workload(workload_file("workload: trace.csv")).requests
    assert requests == (WorkloadRequest(0.0, 7, 8),)


@pytest.mark.parametrize(
    "workload",
    [
        "{trace: {path: trace.csv}}",
        "{trace: {start_s: 0, path: trace.csv}}",
        "{trace: trace.csv}",
        "trace:trace.csv",
        "empirical:trace.csv",
        "[fixed:7:8, {empirical: {path: trace.csv}, at_s: 5}]",
        "fixed:7:8,empirical:path=trace.csv@5",
    ],
)
def test_whatever_names_a_file_finds_it_beside_the_workload_file(trace, workload_file, workload):
    trace(HEADER, "0,7,8")
    (request, *_) = build_workload(workload_file(f"workload: {workload}")).requests
    assert (request.prompt_tokens, request.output_tokens) == (7, 8)


def test_a_trace_that_comes_with_batchpilot_lies_beside_nothing(workload_file):
    path = workload_file("workload: {trace: {path: azure-2023-conv}}")
    assert build_workload(path, num_requests=3) == build_workload(
        "trace:path=azure-2023-conv", num_requests=3
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("- chat", r"workload\.yaml is not a list of `key: value` lines"),
        ("workload: [", r"cannot read workload file .*workload\.yaml"),
        ("wrkload: chat", r"workload\.yaml: unknown key 'wrkload'; allowed: workload, arrivals"),
        ("seed: -1", r"workload\.yaml: seed=-1 must be at least 0"),
        ("num_requests: many", r"num_requests='many' is not a whole number"),
        ("workload:", r"workload\.yaml: workload=None is not"),
        ("workload: 5", r"workload\.yaml: workload=5 is neither a text nor a list"),
        ("workload: [{chat: , fixed: }]", r"workload\[0\]=.* must name one kind"),
        ("workload: [{chat: [1]}]", r"workload\[0\]\.chat=\[1\] is not `key: value` pairs"),
        ("workload: [{chat: {}, at_s: 5}]", r"workload\[0\]: the first phase begins at the start"),
        (
            "workload: {chat: {prompt_max: [1, 2]}}",
            r"workload\.yaml: workload\[0\]\.chat\.prompt_max=\[1, 2\] is neither a number nor",
        ),
        ("arrivals: [{poisson: {rate: {a: 1}}}]", r"arrivals\[0\]\.poisson\.rate={'a': 1} is nei"),
        ("workload: [chat, {chat: , at_s: [1, 2]}]", r"workload\[1\]\.at_s=\[1, 2\] is neither"),
        ("workload: [chat, {chat: , at_s: }]", r"workload\[1\]\.at_s=None is neither"),
        ("workload: [chat, {chat: {}}]", "must end in @SECONDS"),
        ("workload: [{chat: {outputs: 3}}]", "unknown key 'outputs'; allowed: prompt_mean"),
    ],
)
def test_bad_workload_file(workload_file, text: str, error: str):
    with pytest.raises(ConfigError, match=error):
        build_workload(workload_file(text))


def test_a_workload_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"cannot read workload file nowhere\.yaml"):
        build_workload("nowhere.yaml")
