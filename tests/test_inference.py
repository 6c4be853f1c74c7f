"""The example policy, and what a trained policy takes to decide."""

from __future__ import annotations

import numpy as np
import pytest

from batchpilot.agents.artefact import load_artefact
from batchpilot.agents.learned_model import OnnxModel, probe_observations
from batchpilot.agents.manifest import ArtefactError
from batchpilot.env.bench import inference
from batchpilot.service.make_example_policy import write_example


@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_the_example_says_the_same_whatever_it_sees(tmp_path, shift):
    write_example(tmp_path / "p", shift_seqs=shift)
    artefact = load_artefact(tmp_path / "p")
    assert (artefact.label, artefact.parameters) == ("example@1", 6018)
    model = OnnxModel(artefact)
    for observation in probe_observations(26):
        assert np.array_equal(model.run(observation), np.array([shift, 0.0], np.float32))


def test_an_example_is_never_written_over_another(tmp_path):
    write_example(tmp_path / "p")
    with pytest.raises(ArtefactError, match="never overwritten"):
        write_example(tmp_path / "p")


@pytest.mark.parametrize(("acting", "expected"), [(True, 210), (False, 1)])
def test_acting_is_measured_apart_from_holding(tmp_path, monkeypatch, acting, expected):
    """Every decision is at the end of an interval, or only the first: by the network's runs."""
    artefact = write_example(tmp_path / "p")
    runs, original = [], OnnxModel.run

    def run(self, observation):
        runs.append(observation)
        return original(self, observation)

    monkeypatch.setattr(OnnxModel, "run", run)
    assert len(inference.network_us(artefact, 10)) == 10
    runs.clear()
    assert len(inference.decision_us(artefact, 10, acting=acting)) == 10
    assert len(runs) - len(probe_observations(26)) == expected


def test_it_prints_a_row_for_each_policy(tmp_path, capsys):
    write_example(tmp_path / "p")
    write_example(tmp_path / "q", version="2")
    assert inference.main([str(tmp_path / "p"), str(tmp_path / "q"), "--runs", "5"]) == 0
    out = capsys.readouterr().out
    assert "example@1" in out
    assert "example@2" in out
