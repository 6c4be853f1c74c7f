from __future__ import annotations

import pytest
from bench_engine import STEP_SECONDS, QueueEngine

from batchpilot.env.bench import runner
from batchpilot.env.bench.contestants import parse_contestants
from batchpilot.env.bench.measure import Slo
from batchpilot.env.bench.runner import (
    EngineStalledError,
    Round,
    TimedRequest,
    replay,
    rotated,
    run_bench,
)
from batchpilot.env.engine import EngineRequest


class Quiet:
    """Notes who ran, shows nothing."""

    def __init__(self):
        self.started = []
        self.reports = []
        self.finished = []

    def run_started(self, policy, round_index, requests):
        self.started.append((policy, round_index, requests))

    def advanced(self, ended, tokens_per_s, sample):
        self.reports.append((ended, tokens_per_s, sample.seconds))

    def run_finished(self, run):
        self.finished.append(run.policy)


def request(name, prompt_tokens=1, output_tokens=5):
    return EngineRequest(name, [7] * prompt_tokens, output_tokens)


def at(*seconds, output_tokens=5):
    return [
        TimedRequest(second, request(f"r{index}", output_tokens=output_tokens))
        for index, second in enumerate(seconds)
    ]


def test_all_at_once_by_hand():
    result = replay(QueueEngine(max_num_seqs=2), at(0, 0, 0), Slo(), Quiet())
    # Two run for five steps, then the third for five more: ten steps of 10 ms.
    assert (result.submitted, result.completed, result.output_tokens) == (3, 3, 15)
    assert result.duration_s == pytest.approx(10 * STEP_SECONDS)
    assert sorted(result.ttft_ms.round(6)) == [10.0, 10.0, 60.0]
    assert result.itl_ms.round(6).tolist() == [10.0] * 12
    assert result.mean_running == pytest.approx(1.5)


def test_requests_wait_for_their_time():
    result = replay(QueueEngine(), at(2.0, 1.0), Slo(), Quiet())
    assert result.duration_s == pytest.approx(2.0 + 5 * STEP_SECONDS)
    assert result.ttft_ms.round(6).tolist() == [10.0, 10.0]


def test_times_that_do_not_add_up_exactly_end():
    engine = QueueEngine()
    engine.clock_seconds = 0.1
    times = [0.2 + 0.1 * index for index in range(50)]
    assert replay(engine, at(*times), Slo(), Quiet()).completed == 50


def test_latency_counts_from_the_intended_arrival():
    # It comes in the middle of a step and is seen after it.
    result = replay(QueueEngine(), at(0.0, 0.015, output_tokens=3), Slo(), Quiet())
    assert result.ttft_ms.round(6).tolist() == [10.0, 15.0]


def test_preemptions_are_counted():
    engine = QueueEngine(total_blocks=20)
    requests = [TimedRequest(0, request(f"r{i}", prompt_tokens=3, output_tokens=8)) for i in (0, 1)]
    result = replay(engine, requests, Slo(), Quiet())
    assert (result.completed, result.output_tokens) == (2, 16)
    assert result.preemptions == 1
    # Both held ten tokens when the cache was full; the newer one lost its own.
    assert result.recomputed_tokens == 10


def test_a_refused_request_fails_and_the_rest_is_served(caplog):
    engine = QueueEngine()
    engine.refuse = {"r1"}
    result = replay(engine, at(0, 0, 0), Slo(itl_slo_ms=50.0), Quiet())
    assert (result.submitted, result.completed, result.failed) == (3, 2, 1)
    assert result.slo_attainment == pytest.approx(2 / 3)
    assert "refused request r1: too long" in caplog.text


def test_a_stalled_engine_is_an_error_and_is_cleaned_up():
    engine = QueueEngine()
    engine.stalled = True
    with pytest.raises(
        EngineStalledError, match=r"no progress in 60 s .* 0 requests running and 2"
    ):
        replay(engine, at(0, 0), Slo(), Quiet())
    assert engine.aborted == ["r0", "r1"]
    assert not engine.has_unfinished_requests()


