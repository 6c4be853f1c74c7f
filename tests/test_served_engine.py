"""A running engine seen, shadowed and steered through a real service."""

import itertools
import threading
import time

import gymnasium
import numpy as np
import pytest
from tuner_double import until

import batchpilot.env.registration as registration
from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.limits import BatchLimits
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.engine import EngineRequest
from batchpilot.env.served_engine import ServedEngine, ServedEngineConfig, ServedEngineError
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig
from batchpilot.scheduler_hook.remote_link import EngineIdentity, remote_link
from batchpilot.scheduler_hook.settings import HookSettings
from batchpilot.service.process_meter import ServiceProcess


class Server:
    """Stands for a running server: a virtual engine under load, its hook following the service."""

    def __init__(self, target, engine, group="served", name="node-1"):
        self._engine = engine
        settings = HookSettings(
            mode="remote",
            service_targets=target,
            service_group=group,
            service_engine=name,
            service_max_lease_seconds=20.0,  # no busy machine takes so long
            itl_slo_ms=40,
        )
        identity = EngineIdentity(engine.facts, "a-model", 0, "0.32.0")
        policy, self.client = remote_link(settings, identity, PolicySpec.parse("memory").build())
        engine.set_policy(policy)
        policy.attach(engine._hook)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        ids, began = itertools.count(), time.monotonic()
        while not self._stop.is_set():
            while self._engine.snapshot().waiting < 8:
                number = next(ids)  # sequences of many lengths: few of them end in one step
                self._engine.add_request(EngineRequest(f"r{number}", [7] * 100, 10 + number % 37))
            while self._engine.clock_seconds < time.monotonic() - began:
                if not self._engine.has_unfinished_requests():
                    break  # far behind, on a busy machine
                self._engine.step()
            time.sleep(0.01)

    def close(self):
        self._stop.set()
        self._thread.join()
        self.client.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "service.yaml"
    path.write_text("default: {lease_ms: 20000, itl_slo_ms: 99, ttft_slo_ms: 700}\n")
    with ServiceProcess("static:max_num_seqs=20", "--config", str(path)) as service:
        yield service.target


@pytest.fixture(scope="module")
def server(target):
    config = VirtualEngineConfig("llama-3.1-8b-rtx4090", max_num_seqs=32)
    with VirtualEngine(config) as engine:
        server = Server(target, engine)
        assert until(lambda: engine.applied_limits.max_num_seqs == 20, 30)
        yield server
        server.close()


def config(target, **more):
    return ServedEngineConfig(target=target, group="served", **more)


def test_it_sees_what_the_server_reports(server, target):
    with ServedEngine(config(target)) as engine:
        assert engine.name == "node-1"
        assert engine.facts.startup_limits == BatchLimits(32, 2048)
        # Its own, and its group's.
        assert engine.targets == LatencyTargets(itl_slo_ms=40, ttft_slo_ms=700)
        window = engine.collect(1.0)
    assert 0 < window.running <= 20
    assert window.waiting > 0
    assert window.limits == BatchLimits(20, 2048)
    assert window.decode_tokens > 100
    assert 0.2 < window.seconds < 30
    assert engine.applied_limits == BatchLimits(20, 2048)
    assert (engine.source, engine.binding) == ("remote", "max_num_seqs")


def test_a_shadow_keeps_what_it_would_apply_and_applies_nothing(server, target):
    with ServedEngine(config(target, mode="shadow")) as engine:
        engine.apply(BatchLimits(5, 128))
        assert engine.collect(1.0).limits == BatchLimits(20, 2048)
        assert engine.shadow_limits == BatchLimits(5, 128)


def becomes(engine, limits):
    """Whether the limits of a server become these, which somebody has asked for."""
    return until(lambda: engine.collect(0.3).limits == limits, 2.0)


def test_steering_moves_the_servers_limits_and_closing_gives_its_policy_back(server, target):
    with ServedEngine(config(target, mode="steer")) as engine:
        engine.apply(BatchLimits(8, 512))
        assert becomes(engine, BatchLimits(8, 512))
        engine.apply(BatchLimits(12, 1024))
        assert becomes(engine, BatchLimits(12, 1024))
    with ServedEngine(config(target)) as engine:
        assert becomes(engine, BatchLimits(20, 2048))


