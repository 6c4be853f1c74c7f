"""Leases: which answers are believed, for how long, and what decides without one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpilot.agents.limits import (
    BatchLimits,
    Decision,
    EngineFacts,
    EngineSnapshot,
    Source,
    StepRecord,
)
from batchpilot.agents.remote import LeaseHolder, LeaseOffer, Refusal, printable
from batchpilot.scheduler_hook.remote import MOST_STEPS, RemotePolicy

STARTUP = BatchLimits(64, 2048)
FACTS = EngineFacts(STARTUP, total_blocks=100, block_size=16)
STEP = StepRecord(0.02, 3, 3, 0)


def offer(sequence=1, seqs=8, tokens=512, seconds=2.0):
    return LeaseOffer(sequence, BatchLimits(seqs, tokens), seconds, "memory: because")


def session(longest=2.0):
    return LeaseHolder(STARTUP, longest).open_session()


def test_a_lease_runs_from_the_moment_its_report_was_sent():
    holder = LeaseHolder(STARTUP, 2.0)
    stream = holder.open_session()
    stream.sending(now=10.0)
    assert stream.accept(offer(seconds=1.5), now=11.0) is None
    assert holder.current.expires_at == 11.5
    assert holder.current.decision == Decision(
        BatchLimits(8, 512), Source.REMOTE, "memory: because"
    )


def test_no_lease_runs_longer_than_the_engine_allows():
    holder = LeaseHolder(STARTUP, 2.0)
    stream = holder.open_session()
    stream.sending(now=10.0)
    stream.accept(offer(seconds=4e6), now=10.0)
    assert holder.current.expires_at == 12.0


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (offer(seqs=0), Refusal.OUT_OF_RANGE),
        (offer(seqs=65), Refusal.OUT_OF_RANGE),
        (offer(seqs=2**32 - 1), Refusal.OUT_OF_RANGE),
        (offer(tokens=0), Refusal.OUT_OF_RANGE),
        (offer(tokens=2049), Refusal.OUT_OF_RANGE),
        (offer(seconds=0.0), Refusal.NO_LEASE),
        (LeaseOffer(1, None, 2.0), Refusal.NO_LIMITS),
        (offer(sequence=0), Refusal.UNKNOWN_REPORT),
        (offer(sequence=3), Refusal.UNKNOWN_REPORT),
        (offer(sequence=2**63), Refusal.UNKNOWN_REPORT),
        (offer(seconds=0.5), Refusal.LATE),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_the_lease_as_it_is(answer, refusal):
    stream = session()
    stream.sending(now=0.0)
    stream.sending(now=0.1)
    assert stream.accept(answer, now=1.0) is refusal
    assert stream._holder.current is None


def test_an_answer_counts_once_and_never_after_a_newer_one():
    stream = session()
    for now in (0.0, 0.1, 0.2):
        stream.sending(now)
    assert stream.accept(offer(sequence=2), now=0.3) is None
    lease = stream._holder.current
    assert stream.accept(offer(sequence=2, seqs=9), now=0.3) is Refusal.STALE
    assert stream.accept(offer(sequence=1, seqs=9), now=0.3) is Refusal.STALE
    assert stream._holder.current is lease
    assert stream.accept(offer(sequence=3, seqs=9), now=0.3) is None


def test_the_oldest_report_without_an_answer_tells_how_long_the_service_is_silent():
    stream = session()
    assert stream.unanswered_since() is None
    stream.sending(1.0)
    stream.sending(2.0)
    assert stream.unanswered_since() == 1.0
    stream.accept(offer(sequence=1), now=2.0)
    assert stream.unanswered_since() == 2.0
    stream.accept(offer(sequence=2), now=2.0)
    assert stream.unanswered_since() is None


def test_while_a_lease_runs_for_half_its_time_no_answer_is_owed():
    stream = session()
    stream.sending(0.0)
    stream.accept(offer(sequence=1), now=0.1)  # runs until 2.0
    for now in (0.25, 0.5, 1.0):
        stream.sending(now)
        assert stream.unanswered_since() is None
    stream.sending(1.1)
    assert stream.unanswered_since() == 1.1
    stream.accept(offer(sequence=3), now=1.2)  # of 0.5: runs until 2.5
    assert stream.unanswered_since() == 1.1
    stream.accept(offer(sequence=5), now=1.2)
    assert stream.unanswered_since() is None


def test_another_streams_lease_owes_this_one_its_first_answer():
    holder = LeaseHolder(STARTUP, 2.0)
    first = holder.open_session()
    first.sending(0.0)
    first.accept(offer(), now=0.0)
    second = holder.open_session()
    second.sending(0.1)
    assert second.unanswered_since() == 0.1


def test_a_lease_that_the_engine_cut_short_never_runs_for_half_its_time():
    stream = LeaseHolder(STARTUP, 0.5).open_session()
    stream.sending(0.0)
    stream.accept(offer(sequence=1), now=0.0)  # says 2 s
    stream.sending(0.1)
    assert stream.unanswered_since() == 0.1


def test_a_session_that_is_never_answered_holds_no_more_than_it_must():
    stream = session()
    for number in range(5000):
        stream.sending(float(number))
    assert len(stream._sent_at) == 1024
    assert stream.accept(offer(sequence=1), now=5000.0) is Refusal.STALE


def test_a_new_stream_counts_anew_and_the_old_ones_lease_runs_out():
    holder = LeaseHolder(STARTUP, 2.0)
    first = holder.open_session()
    first.sending(0.0)
    first.accept(offer(), now=0.0)
    second = holder.open_session()
    assert second.accept(offer(), now=0.5) is Refusal.UNKNOWN_REPORT
    assert holder.current.expires_at == 2.0


@given(
    st.lists(
        st.tuples(
            st.integers(-5, 2**64),
            st.integers(-(2**32), 2**32),
            st.integers(-(2**32), 2**32),
            st.floats(allow_nan=True),
            st.floats(0, 10),
        ),
        max_size=30,
    )
)
def test_whatever_is_said_no_limit_leaves_its_bounds_and_no_lease_its_length(answers):
    holder = LeaseHolder(STARTUP, 2.0)
    stream, now = holder.open_session(), 0.0
    for sequence, seqs, tokens, seconds, passed in answers:
        sent = stream.sending(now)
        now += passed
        stream.accept(LeaseOffer(sequence, BatchLimits(seqs, tokens), seconds), now)
        stream.accept(LeaseOffer(sent, BatchLimits(seqs, tokens), seconds), now)
        if holder.current is not None:
            limits = holder.current.decision.limits
            assert 1 <= limits.max_num_seqs <= 64
            assert 1 <= limits.max_num_batched_tokens <= 2048
            assert holder.current.expires_at <= now + 2.0


def test_a_strangers_words_stay_on_their_line():
    assert printable("memory: b = 8") == "memory: b = 8"
    assert printable("a\nERROR b\x1b[31m") == "a?ERROR b?[31m"
    assert len(printable("x" * 10_000)) == 160


class Local:
    """Always three sequences; counts what it is shown and asked."""

    def __init__(self):
        self.steps, self.asked = [], 0
        self.decision = Decision(BatchLimits(3, 2048), Source.MEMORY, "three")

    def observe(self, step):
        self.steps.append(step)

    def decide(self, snapshot):
        self.asked += 1
        return self.decision


class Post:
    interval_seconds = 1.0
    wants_detail = False

    def __init__(self):
        self.starts, self.reports = 0, []

    def start(self):
        self.starts += 1

    def offer(self, report):
        self.reports.append(report)


class Hook:
    applied_limits = BatchLimits(5, 100)

    class stats:
        clamps = {}


class Engine:
    """A remote policy on a clock that the test moves."""

    def __init__(self):
        self.now = 100.0
        self.local, self.post, self.hook = Local(), Post(), Hook()
        self.hook.stats.clamps = {}
        self.leases = LeaseHolder(STARTUP, 2.0)
        self.policy = RemotePolicy(self.local, self.leases, self.post, lambda: self.now)
        self.policy.attach(self.hook)

    def step(self, seconds=0.0, waiting=0):
        self.now += seconds
        decision = self.policy.decide(EngineSnapshot(FACTS, self.now - 100.0, 3, waiting))
        self.policy.observe(STEP)
        return decision

    def grant(self, seqs=8, seconds=2.0):
        stream = self.leases.open_session()
        stream.sending(self.now)
        assert stream.accept(offer(seqs=seqs, seconds=seconds), self.now) is None


def test_without_a_lease_the_local_policy_decides_and_is_named_a_fallback():
    engine = Engine()
    decision = engine.step()
    assert decision == Decision(BatchLimits(3, 2048), Source.FALLBACK, "three")
    assert engine.step() is decision  # made once


def test_a_fallback_wants_what_the_local_policy_wants():
    engine = Engine()
    held_up = Decision(BatchLimits(3, 2048), Source.MEMORY, "held up by what runs", wanted_seqs=2)
    engine.local.decision = held_up
    assert engine.step().wanted == held_up.wanted == BatchLimits(2, 2048)
    engine.step(2.0)
    (report,) = engine.post.reports
    assert report.local_limits == BatchLimits(2, 2048)


def test_a_lease_decides_to_its_last_moment_and_not_one_longer():
    engine = Engine()
    engine.step()
    engine.grant(seconds=2.0)
    assert engine.step(0.0).limits.max_num_seqs == 8
    assert engine.step(1.999).source is Source.REMOTE
    assert engine.step(0.001).source is Source.FALLBACK


def test_the_local_policy_sees_every_step_whoever_decides():
    engine = Engine()
    engine.step()
    engine.grant()
    for _ in range(50):
        assert engine.step(0.001).source is Source.REMOTE
    assert len(engine.local.steps) == 51
    assert engine.local.asked == 1  # nobody needed its answer
    engine.step(1.0)
    assert engine.local.asked == 2  # the report did


def test_a_report_tells_what_happened_since_the_last():
    engine = Engine()
    for _ in range(10):
        engine.step(0.1)
    assert engine.post.reports == []
    engine.hook.stats.clamps["above_upper_bound"] = 4
    engine.step(0.2, waiting=9)
    (report,) = engine.post.reports
    assert report.steps == (STEP,) * 10
    assert report.seconds == pytest.approx(1.1)
    assert report.snapshot.waiting == 9
    assert report.limits == BatchLimits(5, 100)
    assert report.local_limits == BatchLimits(3, 2048)
    assert report.source is Source.FALLBACK
    assert report.clamps == {"above_upper_bound": 4}
    assert (report.running, report.waiting) == (None, None)
    engine.step(1.0)
    assert engine.post.reports[1].steps == (STEP,)
    assert engine.post.reports[1].clamps == {}


def test_the_first_step_after_a_pause_reports_at_once():
    engine = Engine()
    engine.step()
    engine.step(600.0)
    assert [report.seconds for report in engine.post.reports] == [pytest.approx(600.0)]


def test_a_report_closes_early_before_it_grows_without_end():
    engine = Engine()
    for _ in range(MOST_STEPS + 1):
        engine.step(0.0)
    assert [len(report.steps) for report in engine.post.reports] == [MOST_STEPS]


def test_nothing_is_started_before_the_first_decision():
    engine = Engine()
    assert engine.post.starts == 0
    engine.step()
    assert engine.post.starts == 1


def test_an_exception_in_reporting_leaves_the_local_policy_alone_for_good():
    engine = Engine()
    engine.step()
    engine.grant()

    def broken(report):
        raise RuntimeError("broken on purpose")

    engine.post.offer = broken
    engine.step(1.0)
    for _ in range(3 * MOST_STEPS):
        assert engine.step(0.5).source is Source.FALLBACK
    assert engine.policy._steps == []
