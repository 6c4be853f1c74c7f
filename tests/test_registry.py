"""The registry: versions that never change, one file that says which is in force."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from policies import constant, write

from batchpilot.agents.manifest import ArtefactError
from batchpilot.agents.registry import PolicyRegistry, registry_folder


@pytest.fixture
def registry(tmp_path):
    return PolicyRegistry(tmp_path / "policies")


def add(registry, tmp_path, *versions, name="chat"):
    for number, version in enumerate(versions):
        source = tmp_path / f"source-{name}-{version}"
        write(source, constant(number / 10, 0.0), name=name, version=version)
        registry.add(source)


def test_the_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("BATCHPILOT_POLICIES", raising=False)
    assert registry_folder() == Path.home() / ".local/share/batchpilot/policies"
    monkeypatch.setenv("BATCHPILOT_POLICIES", "/srv/policies")
    assert registry_folder() == Path("/srv/policies")


def test_an_empty_registry(registry):
    assert registry.names() == ()
    assert registry.versions("chat") == ()
    assert registry.pointer("chat").version is None


def test_versions_are_listed_in_natural_order(registry, tmp_path):
    add(registry, tmp_path, "10", "2", "2.1", "1-rc")
    add(registry, tmp_path, "1", name="batch")
    assert registry.names() == ("batch", "chat")
    assert registry.versions("chat") == ("1-rc", "2", "2.1", "10")


def test_what_was_added_is_loaded_whole(registry, tmp_path):
    source = write(tmp_path / "source", name="chat", version="1")
    registry.add(tmp_path / "source")
    loaded = registry.load("chat", "1")
    assert loaded.fingerprint == source.fingerprint
    assert loaded.path == registry.folder / "chat" / "1"
    with pytest.raises(ArtefactError, match="exists: a version is never overwritten"):
        registry.add(tmp_path / "source")


def test_what_is_not_there_is_named_with_what_is(registry, tmp_path):
    add(registry, tmp_path, "1", "2")
    with pytest.raises(ArtefactError, match="no version '3' of policy 'chat' in .*; there: 1, 2"):
        registry.load("chat", "3")
    with pytest.raises(ArtefactError, match="promoted for group 'default' .*there: 1, 2"):
        registry.load_current("chat")
    with pytest.raises(ArtefactError, match="no version '1' of policy 'nobody' .*there: none"):
        registry.load("nobody", "1")


def test_promoting_and_rolling_back(registry, tmp_path):
    add(registry, tmp_path, "1", "2", "3")
    for version in ("1", "2", "3"):
        registry.promote("chat", version, note=f"gate {version}")
    assert registry.load_current("chat").manifest.version == "3"
    assert registry.rollback("chat").version == "2"
    assert registry.rollback("chat", note="late tokens").version == "1"
    with pytest.raises(ArtefactError, match="nothing to roll back to: policy 'chat' has 1"):
        registry.rollback("chat")
    events = registry.pointer("chat").events
    assert [(e.what, e.version, e.note) for e in events] == [
        ("promote", "1", "gate 1"),
        ("promote", "2", "gate 2"),
        ("promote", "3", "gate 3"),
        ("rollback", "2", ""),
        ("rollback", "1", "late tokens"),
    ]


def test_promoting_what_is_in_force_is_no_step_to_roll_back(registry, tmp_path):
    add(registry, tmp_path, "1", "2")
    for version in ("1", "2", "2"):
        registry.promote("chat", version)
    assert registry.rollback("chat").version == "1"


def test_groups_are_independent(registry, tmp_path):
    add(registry, tmp_path, "1", "2")
    registry.promote("chat", "1", "europe")
    registry.promote("chat", "2", "asia")
    assert registry.load_current("chat", "europe").manifest.version == "1"
    assert registry.load_current("chat", "asia").manifest.version == "2"
    assert registry.groups("chat") == ("asia", "europe")
    assert registry.pointer("chat").version is None


def test_a_version_that_is_damaged_is_neither_promoted_nor_rolled_back_to(registry, tmp_path):
    add(registry, tmp_path, "1", "2")
    registry.promote("chat", "1")
    registry.promote("chat", "2")
    (registry.folder / "chat" / "1" / "policy.onnx").write_bytes(b"")
    with pytest.raises(ArtefactError, match="SHA-256"):
        registry.rollback("chat")
    with pytest.raises(ArtefactError, match="SHA-256"):
        registry.promote("chat", "1")
    assert registry.pointer("chat").version == "2"


def test_a_folder_under_another_name_is_refused(registry, tmp_path):
    add(registry, tmp_path, "1")
    os.rename(registry.folder / "chat" / "1", registry.folder / "chat" / "9")
    with pytest.raises(ArtefactError, match="its manifest says chat@1"):
        registry.load("chat", "9")


@pytest.mark.parametrize("text", ["..", "../x", "a/../b", "CHAT", "", ".hidden", "x" * 64, "a\n"])
def test_names_that_lead_elsewhere_are_refused(registry, text):
    for use in (
        lambda: registry.load(text, "1"),
        lambda: registry.load("chat", text),
        lambda: registry.pointer("chat", text),
        lambda: registry.versions(text),
    ):
        with pytest.raises(ArtefactError, match="must be 1 to 63 lower-case letters"):
            use()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"stack": ["../../x"], "events": []}', "version '../../x' must be"),
        ('{"stack": 7, "events": []}', "not iterable"),
        ('{"stack": []}', "events is missing"),
    ],
)
def test_a_damaged_pointer_is_an_error_and_never_a_guess(registry, tmp_path, text, message):
    add(registry, tmp_path, "1")
    registry.promote("chat", "1")
    (registry.folder / "chat" / ".current" / "default.json").write_text(text)
    with pytest.raises(ArtefactError, match="default.json is damaged") as error:
        registry.load_current("chat")
    assert message in str(error.value)


def test_texts_are_found_by_path_version_or_name(registry, tmp_path):
    add(registry, tmp_path, "1", "2")
    registry.promote("chat", "1")
    assert registry.resolve("chat@2").label == "chat@2"
    assert registry.resolve("chat").label == "chat@1"
    assert registry.resolve(str(tmp_path / "source-chat-2")).label == "chat@2"


def test_unfinished_folders_are_no_versions(registry, tmp_path):
    add(registry, tmp_path, "1")
    (registry.folder / "chat" / ".unfinished-xyz").mkdir()
    assert registry.versions("chat") == ("1",)


def promote_often(folder: str, version: str) -> None:
    for _ in range(50):
        PolicyRegistry(Path(folder)).promote("chat", version)


def test_processes_that_promote_at_once_lose_nothing(registry, tmp_path):
    add(registry, tmp_path, "1", "2")
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=promote_often, args=(str(registry.folder), version))
        for version in ("1", "2")
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(registry.pointer("chat").events) == 100
