from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchpilot.env.process import prepare_process

SCRIPT = """
import time
from batchpilot.env.process import worker_pool

def work():
    print("at work", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with worker_pool(1) as pool:
        pool.submit(work).result()
"""


def test_threads_sleep_and_no_hub_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    prepare_process()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["HF_HUB_OFFLINE"]) == ("ACTIVE", "0")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    prepare_process()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["HF_HUB_OFFLINE"]) == ("PASSIVE", "1")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_a_parent_that_had_no_time_to_end_them(tmp_path: Path, number: int):
    script = tmp_path / "work.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "at work\n"
        parent.send_signal(number)
        parent.communicate(timeout=60)  # the pipe ends with the last process that holds it
    assert parent.returncode == -number
