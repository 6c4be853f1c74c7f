"""`learned`: what a network says becomes limits, at the same moments and from the same numbers as
in training."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from policies import FEATURES, constant, following, manifest, policy, write

import batchpilot.env.registration  # noqa: F401  (makes the environments known)
from batchpilot.agents.acting import BASE_DECIDES
from batchpilot.agents.actions import ActionDesign
from batchpilot.agents.catalog import PolicySpec, learned_policy
from batchpilot.agents.features import FEATURE_NAMES, LatencyTargets, observation
from batchpilot.agents.learned import MODEL_FAILED, LearnedPolicy
from batchpilot.agents.learned_model import ModelError, OnnxModel
from batchpilot.agents.limits import (
    BatchLimits,
    Decision,
    EngineFacts,
    EngineSnapshot,
    Source,
    StepRecord,
)
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.registry import PolicyRegistry
from batchpilot.agents.telemetry import WindowBuilder
from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.engine import EngineRequest
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig
from batchpilot.scheduler_hook.settings import HookSettings

FACTS = EngineFacts(BatchLimits(256, 2048), total_blocks=1024, block_size=16)
STEP = StepRecord(seconds=0.1, running=8, decode_seqs=8, prefill_tokens=0)
UNSET = LatencyTargets()


class Fixed:
    """A base policy that wants the same always."""

    def observe(self, step):
        del step

    def decide(self, snapshot):
        return Decision(BatchLimits(100, 1024), Source.MEMORY, "fixed")


class Scripted:
    """A network that says what it is told, and remembers what it saw."""

    def __init__(self, *outputs):
        self.outputs, self.seen, self.cleared = list(outputs), [], 0

    def run(self, seen):
        self.seen.append(seen)
        output = self.outputs.pop(0)
        if isinstance(output, Exception):
            raise output
        return np.array(output, np.float32)

    def clear(self):
        self.cleared += 1


def snapshot(clock: float, **state) -> EngineSnapshot:
    return EngineSnapshot(FACTS, clock, **{"running": 8, "waiting": 0, **state})


def scripted(*outputs, targets=UNSET, **changes) -> tuple[LearnedPolicy, Scripted]:
    model = Scripted(*outputs)
    return LearnedPolicy(model, manifest(b"", **changes), Fixed(), targets), model


def test_it_acts_once_an_interval_and_holds_in_between():
    acting, model = scripted((0.0, 0.0), (1.0, 0.0), decision_interval_s=1.0)
    limits = []
    for tick in range(14):
        limits.append(acting.decide(snapshot(5 + tick / 10)).limits.max_num_seqs)
        acting.observe(STEP)
    assert limits == [100] * 10 + [200] * 4
    assert len(model.seen) == 2


def test_what_it_sees_is_the_window_since_its_last_action():
    acting, model = scripted((-1.0, 0.0), (0.0, 0.0))
    acting.decide(snapshot(0.0))
    for tick in range(1, 11):
        acting.observe(STEP)
        acting.decide(snapshot(tick / 10, waiting=3))
    builder = WindowBuilder(0.05)
    empty = builder.close(snapshot(0.0), seconds=0.0, limits=FACTS.startup_limits)
    for _ in range(10):
        builder.add(STEP)
    full = builder.close(snapshot(1.0, waiting=3), seconds=1.0, limits=BatchLimits(50, 1024))
    trained = LatencyTargets(50.0, 2000.0)
    assert np.array_equal(model.seen[0], observation(empty, FACTS, trained))
    assert np.array_equal(model.seen[1], observation(full, FACTS, trained))


def test_the_limits_in_force_that_it_sees_went_through_the_shield():
    acting, model = scripted((-1.0, 0.0), (0.0, 0.0))
    acting.decide(snapshot(0.0, running=80))  # asks for 50 while 80 run
    acting.decide(snapshot(1.0, running=80))
    seen = dict(zip(FEATURE_NAMES, model.seen[1].tolist(), strict=True))
    assert seen["max_num_seqs"] == pytest.approx(2 * np.log(80) / np.log(256) - 1)


def test_own_targets_win_over_those_of_its_training():
    acting, _ = scripted(targets=LatencyTargets(itl_slo_ms=20.0))
    assert acting.targets == LatencyTargets(20.0, 2000.0)


@pytest.mark.parametrize("failure", [ModelError("broken"), (np.nan, 0.0), (1.0,)])
def test_where_the_network_fails_the_base_decides_until_the_next_interval(failure):
    acting, _ = scripted((1.0, 0.0), failure, (-1.0, 0.0))
    decisions = [acting.decide(snapshot(float(second))) for second in range(3)]
    assert [d.limits.max_num_seqs for d in decisions] == [200, 100, 50]
    assert [d.source for d in decisions] == [Source.LEARNED, Source.FALLBACK, Source.LEARNED]
    assert decisions[1].reason == MODEL_FAILED != BASE_DECIDES
    assert acting.failures == 1


def test_history_is_filled_with_the_first_window_and_then_moves_on():
    acting, model = scripted((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), history=2)
    for second in range(3):
        acting.decide(snapshot(float(second), waiting=second))
        acting.observe(STEP)
    first, second, third = (seen.reshape(2, FEATURES) for seen in model.seen)
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(second[0], first[1])
    assert np.array_equal(third[0], second[1])
    assert not np.array_equal(third[0], third[1])


def test_time_that_the_engine_stood_idle_becomes_empty_windows():
    acting, model = scripted((0.0, 0.0), (0.0, 0.0), history=2)
    acting.decide(snapshot(0.0))
    acting.observe(STEP)
    acting.decide(snapshot(60.0, running=0, waiting=1))
    busy = [s.reshape(2, FEATURES)[:, FEATURE_NAMES.index("busy")] for s in model.seen]
    assert busy[1].tolist() == [-1.0, -1.0]
    assert acting.observed.reshape(2, FEATURES)[1][FEATURE_NAMES.index("waiting")] == -1.0


def test_a_clock_set_back_is_another_run():
    acting, model = scripted((1.0, 0.0), (0.0, 0.0), history=2)
    acting.decide(snapshot(100.0))
    assert acting.decide(snapshot(0.0)).limits.max_num_seqs == 100
    assert model.cleared == 2
    assert np.array_equal(*model.seen[1].reshape(2, FEATURES))


def test_grid_and_absolute_designs():
    fourth = constant(*[0.0] * 3, 1.0, *[0.0] * 24)
    grid = policy(fourth, action=ActionDesign(design="grid"), base_policy="static")
    assert learned_policy(grid, UNSET).decide(snapshot(0.0)).limits == BatchLimits(128, 2048)
    absolute = policy(constant(0.0, 1.0), action=ActionDesign(design="absolute"))
    assert learned_policy(absolute, UNSET).decide(snapshot(0.0)).limits == BatchLimits(16, 2048)


def test_texts_name_it_by_path_version_or_name(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHPILOT_POLICIES", str(tmp_path / "policies"))
    folder = tmp_path / "lr=0.1" / "p"
    write(folder, name="chat", version="3", base_policy="memory+sla")
    PolicyRegistry().add(folder)
    PolicyRegistry().promote("chat", "3", "europe")
    for text in (f"learned:{folder}", "learned:chat@3", "learned:chat:group=europe"):
        spec = PolicySpec.parse(text)
        built = spec.build({"itl_slo_ms": 30.0})
        assert isinstance(built, LearnedPolicy)
        assert built.targets.itl_slo_ms == 30.0
        assert PolicySpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learned", "artefact is required: a folder, NAME@VERSION or NAME"),
        ("learned:", "'' is not key=value"),
        ("learned:/nowhere", "policy /nowhere: cannot read manifest.json: No such file"),
        ("learned:nobody", "no version of policy 'nobody' is promoted"),
        ("learned:nobody@1", "no version '1' of policy 'nobody'"),
        ("learned:../x@1", "cannot read manifest.json"),
        ("learned:x:groop=a", "unknown key 'groop'"),
    ],
)
def test_texts_that_name_none(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("BATCHPILOT_POLICIES", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        PolicySpec.parse(text).build()
    assert message in str(error.value)


def test_the_hook_refuses_a_poisoned_policy_at_start(tmp_path):
    write(tmp_path / "p")
    (tmp_path / "p" / "policy.onnx").write_bytes(b"not the network")
    with pytest.raises(ConfigError, match="the file is damaged or was exchanged"):
        HookSettings(policy=f"learned:{tmp_path}/p")


def test_a_bench_tells_two_policies_of_one_path_apart(tmp_path):
    write(tmp_path / "p")
    label = f"learned:{tmp_path}/p"
    before = Contestant.parse(label).identity
    for path in (tmp_path / "p").iterdir():
        path.unlink()
    (tmp_path / "p").rmdir()
    write(tmp_path / "p", constant(0.5, 0.0))
    assert Contestant.parse(label).identity != before
    assert Contestant.parse("static").identity == "static"


def test_without_onnxruntime_it_says_what_to_install(tmp_path):
    write(tmp_path / "p")
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from batchpilot.agents.catalog import PolicySpec\n"
        f"PolicySpec.parse('learned:{tmp_path}/p').build()"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a learned policy needs onnxruntime, which is not installed" in failed.stderr


SETTINGS = {
    "profile": "llama-3.1-8b-rtx4090",
    "workload": "lognormal:prompt_mean=200:output_mean=300:output_max=1024",
    "arrivals": "saturated",
    "itl_slo_ms": 50.0,
    "ttft_slo_ms": 2000.0,
    "horizon_s": 20.0,
    "decision_interval_s": 1.0,
    "action_design": "absolute",
}


def drive(engine: VirtualEngine, episode, until: float) -> None:
    """Serves an environment's requests without its steering."""
    while engine.clock_seconds < until:
        episode._submit_due()
        if engine.has_unfinished_requests():
            engine.step()
        else:
            episode._idle(until)


