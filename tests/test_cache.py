from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.cache import build_once, cache_folder


def write_one_file(folder: Path) -> None:
    (folder / "file").write_text("whole")


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_builds_once(tmp_path: Path):
    builds = []

    def build(folder: Path) -> None:
        builds.append(folder)
        write_one_file(folder)

    target = tmp_path / "deep" / "model"
    for _ in range(2):
        assert build_once(target, build, needed_bytes=1) == target
    assert len(builds) == 1
    assert builds[0].parent == target.parent
    assert files_below(target.parent) == [".model.lock", "model/file"]


def test_the_folder_can_be_read_by_others(tmp_path: Path):
    target = build_once(tmp_path / "model", write_one_file, needed_bytes=1)
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_failing_build_leaves_nothing(tmp_path: Path):
    def build(folder: Path) -> None:
        write_one_file(folder)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        build_once(tmp_path / "model", build, needed_bytes=1)
    assert files_below(tmp_path) == [".model.lock"]
    assert not (tmp_path / "model").exists()


KILLED_BUILD = """
import sys, time
from pathlib import Path
from batchpilot.env.cache import build_once

def build(folder):
    (folder / "file").write_text("half")
    print("building", flush=True)
    time.sleep(600)

build_once(Path(sys.argv[1]), build, needed_bytes=1)
"""


def test_a_killed_build_is_never_used(tmp_path: Path):
    target = tmp_path / "model"
    command = [sys.executable, "-c", KILLED_BUILD, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert [name for name in files_below(tmp_path) if name.endswith("file")] != []
    build_once(target, write_one_file, needed_bytes=1)
    assert files_below(tmp_path) == [".model.lock", "model/file"]
    assert (target / "file").read_text() == "whole"


def test_two_at_once_build_once(tmp_path: Path):
    inside, let_go = threading.Event(), threading.Event()
    builds, results = [], []

    def build(folder: Path) -> None:
        builds.append(folder)
        inside.set()
        assert let_go.wait(60)
        write_one_file(folder)

    def ask() -> None:
        results.append(build_once(tmp_path / "model", build, needed_bytes=1))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert inside.wait(60)
    for thread in threads[1:]:
        thread.start()
    let_go.set()
    for thread in threads:
        thread.join(60)
    assert results == [tmp_path / "model"] * 3
    assert len(builds) == 1


def test_too_little_space(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"MiB free, 1048576 MiB are needed.*BATCHPILOT_CACHE"):
        build_once(tmp_path / "model", write_one_file, needed_bytes=2**40)
    assert not (tmp_path / "model").exists()


def test_a_place_that_cannot_be_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot build .*model: .*BATCHPILOT_CACHE"):
        build_once(tmp_path / "file" / "model", write_one_file, needed_bytes=1)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("BATCHPILOT_CACHE", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/batchpilot")
    monkeypatch.setenv("BATCHPILOT_CACHE", "~/models")
    assert cache_folder() == Path("/home/someone/models")
