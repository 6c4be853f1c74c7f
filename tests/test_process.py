from __future__ import annotations

import os

import pytest

from batchpilot.env.process import prepare_process


def test_threads_sleep_and_no_hub_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    prepare_process()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["HF_HUB_OFFLINE"]) == ("ACTIVE", "0")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    prepare_process()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["HF_HUB_OFFLINE"]) == ("PASSIVE", "1")