class Recording:
    """A network that remembers what it saw."""

    def __init__(self, model) -> None:
        self.model, self.seen = model, []

    def run(self, seen):
        self.seen.append(seen)
        return self.model.run(seen)

    def clear(self):
        self.model.clear()


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_in_service_it_sees_and_does_what_it_saw_and_did_in_training(factor):
    """The same requests once under the environment, once under the policy alone."""
    artefact = policy(following("running", factor), action=ActionDesign(design="absolute"))
    model = OnnxModel(artefact)
    env = gymnasium.make("batchpilot/BatchLimits-v0", **SETTINGS).unwrapped
    seen, _ = env.reset(seed=7)
    in_training = [seen]
    for _ in range(19):
        seen, *_ = env.step(model.run(seen))
        in_training.append(seen)
    env.reset(seed=7)
    engine, episode = env._opened.engine, env._episode
    recording = Recording(model)
    engine.set_policy(learned_policy(artefact, UNSET, recording))
    drive(engine, episode, 19.5)
    env.close()
    assert len({tuple(seen) for seen in in_training}) > 10
    # Requests that come between an interval's end and the next step are seen by the policy alone.
    but_waiting = [name != "waiting" for name in FEATURE_NAMES]
    seen = np.array(recording.seen[:20])
    assert np.array_equal(np.array(in_training)[:, but_waiting], seen[:, but_waiting])


def test_the_same_limits_as_memory_sla_step_by_step(tmp_path):
    """A network whose action is 0 is its base policy, on a whole run under load."""
    runs = []
    for text in ("memory+sla", f"learned:{tmp_path}/p"):
        if text.startswith("learned"):
            write(tmp_path / "p", base_policy="memory+sla", decision_interval_s=0.5)
        runs.append(limits_under_load(PolicySpec.parse(text).build({"itl_slo_ms": 30.0})))
    assert runs[0] == runs[1]
    assert len({limits.max_num_seqs for limits in runs[0]}) > 10


def limits_under_load(steering) -> list[BatchLimits]:
    config = VirtualEngineConfig("llama-3.1-8b-rtx4090", max_num_seqs=64, kv_blocks=600)
    with VirtualEngine(config) as engine:
        engine.set_policy(steering)
        for number in range(120):
            tokens = [number + 5] * (40 + number)
            engine.add_request(EngineRequest(f"r{number}", tokens, 50 + 2 * number))
        limits = []
        while engine.has_unfinished_requests():
            engine.step()
            limits.append(engine.applied_limits)
        return limits
