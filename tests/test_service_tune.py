"""The service over real sockets: sessions, leases, policies that fail, and those who watch."""

import asyncio

import grpc
import pytest
from serving import Engine, channel_to, hello, report, run, serving

from batchpilot.agents.catalog import POLICIES, PolicyKind
from batchpilot.agents.limits import BatchLimits, Decision, Source
from batchpilot.agents.static import StaticParameters
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.metrics import ENGINE_GAUGES
from batchpilot.service.settings import GroupSettings
from batchpilot.service.wire import engine_key

STATIC = {"policy": "static:max_num_seqs=32"}


class Raising:
    """A policy that fails at its second decision, where the engine's prompt chunk says so."""

    def __init__(self, params):
        self.decisions = 0

    def observe(self, step):
        pass

    def decide(self, snapshot):
        self.decisions += 1
        if snapshot.waiting == 13:
            raise RuntimeError("thirteen")
        return Decision(BatchLimits(9, 99999), Source.STATIC, "fixed")


@pytest.fixture
def raising(monkeypatch):
    monkeypatch.setitem(POLICIES, "raising", PolicyKind(StaticParameters, Raising))


def test_an_engine_is_welcomed_and_every_report_is_answered_in_order():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            engine = Engine(channel)
            welcome = await engine.begin()
            assert (welcome.report_interval_ms, welcome.policy) == (250, STATIC["policy"])
            assert welcome.detail == pb.DETAIL_WINDOW
            for sequence in (1, 2, 5):
                lease = await engine.ask(sequence, window={"running": 4, "used_blocks": 10})
                assert lease.sequence == sequence
                assert lease.lease_ms == 2000
                assert lease.limits == pb.BatchLimits(max_num_seqs=32, max_num_batched_tokens=8192)
                assert (lease.source, lease.reason) == ("static", "fixed")
            await engine.call.done_writing()
            assert (await engine.status())[0] is grpc.StatusCode.OK
            assert len(service.sessions) == 0

    run(test)


def test_what_the_engine_knows_for_long_enough_is_not_said_again():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            engine = Engine(channel)
            await engine.begin()
            await engine.send(report=report(1, lease_remaining_ms=5000))  # another stream's lease
            assert (await engine.call.read()).lease.sequence == 1
            for sequence, remaining in ((2, 1750), (3, 1250)):
                await engine.send(report=report(sequence, lease_remaining_ms=remaining))
            assert (await engine.ask(4, lease_remaining_ms=1249)).sequence == 4
            # The engine's own interval counts: the next report is as far away.
            slow = {"seconds": 0.8, "busy_seconds": 0.8}
            assert (await engine.ask(5, lease_remaining_ms=1750, window=slow)).sequence == 5
            (session,) = service.sessions
            assert (session.sequence, session.lease.sequence) == (5, 5)
            assert (service.meters.leases["chat"], sum(service.meters.latency.counts)) == (3, 5)

    run(test)


def test_other_limits_are_said_at_once_however_long_the_lease_runs():
    async def test():
        policy = {"policy": "memory"}
        async with serving(default=policy) as service, channel_to(service) as channel:
            engine = Engine(channel)
            await engine.begin()
            assert (await engine.ask(1)).limits.max_num_seqs == 95  # of 10 blocks each
            few = {"running": 4}
            lease = await engine.ask(2, lease_remaining_ms=1900, window=few)
            assert (lease.sequence, lease.limits.max_num_seqs) == (2, 7)  # of 125
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            (shown,) = (await stub.ListEngines(pb.ListEnginesRequest())).engines
            assert shown.lease.sequence == 2
            await engine.send(report=report(3, lease_remaining_ms=1900, window=few))
            while service.sessions.get(engine_key(hello().id)).sequence < 3:
                await asyncio.sleep(0.01)
            for session in service.sessions:
                session.leased_at -= 600
            (shown,) = (await stub.ListEngines(pb.ListEnginesRequest())).engines
            assert shown.lease_age_ms >= 600_000 > shown.report_age_ms

    run(test)


def test_the_service_shields_what_a_policy_wants():
    async def test():
        policy = {"policy": "static:max_num_seqs=8", "min_num_seqs": 12}
        async with serving(default=policy) as service, channel_to(service) as channel:
            engine = Engine(channel)
            await engine.begin()
            lease = await engine.ask(1)
            assert lease.limits.max_num_seqs == 12  # though 50 run: the engine waits for them
            assert service.meters.clamps == {("chat", "below_lower_bound"): 1}

    run(test)


