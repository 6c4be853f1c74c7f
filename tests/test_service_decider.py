"""What a policy is shown of a report, and what is refused before it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import hello, report

from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    Decision,
    FinishedRequest,
    SequenceState,
    Source,
    StepRecord,
)
from batchpilot.agents.shield import Clamp, SafetyBounds
from batchpilot.agents.telemetry import WindowBuilder
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.decider import MOST_SHOWN, Decider, mean_steps
from batchpilot.service.validation import ReportError, check_hello, check_report
from batchpilot.service.wire import engine_facts, sequences, step_record, telemetry_window

FACTS = engine_facts(hello().facts)
SEQUENCE_COLUMNS = ("kv_tokens", "output_tokens", "prefill_tokens_left")


class Recording:
    """A policy that keeps what it is shown and wants what it is told to."""

    def __init__(self, limits=BatchLimits(64, 8192), wanted=None):  # noqa: B008  (immutable)
        self.limits = limits
        self.wanted = wanted
        self.steps = []
        self.snapshots = []

    def observe(self, step):
        self.steps.append(step)

    def decide(self, snapshot):
        self.snapshots.append(snapshot)
        return Decision(self.limits, Source.STATIC, "told to", wanted_seqs=self.wanted)


def test_a_window_is_shown_as_its_mean_steps_with_events_in_the_last():
    policy = Recording()
    message = report(
        1,
        window={
            "seqs_bound_steps": 3,
            "kv_bound_steps": 2,
            "arrived": 4,
            "arrived_prompt_tokens": 1000,
            "finished": 2,
            "finished_output_tokens": 300,
            "preemptions": 1,
            "recomputed_tokens": 90,
        },
    )
    Decider(policy, FACTS, SafetyBounds()).decide(message)
    mean = StepRecord(0.025, running=50, decode_seqs=50, prefill_tokens=100, kv_tokens=8000)
    kv, seqs = mean._replace(binding=Binding.KV_CACHE), mean._replace(binding=Binding.MAX_NUM_SEQS)
    last = mean._replace(
        preemptions=1,
        recomputed_tokens=90,
        finished=(FinishedRequest(250, 150, True),) * 2,
        arrived=(250,) * 4,
    )
    assert policy.steps == [kv] * 2 + [seqs] * 3 + [mean] * 4 + [last]
    before, snapshot = policy.snapshots  # in an engine, too, it decides before the first step
    assert before == snapshot
    assert (snapshot.running, snapshot.waiting, snapshot.used_blocks) == (50, 5, 500)
    assert snapshot.binding is Binding.MAX_NUM_SEQS
    assert snapshot.clock_seconds == 0.25


def test_a_speculating_engine_tells_how_many_tokens_its_sequences_take():
    facts = hello(facts={"tokens_per_decode": 6}).facts
    policy = Recording()
    decider = Decider(policy, engine_facts(facts), SafetyBounds())
    for sequence, told in ((1, {}), (2, {"tokens_per_decode": 1.5})):
        message = report(sequence, **told)
        check_report(message, facts)
        decider.decide(message)
    _, silent, told = policy.snapshots
    assert (silent.tokens_per_decode, silent.decode_tokens(10)) == (None, 60)
    assert (told.tokens_per_decode, told.decode_tokens(10)) == (1.5, 15)


def test_an_idle_window_shows_no_step_but_passes_time():
    policy = Recording()
    decider = Decider(policy, FACTS, SafetyBounds())
    idle = {"steps": 0, "busy_seconds": 0.0, "decode_tokens": 0, "prefill_tokens": 0, "running": 0}
    for sequence in (1, 2):
        decider.decide(report(sequence, window=idle))
    assert policy.steps == []
    assert [snapshot.clock_seconds for snapshot in policy.snapshots] == [0.25, 0.25, 0.5]


def test_steps_are_shown_as_they_were_and_a_decision_is_asked_after_each():
    policy = Recording()
    steps = [
        pb.StepRecord(
            seconds=0.125,
            running=40,
            decode_seqs=39,
            prefill_tokens=64,
            kv_tokens=3200,
            prefill_squares=4096,
            cached_tokens=128,
        ),
        pb.StepRecord(
            seconds=0.0625,
            running=50,
            decode_seqs=50,
            kv_tokens=4000,
            finished=[pb.FinishedRequest(prompt_tokens=10, output_tokens=20, completed=True)],
            arrived_prompt_tokens=[7],
            binding=pb.BINDING_KV_CACHE,
            regular=True,
        ),
    ]
    running = pb.SequenceColumns(kv_tokens=[9], output_tokens=[4], prefill_tokens_left=[0])
    message = report(1, window={"steps": 2}, steps=steps, running=running)
    Decider(policy, FACTS, SafetyBounds()).decide(message)
    assert policy.steps == [step_record(message) for message in steps]
    assert (policy.steps[0].prefill_squares, policy.steps[0].cached_tokens) == (4096, 128)
    assert policy.steps[1].finished == (FinishedRequest(10, 20, True),)
    _, first, last = policy.snapshots
    assert (first.clock_seconds, last.clock_seconds) == (0.1875, 0.25)
    assert (first.running, first.prefill_seqs, first.used_blocks) == (40, 1, 200)
    assert (last.running, last.used_blocks) == (50, 500)
    assert last.read_running() == (SequenceState(9, 4, 0),)
    assert last.read_waiting(5) == ()


def test_what_a_policy_wants_is_shielded_by_the_narrower_bounds():
    decider = Decider(Recording(BatchLimits(400, 10)), FACTS, SafetyBounds(max_num_seqs=100))
    decided = decider.decide(report(1))
    assert decided.decision.limits == BatchLimits(400, 10)
    assert decided.limits == BatchLimits(100, 64)
    assert decided.clamp is Clamp.UPPER_BOUND


def test_steps_that_only_the_sums_tell_of_come_first_and_teach_no_step_time():
    """As after an outage, when a hook has more steps to tell than it may."""
    policy = Recording()
    told = pb.StepRecord(
        seconds=0.07,
        running=50,
        decode_seqs=50,
        prefill_tokens=100,
        kv_tokens=8000,
        finished=[pb.FinishedRequest(prompt_tokens=10, output_tokens=20, completed=True)],
        arrived_prompt_tokens=[300, 400],
        binding=pb.BINDING_MAX_NUM_SEQS,
        regular=True,
    )
    window = {
        "seqs_bound_steps": 3,
        "arrived": 4,
        "arrived_prompt_tokens": 1000,
        "finished": 2,
        "finished_output_tokens": 300,
    }
    Decider(policy, FACTS, SafetyBounds()).decide(report(1, window=window, steps=[told]))
    *rest, last = policy.steps
    assert last == step_record(told)
    assert len(rest) == 9
    assert not any(step.regular for step in rest)
    assert sum(step.seconds for step in rest) == pytest.approx(0.25 - 0.07)
    assert sum(step.binding is Binding.MAX_NUM_SEQS for step in rest) == 2
    assert [request.output_tokens for step in rest for request in step.finished] == [280]
    assert [tokens for step in rest for tokens in step.arrived] == [150, 150]


@pytest.mark.parametrize(
    ("limit", "wanted", "leased"),
    [
        (8, None, 8),  # the limit means itself
        (50, 20, 20),  # what runs holds it up for the next step only
        (50, 0, 48),  # the door is shut, for nobody knows how many
        (40, 60, 40),
    ],
)
def test_what_runs_holds_no_lease_up(limit, wanted, leased):
    """Of 50 that run some end while the lease does: each would be made up for."""
    policy = Recording(BatchLimits(limit, 8192), wanted)
    decided = Decider(policy, FACTS, SafetyBounds()).decide(report(1))
    assert decided.limits == BatchLimits(leased, 8192)
    assert decided.clamp is Clamp.NONE


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            StepRecord,
            seconds=st.floats(0.001, 1.0),
            running=st.just(20),
            decode_seqs=st.integers(0, 20),
            prefill_tokens=st.integers(0, 500),
            kv_tokens=st.just(3000),
            preemptions=st.integers(0, 2),
            binding=st.sampled_from(Binding),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_mean_steps_keep_the_sums_of_their_window(steps):
    builder = WindowBuilder()
    for step in steps:
        builder.add(step)
    window = pb.TelemetryWindow(
        steps=len(steps),
        **{
            name: getattr(builder._sums, name)
            for name in ("busy_seconds", "decode_tokens", "prefill_tokens", "running_seconds")
        },
        kv_token_seconds=builder._sums.kv_token_seconds,
        preemptions=builder._sums.preemptions,
        kv_bound_steps=builder._sums.kv_bound_steps,
        seqs_bound_steps=builder._sums.seqs_bound_steps,
        tokens_bound_steps=builder._sums.tokens_bound_steps,
    )
    shown = [step for step, count in mean_steps(window) for _ in range(count)]
    count = len(steps)
    assert len(shown) == count
    assert math.isclose(sum(s.seconds for s in shown), window.busy_seconds)
    assert abs(sum(s.decode_seqs for s in shown) - window.decode_tokens) <= count / 2
    assert abs(sum(s.prefill_tokens for s in shown) - window.prefill_tokens) <= count / 2
    assert sum(s.preemptions for s in shown) == window.preemptions
    for binding in Binding:
        assert sum(s.binding is binding for s in shown) == sum(s.binding is binding for s in steps)


def test_what_one_report_shows_is_bounded():
    message = report(
        1, window={"seconds": 3600, "busy_seconds": 3600.0, "steps": 20000, "finished": 100000}
    )
    shown = mean_steps(message.window)
    assert sum(count for _, count in shown) == MOST_SHOWN
    assert len(shown[-1][0].finished) == MOST_SHOWN


def test_windows_come_through_the_wire_unchanged():
    message = report(1).window
    window = telemetry_window(message)
    assert window.limits == BatchLimits(64, 8192)
    assert window.decode_seconds == 12.5
    assert {f.name for f in message.DESCRIPTOR.fields} == set(type(window).__dataclass_fields__)


def test_sequences_are_read_from_their_columns():
    columns = pb.SequenceColumns(
        kv_tokens=[10, 0], output_tokens=[3, 0], prefill_tokens_left=[0, 50]
    )
    assert sequences(columns) == (SequenceState(10, 3, 0), SequenceState(0, 0, 50))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "window",
    [
        {"seconds": NAN},
        {"seconds": INF},
        {"seconds": -0.1},
        {"busy_seconds": NAN},
        {"busy_seconds": 1e9},
        {"steps": 4_000_000_000},
        {"slowest_step_seconds": NAN},
        {"decode_seconds": -1.0},
        {"running_seconds": INF},
        {"kv_token_seconds": NAN},
        {"running": 257},
        {"running": 4, "prefill_seqs": 5},
        {"used_blocks": 1001},
        {"decode_tokens": 10 * 8192 + 1},
        {"prefill_tokens": 2**63},
        {"slow_decode_tokens": 501},
        {"kv_bound_steps": 6, "seqs_bound_steps": 5},
        {"finished": 100_001},
        {"arrived": 4_000_000_000},
    ],
)
def test_a_window_that_cannot_be_real_is_refused(window):
    check_report(report(1), hello().facts)
    with pytest.raises(ReportError):
        check_report(report(1, window=window), hello().facts)


@pytest.mark.parametrize(
    "fields",
    [
        {"binding": 17},
        {"window": {"busy_seconds": 3600.0}},  # in a quarter of a second
        {"waiting": pb.SequenceColumns(**dict.fromkeys(SEQUENCE_COLUMNS, [0] * 5000))},
        {"tokens_per_decode": 0.5},
        {"tokens_per_decode": 1.5},  # of an engine that does not speculate
        {"tokens_per_decode": NAN},
        {"source": "x" * 257},
        {"clamps": {f"reason-{number}": 1 for number in range(33)}},
        {"steps": [pb.StepRecord(seconds=NAN)]},
        {"steps": [pb.StepRecord(seconds=0.1, running=4, decode_seqs=5)]},
        {"steps": [pb.StepRecord(seconds=0.1, running=257)]},
        {"steps": [pb.StepRecord(seconds=0.1, binding=99)]},
        {"running": pb.SequenceColumns(kv_tokens=[1, 2], output_tokens=[1])},
        {
            "running": pb.SequenceColumns(
                kv_tokens=[1] * 257, output_tokens=[1] * 257, prefill_tokens_left=[0] * 257
            )
        },
    ],
)
def test_a_report_that_cannot_be_real_is_refused(fields):
    with pytest.raises(ReportError):
        check_report(report(1, **fields), hello().facts)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"engine": ""}, "engine=''"),
        ({"engine": "a b"}, "engine='a b'"),
        ({"engine": 'x"} 1\nevil'}, "engine="),
        ({"group": "g" * 129}, "group="),
        ({"facts": {"startup_limits": pb.BatchLimits()}}, "max_num_seqs=0"),
        ({"facts": {"total_blocks": 0}}, "total_blocks=0"),
        ({"facts": {"block_size": 0}}, "block_size=0"),
        ({"facts": {"tokens_per_decode": 0}}, "tokens_per_decode=0"),
        ({"itl_slo_ms": NAN}, "itl_slo_ms=nan"),
        ({"ttft_slo_ms": -1.0}, "ttft_slo_ms=-1.0"),
        ({"vllm_version": "v" * 257}, "vllm_version must be at most"),
        ({"model_name": "m" * 5000}, "a hello of 50"),
    ],
)
def test_an_engine_that_could_not_exist_is_refused(fields, complaint):
    with pytest.raises(ReportError, match=complaint):
        check_hello(hello(**fields))


U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_passes_the_checks_can_be_decided_on(data):
    """Fields drawn at random: refused with a named error, or answered inside the bounds."""
    window = {}
    for field in pb.TelemetryWindow.DESCRIPTOR.fields:
        if field.message_type is None and data.draw(st.booleans()):
            kinds = {field.TYPE_UINT32: U32 | st.integers(0, 300), field.TYPE_UINT64: U64}
            window[field.name] = data.draw(kinds.get(field.type, st.floats() | st.floats(0, 10)))
    message = report(1, window=window, binding=data.draw(st.integers(0, 6)))
    try:
        check_report(message, hello().facts)
    except ReportError:
        return
    decided = Decider(Recording(BatchLimits(10**9, 0)), FACTS, SafetyBounds()).decide(message)
    assert max(1, message.window.running) <= decided.limits.max_num_seqs <= 256
    assert 64 <= decided.limits.max_num_batched_tokens <= 8192