def test_what_was_reported_before_limits_were_asked_for_is_not_taken_for_their_doing(
    server, target
):
    with ServedEngine(config(target, mode="steer")) as engine:
        assert until(lambda: engine._reports.qsize() > 3)
        engine.apply(BatchLimits(20, 1024))
        assert engine._reports.qsize() < 3
        assert becomes(engine, BatchLimits(20, 1024))


def play_with_the_middle_action(env):
    """One episode; returns its last info and reward."""
    seen, info = env.reset(seed=1)
    assert env.observation_space.contains(seen)
    for number in range(10):
        seen, reward, terminated, truncated, info = env.step(np.zeros(2, dtype=np.float32))
        assert env.observation_space.contains(seen)
        assert info["proposed_limits"] == {"max_num_seqs": 8, "max_num_batched_tokens": 362}
        assert (terminated, truncated) == (False, number == 9)
    return info, reward


def test_a_server_goes_back_to_its_policy_when_its_agent_is_gone(server, target):
    engine = ServedEngine(config(target, mode="steer"))
    engine.apply(BatchLimits(20, 512))
    assert becomes(engine, BatchLimits(20, 512))
    engine.config = config(target, mode="steer", hold_seconds=1.0)
    engine.apply(BatchLimits(20, 512))  # nothing more is asked for, and nobody closes it
    assert becomes(engine, BatchLimits(20, 2048))
    engine.close()


def test_limits_must_hold_from_one_action_to_the_next():
    with pytest.raises(ConfigError, match=r"hold_seconds=3 must be at least twice"):
        gymnasium.make("batchpilot/ServedBatchLimits-v0", hold_seconds=3.0, decision_interval_s=2.0)


def test_the_environment_steers_by_actions_and_rewards_tokens_in_time(server, target):
    env = gymnasium.make(
        registration.SERVED_ENV,
        target=target,
        group="served",
        mode="steer",
        decision_interval_s=0.6,
        intervals=10,
        min_num_seqs=2,
        capacity_tokens_per_s=1000.0,
    )
    for _ in range(20):  # sequences beyond a new limit end first, on a busy machine late
        info, reward = play_with_the_middle_action(env)
        if info["applied_limits"] == info["proposed_limits"]:
            break
    assert info["applied_limits"] == info["proposed_limits"]
    assert reward == pytest.approx(info["throughput_tokens_per_s"] / 1000.0)
    env.close()


def test_an_engine_that_is_not_there_is_said_so(server, target):
    with pytest.raises(ServedEngineError, match="group 'served' has 0 engines that fit; it has: n"):
        ServedEngine(config(target, engine="node-9"))
    with pytest.raises(ServedEngineError, match="UNAVAILABLE"):
        ServedEngine(ServedEngineConfig(target="localhost:1"))
    with pytest.raises(ConfigError, match="token_file: cannot read /nowhere"):
        ServedEngine(config(target, token_file="/nowhere"))


def test_a_group_of_several_is_not_steered_as_one(server, target):
    with VirtualEngine(VirtualEngineConfig("llama-3.1-8b-rtx4090", max_num_seqs=32)) as engine:
        second = Server(target, engine, name="node-2")
        try:
            assert until(lambda: second.client.stats.connected, 30)
            with pytest.raises(ServedEngineError, match="has 2 engines that fit"):
                ServedEngine(config(target))
            with pytest.raises(ServedEngineError, match="give it a group of its own"):
                ServedEngine(config(target, engine="node-1", mode="steer"))
        finally:
            second.close()


def test_an_engine_that_ends_is_noticed(target):
    with VirtualEngine(VirtualEngineConfig("llama-3.1-8b-rtx4090", max_num_seqs=32)) as engine:
        server = Server(target, engine, group="short")
        assert until(lambda: server.client.stats.leases["accepted"], 30)
        with ServedEngine(ServedEngineConfig(target=target, group="short")) as served:
            server.close()
            with pytest.raises(ServedEngineError, match="short/node-1 has gone"):
                while True:
                    served.collect(0.3)