@pytest.mark.parametrize(
    ("policy", "detail"),
    [
        ("static", pb.DETAIL_WINDOW),
        ("memory", pb.DETAIL_WINDOW),
        ("memory+sla", pb.DETAIL_WINDOW),
        ("memory+sla:memory=memory-peak", pb.DETAIL_STEPS),
        ("memory-clt", pb.DETAIL_STEPS),
        ("memory-peak", pb.DETAIL_STEPS),
    ],
)
def test_policies_that_learn_lengths_ask_for_every_step(policy, detail):
    async def test():
        async with serving(default={"policy": policy}) as service, channel_to(service) as channel:
            welcome = await Engine(channel).begin(hello(itl_slo_ms=50.0))
            assert welcome.detail == detail

    run(test)


def test_a_group_lends_its_targets_to_engines_that_state_none():
    async def test():
        default = {**STATIC, "itl_slo_ms": 40.0, "ttft_slo_ms": 900.0}
        async with serving(default=default) as service, channel_to(service) as channel:
            without = await Engine(channel).begin()
            with_own = await Engine(channel).begin(hello(engine="node-2:1", itl_slo_ms=25.0))
            assert (without.itl_slo_ms, without.ttft_slo_ms) == (40.0, 900.0)
            assert (with_own.itl_slo_ms, with_own.ttft_slo_ms) == (25.0, 900.0)
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            engines = (await stub.ListEngines(pb.ListEnginesRequest())).engines
            assert [(e.itl_slo_ms, e.ttft_slo_ms) for e in engines] == [(40, 900), (25, 900)]
            assert not engines[0].hello.HasField("itl_slo_ms")
            shown = ENGINE_GAUGES["itl_target_seconds"].read
            assert [shown(session) for session in service.sessions] == [0.04, 0.025]

    run(test)


def test_an_engine_hears_of_another_target_of_its_group_and_of_none():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            engine = Engine(channel)
            assert not (await engine.begin()).HasField("itl_slo_ms")
            service.groups.configure(GroupSettings(**STATIC, itl_slo_ms=30.0), {})
            await engine.send(report=report(1))
            assert (await engine.call.read()).welcome.itl_slo_ms == 30.0
            assert (await engine.call.read()).lease.sequence == 1
            service.groups.configure(GroupSettings(**STATIC), {})
            await engine.send(report=report(2))
            assert not (await engine.call.read()).welcome.HasField("itl_slo_ms")

    run(test)


def test_a_new_session_of_the_same_engine_replaces_the_old_one():
    async def test():
        async with (
            serving(default=STATIC) as service,
            channel_to(service) as one,
            channel_to(service) as two,
        ):
            old, other_rank, new = Engine(one), Engine(one), Engine(two)
            await old.begin()
            second = hello()
            second.id.data_parallel_rank = 1
            await other_rank.begin(second)
            await new.begin()
            code, text = await old.status()
            assert code is grpc.StatusCode.ABORTED
            assert text == "a new session of chat/node-1:77/0 has replaced this one"
            assert (await new.ask(1)).sequence == 1
            assert (await other_rank.ask(1)).sequence == 1
            assert len(service.sessions) == 2

    run(test)


@pytest.mark.parametrize(
    ("requests", "complaint"),
    [
        ([{"report": report(1)}], "the first request must be a hello"),
        ([{}], "the first request must be a hello"),
        ([{"hello": hello(engine="")}], "engine=''"),
        ([{"hello": hello()}, {"hello": hello()}], "after the first must be a report"),
        ([{"hello": hello()}, {"report": report(0)}], "sequence=0"),
        ([{"hello": hello()}, {"report": report(2)}, {"report": report(2)}], "sequence=2"),
        ([{"hello": hello()}, {"report": report(1, window={"seconds": -1})}], "seconds=-1"),
        ([{"hello": hello()}, {"report": report(1, window={"running": 257})}], "running=257"),
    ],
)
def test_what_cannot_be_real_ends_the_stream_with_invalid_argument(requests, complaint):
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            engine = Engine(channel)
            for request in requests:
                await engine.send(**request)
            code, text = await engine.status()
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert complaint in text
            assert service.meters.errors == {("Tune", "INVALID_ARGUMENT"): 1}
            assert len(service.sessions) == 0

    run(test)


def test_an_engine_that_opens_a_stream_and_says_nothing_is_sent_away(monkeypatch):
    monkeypatch.setattr("batchpilot.service.tuner.HELLO_SECONDS", 0.1)

    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            silent = Engine(channel)
            assert await silent.status() == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "no hello within 0.1 s",
            )
            assert len(service.sessions) == 0

    run(test)


def test_an_engine_that_reads_no_answers_holds_up_only_itself():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            deaf = Engine(channel)
            await deaf.begin()
            async with channel_to(service) as other:
                healthy = Engine(other)
                await healthy.begin(hello(engine="node-2:1"))
                for sequence in range(1, 21):
                    await deaf.send(report=report(sequence))
                    assert (await healthy.ask(sequence)).sequence == sequence

    run(test)


