"""Pools of processes: what they share, and that none outlives its block."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchpilot.env.process import worker_pool

SCRIPT = """
import os, time
from batchpilot.env.process import worker_pool

if __name__ == "__main__":
    with worker_pool(1) as pool:
        worker, work = pool.submit(os.getpid).result(), pool.submit(time.sleep, 600)
        print(worker, flush=True)
        work.result()
"""


def remember(name: str, value: str) -> None:
    os.environ[name] = value


def test_work_is_prepared_and_its_processes_end_with_the_block():
    with worker_pool(1, remember, "PREPARED", "yes") as pool:
        worker = pool.submit(os.getpid).result()
        assert worker != os.getpid()
        assert pool.submit(os.getenv, "PREPARED").result() == "yes"
    assert worker not in {process.pid for process in multiprocessing.active_children()}
    assert "PREPARED" not in os.environ


def test_an_exception_ends_work_that_nobody_waits_for():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker_pool(1) as pool:
        pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 300  # it did not wait for the work
    assert not multiprocessing.active_children()


def test_ctrl_c_is_the_parents_alone():
    with worker_pool(1) as pool:
        worker = pool.submit(os.getpid).result()
        os.kill(worker, signal.SIGINT)
        assert pool.submit(os.getpid).result() == worker


def start_work(folder: Path) -> subprocess.Popen[str]:
    script = folder / "work.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_a_sigterm_takes_the_processes_along(tmp_path: Path):
    with start_work(tmp_path) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(timeout=60) == -signal.SIGINT  # as if interrupted
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_a_parent_that_had_no_time_to_end_them(tmp_path: Path, number: int):
    with start_work(tmp_path) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip().isdigit()
        parent.send_signal(number)
        parent.communicate(timeout=60)  # the pipe ends with the last process that holds it
    assert parent.returncode == -number
