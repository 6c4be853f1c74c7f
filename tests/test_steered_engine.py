"""What both engines share: the environment must not reach into the hook that is measured."""

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig
from batchpilot.env.steered_engine import refuse_hook_settings
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig

DISTURBING = [
    ("BATCHPILOT_MODE", "off"),
    ("BATCHPILOT_MODE", "observe"),
    ("BATCHPILOT_MAX_NUM_SEQS", "4"),
    ("BATCHPILOT_MIN_NUM_SEQS", "4"),
    ("BATCHPILOT_MIN_PREFILL_CHUNK", "1"),
]


@pytest.mark.parametrize(("name", "value"), DISTURBING)
def test_a_setting_that_would_change_what_is_measured_is_refused(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value} is set in the environment.*unset it"):
        VirtualEngine(VirtualEngineConfig(profile="llama-3.1-8b-h100"))
    with pytest.raises(ConfigError, match=f"{name}={value} is set"):
        LiveEngine(LiveEngineConfig(model="tiny"))


def test_settings_that_change_nothing_here_are_not(monkeypatch):
    monkeypatch.setenv("BATCHPILOT_MODE", "local")
    monkeypatch.setenv("BATCHPILOT_LOG_INTERVAL_SECONDS", "60")
    refuse_hook_settings()


def test_a_closed_engine_says_so():
    engine = VirtualEngine(VirtualEngineConfig(profile="llama-3.1-8b-h100"))
    engine.close()
    engine.close()
    for call in (engine.snapshot, engine.step, engine.reset, lambda: engine.facts):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call()