def test_garbage_ends_one_stream_and_nothing_else():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            healthy = Engine(channel)
            await healthy.begin()
            raw = channel.stream_stream("/batchpilot.v1.TunerService/Tune")()
            await raw.write(b"\xff\xfe garbage")
            assert await raw.code() is not grpc.StatusCode.OK
            assert (await healthy.ask(1)).sequence == 1

    run(test)


def test_a_policy_that_raises_leaves_its_engine_alone_and_no_other(raising):
    async def test():
        async with (
            serving(default={"policy": "raising"}) as service,
            channel_to(service) as channel,
        ):
            one, two = Engine(channel), Engine(channel)
            await one.begin()
            await two.begin(hello(engine="node-2:1"))
            assert (await one.ask(1)).limits.max_num_seqs == 9
            await one.send(report=report(2, window={"waiting": 13}))
            told = await one.call.read()
            assert told.welcome.problem == "it raised an exception; see the service's log"
            await one.send(report=report(3))  # still taken in, still without an answer
            while service.sessions.get(engine_key(hello().id)).sequence < 3:
                await asyncio.sleep(0.01)
            assert (await two.ask(1)).limits.max_num_seqs == 9
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            engines = (await stub.ListEngines(pb.ListEnginesRequest())).engines
            assert [e.problem for e in engines] == [
                "it raised an exception; see the service's log",
                "",
            ]
            assert not engines[0].HasField("lease")
            assert service.meters.policy_failures == {"chat": 1}

    run(test)


def test_an_engine_without_the_target_its_policy_needs_gets_no_lease_and_is_told_why():
    async def test():
        async with serving(default={"policy": "sla"}) as service, channel_to(service) as channel:
            without, with_target = Engine(channel), Engine(channel)
            welcome = await without.begin()
            await with_target.begin(hello(engine="node-2:1", itl_slo_ms=50.0))
            assert (await with_target.ask(1)).source == "sla"
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            engines = (await stub.ListEngines(pb.ListEnginesRequest())).engines
            problem = (
                "policy 'sla': itl_slo_ms is required: set it for group chat or in its engines"
            )
            assert engines[0].problem == welcome.problem == problem

    run(test)


def test_more_sessions_than_allowed_are_refused_but_a_reconnection_is_not():
    async def test():
        async with (
            serving(default=STATIC, limits={"max_sessions": 1}) as service,
            channel_to(service) as channel,
        ):
            await Engine(channel).begin()
            refused = Engine(channel)
            await refused.send(hello=hello(engine="node-2:1"))
            code, text = await refused.status()
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert text == "this service holds its most of 1 sessions"
            assert (await Engine(channel).begin()).policy == STATIC["policy"]

    run(test)


def test_reports_faster_than_allowed_end_the_stream():
    async def test():
        async with (
            serving(
                default=STATIC, limits={"report_burst": 3, "reports_per_second": 0.001}
            ) as service,
            channel_to(service) as channel,
        ):
            engine = Engine(channel)
            await engine.begin()
            for sequence in (1, 2, 3):
                await engine.ask(sequence)
            await engine.send(report=report(4))
            code, text = await engine.status()
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert text == "reports come faster than 0.001 a second"

    run(test)


def test_an_engine_that_comes_back_has_no_new_burst():
    async def test():
        limits = {"report_burst": 3, "reports_per_second": 0.001}
        async with (
            serving(default=STATIC, limits=limits) as service,
            channel_to(service) as channel,
        ):
            for expected in ([1, 2], [1]):  # three in all
                engine = Engine(channel)
                await engine.begin()
                for sequence in expected:
                    await engine.ask(sequence)
                await engine.call.done_writing()
                assert (await engine.status())[0] is grpc.StatusCode.OK
            engine = Engine(channel)
            await engine.begin()
            await engine.send(report=report(1))
            assert (await engine.status())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test)


def test_a_report_costs_what_a_policy_may_look_at():
    """Steps times sequences: one such report would stop the service for half a minute."""

    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            engine = Engine(channel)
            facts = {
                "startup_limits": pb.BatchLimits(
                    max_num_seqs=60_000, max_num_batched_tokens=60_000
                ),
                "total_blocks": 1_000_000,
            }
            await engine.begin(hello(facts=facts))
            columns = [100] * 60_000
            message = report(1, window={"steps": 1000, "seconds": 10.0, "busy_seconds": 10.0})
            message.steps.extend([pb.StepRecord(running=1, decode_seqs=1)] * 1000)
            message.running.kv_tokens.extend(columns)
            message.running.output_tokens.extend(columns)
            message.running.prefill_tokens_left.extend(columns)
            await engine.send(report=message)
            assert (await engine.status())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test)