def test_a_stalled_clock_is_an_error_too(monkeypatch):
    monkeypatch.setattr(runner, "STALL_SECONDS", 1e9)
    monkeypatch.setattr(runner, "STALL_STEPS", 50)
    engine = QueueEngine()
    engine.stalled = True
    with pytest.raises(EngineStalledError, match="51 steps"):
        replay(engine, at(0), Slo(), Quiet())


def test_an_interrupt_aborts_what_is_open():
    engine = QueueEngine()
    engine.interrupt_at_step = 3
    with pytest.raises(KeyboardInterrupt):
        replay(engine, at(0, 0, 99), Slo(), Quiet())
    assert engine.aborted == ["r0", "r1"]


def rounds(count, requests=3):
    return [Round(n + 1, 40 + n, tuple(at(*[0] * requests))) for n in range(count)]


def test_rounds_interleave_and_rotate():
    engine, progress = QueueEngine(), Quiet()
    contestants = parse_contestants("static,watermark:0.1,static:max_num_seqs=1", {})
    runs = run_bench(engine, contestants, rounds(2), Slo(), progress)
    a, b, c = "static", "watermark:0.1", "static:max_num_seqs=1"
    assert [(r.policy, r.round, r.seed) for r in runs] == [
        (a, 1, 40),
        (b, 1, 40),
        (c, 1, 40),
        (b, 2, 41),
        (c, 2, 41),
        (a, 2, 41),
    ]
    assert progress.started[0] == ("warm-up", 0, 3)
    assert progress.finished == [a, b, c, b, c, a]
    assert engine.resets == 6


def test_every_run_is_steered_by_its_own_policy():
    engine = QueueEngine()
    contestants = parse_contestants("static:max_num_seqs=1,watermark:0.1", {})
    runs = run_bench(engine, contestants, rounds(2), Slo(), Quiet())
    peaks = {(run.policy, run.round): run.measurement.peak_running for run in runs}
    assert peaks == {
        ("static:max_num_seqs=1", 1): 1,
        ("watermark:0.1", 1): 3,
        ("watermark:0.1", 2): 3,
        ("static:max_num_seqs=1", 2): 1,
    }
    policies = [policy for policy, _ in engine.policies if policy is not None]
    assert len(policies) == len(set(map(id, policies))) == 2
    assert engine.policies[-1] == (None, 0.0)


def test_the_warm_up_is_short_and_discarded():
    engine = QueueEngine(total_blocks=10_000)
    one = Round(1, 0, tuple(at(*[5.0] * 80, output_tokens=50)))
    runs = run_bench(engine, parse_contestants("static", {}), [one], Slo(), Quiet())
    assert len(runs) == 1
    assert runs[0].measurement.submitted == 80
    # 80 requests of 50 steps in 10 groups of 8, and the warm-up's 64 of 16 steps in 8 groups.
    assert engine.steps == 10 * 50 + 8 * 16


def test_the_same_requests_give_the_same_numbers():
    def once():
        contestants = parse_contestants("static", {})
        runs = run_bench(QueueEngine(), contestants, rounds(1), Slo(), Quiet())
        return runs[0].measurement

    first, second = once(), once()
    assert first.output_tokens_per_s == second.output_tokens_per_s
    assert first.itl_ms.tolist() == second.itl_ms.tolist()


def test_progress_is_shown_four_times_a_second():
    progress = Quiet()
    replay(QueueEngine(), at(0, output_tokens=101), Slo(), progress)
    assert len(progress.reports) == 4
    assert progress.reports[0] == (0, pytest.approx(100.0), pytest.approx(0.25, abs=0.011))


@pytest.mark.parametrize(("by", "order"), [(0, "abc"), (1, "bca"), (2, "cab"), (3, "abc")])
def test_rotation(by, order):
    assert "".join(rotated("abc", by)) == order