def test_a_message_larger_than_allowed_is_not_read():
    async def test():
        async with (
            serving(default=STATIC, limits={"max_message_bytes": 4096}) as service,
            channel_to(service) as channel,
        ):
            engine = Engine(channel)
            await engine.begin()
            columns = pb.SequenceColumns(kv_tokens=range(5000))
            await engine.send(report=report(1, running=columns))
            assert (await engine.status())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test)


def test_limits_can_be_asked_for_without_a_stream():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            key = hello().id
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.GetLimits(pb.GetLimitsRequest(id=key, report=report(1)))
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
            asked = pb.GetLimitsRequest(id=key, hello=hello(), report=report(1))
            assert (await stub.GetLimits(asked)).lease.limits.max_num_seqs == 32
            newest = await stub.GetLimits(pb.GetLimitsRequest(id=key))
            assert newest.lease.sequence == 1
            engine = Engine(channel)
            await engine.begin()  # takes the entry's place
            with pytest.raises(grpc.aio.AioRpcError) as has_stream:
                await stub.GetLimits(pb.GetLimitsRequest(id=key, report=report(2)))
            assert has_stream.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    run(test)


def test_of_a_long_report_only_what_is_shown_is_kept():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            engine = Engine(channel)
            await engine.begin()
            columns = dict.fromkeys(("kv_tokens", "output_tokens", "prefill_tokens_left"), [9] * 50)
            steps = [pb.StepRecord(seconds=0.01, running=50, decode_seqs=50)] * 100
            await engine.ask(1, steps=steps, running=pb.SequenceColumns(**columns))
            (session,) = service.sessions
            assert session.report == report(1)

    run(test)


def test_an_entry_without_a_stream_ends_when_its_reports_stop():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            asked = pb.GetLimitsRequest(id=hello().id, hello=hello(), report=report(1))
            await stub.GetLimits(asked)
            streaming = Engine(channel)
            await streaming.begin(hello(engine="node-2:1"))
            for session in service.sessions:
                session.reported_at -= 31.0
            service.sessions.sweep()
            assert [session.key.engine for session in service.sessions] == ["node-2:1"]

    run(test)


def test_a_watcher_sees_everything_first_and_then_what_changes():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            one, two = Engine(channel), Engine(channel)
            await one.begin()
            await two.begin(hello(engine="node-2:1"))
            await one.ask(1)
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            watching = stub.WatchEngine(pb.WatchEngineRequest(group="chat", interval_ms=200))
            first = await watching.read()
            assert [e.id.engine for e in first.engines] == ["node-1:77", "node-2:1"]
            assert first.engines[0].window.running == 50
            assert first.engines[0].applied_limits.max_num_seqs == 64
            assert first.engines[0].lease.limits.max_num_seqs == 32
            assert not first.engines[1].HasField("lease")
            await two.ask(1)
            assert [e.id.engine for e in (await watching.read()).engines] == ["node-2:1"]
            one.call.cancel()
            gone = await watching.read()
            assert ([e.engine for e in gone.gone], len(gone.engines)) == (["node-1:77"], 0)

    run(test)


def test_a_watcher_of_nothing_is_told_so_at_once():
    async def test():
        async with serving(default=STATIC) as service, channel_to(service) as channel:
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            first = await stub.WatchEngine(pb.WatchEngineRequest(group="none")).read()
            assert first == pb.WatchEngineResponse()

    run(test)


def test_more_watchers_than_allowed_are_refused():
    async def test():
        async with (
            serving(default=STATIC, limits={"max_watchers": 1}) as service,
            channel_to(service) as channel,
        ):
            stub = tuner_pb2_grpc.TunerServiceStub(channel)
            first = stub.WatchEngine(pb.WatchEngineRequest())
            await first.read()
            second = stub.WatchEngine(pb.WatchEngineRequest())
            assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            first.cancel()
            while service._tuner.watchers:
                await asyncio.sleep(0.01)
            third = stub.WatchEngine(pb.WatchEngineRequest())
            assert await third.read() == pb.WatchEngineResponse()

    run(test)


def test_synchronous_clients_are_served_too():
    async def test():
        async with serving(default=STATIC) as service:
            lease = await asyncio.to_thread(ask_synchronously, str(service.address))
            assert lease.limits.max_num_seqs == 32

    def ask_synchronously(address):
        with grpc.insecure_channel(address) as channel:
            requests = iter([pb.TuneRequest(hello=hello()), pb.TuneRequest(report=report(1))])
            answers = tuner_pb2_grpc.TunerServiceStub(channel).Tune(requests)
            welcome, lease = next(answers), next(answers)
            assert welcome.WhichOneof("kind") == "welcome"
            return lease.lease

    run(test)
