"""A folder of trained policies: versions that never change, and which of them is in force.

    FOLDER/NAME/VERSION/policy.onnx, manifest.json    written whole or not at all, then left alone
    FOLDER/NAME/.current/GROUP.json                   one file says what is in force and what was

A group is a set of engines that run the same policy; `default` where nobody says otherwise.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batchpilot.agents.artefact import (
    Artefact,
    load_artefact,
    sync,
    utc_now,
    write_artefact,
)
from batchpilot.agents.manifest import ArtefactError, check_name
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.strict_json import check_keys, parse_object

REGISTRY_VARIABLE = "BATCHPILOT_POLICIES"
DEFAULT_GROUP = "default"
_CURRENT = ".current"
_LARGEST_POINTER_BYTES = 2**20
_KEPT_EVENTS = 200


def registry_folder() -> Path:
    """$BATCHPILOT_POLICIES, or ~/.local/share/batchpilot/policies."""
    chosen = os.environ.get(REGISTRY_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path.home() / ".local" / "share" / "batchpilot" / "policies"


@dataclass(frozen=True)
class Event:
    """Something that was done to what is in force.

    Attributes:
        what: `promote` or `rollback`.
        version: In force since then.
        at: UTC, such as 2026-01-31T12:00:00Z.
        note: Why, such as the gate's verdict.
    """

    what: str
    version: str
    at: str
    note: str = ""


@dataclass(frozen=True)
class Pointer:
    """What is in force for a group, and what was.

    Attributes:
        stack: Versions in the order they were promoted; the last is in force, a rollback takes it
            off.
        events: Everything that was done, oldest first.
    """

    stack: tuple[str, ...] = ()
    events: tuple[Event, ...] = field(default=())

    @property
    def version(self) -> str | None:
        """The version in force; None where there is none."""
        return self.stack[-1] if self.stack else None

    def with_event(self, stack: tuple[str, ...], event: Event) -> Pointer:
        """After something was done."""
        return Pointer(stack[-_KEPT_EVENTS:], (*self.events, event)[-_KEPT_EVENTS:])


class PolicyRegistry:
    """Trained policies by name and version.

    Any number of processes may read and write one folder at once.

    Args:
        folder: Where they are; None takes `registry_folder()`. Made when the first is added.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Names the folder."""
        self.folder = folder or registry_folder()

    def names(self) -> tuple[str, ...]:
        """Every policy that has a version, in alphabetical order."""
        return tuple(name for name in _subfolders(self.folder) if self.versions(name))

    def versions(self, name: str) -> tuple[str, ...]:
        """A policy's versions, in natural order: 2 before 10."""
        check_name(name, what="policy name")
        return tuple(sorted(_subfolders(self.folder / name), key=_natural))

    def add(self, source: Path) -> Artefact:
        """Copies a policy's folder in, under the name and version of its manifest.

        Raises:
            ArtefactError: It cannot be used, the version is there already, or it cannot be written.
        """
        read = load_artefact(source)
        return write_artefact(self._path(read.manifest.name, read.manifest.version), *_parts(read))

    def load(self, name: str, version: str) -> Artefact:
        """Reads a version and checks it again.

        Raises:
            ArtefactError: It is not there or cannot be used.
        """
        path = self._path(name, version)
        if not path.is_dir():
            known = ", ".join(self.versions(name)) or "none"
            raise ArtefactError(
                f"no version {version!r} of policy {name!r} in {self.folder}; there: {known}"
            )
        artefact = load_artefact(path)
        if (artefact.manifest.name, artefact.manifest.version) != (name, version):
            raise ArtefactError(f"policy {path}: its manifest says {artefact.label}")
        return artefact

    def load_current(self, name: str, group: str = DEFAULT_GROUP) -> Artefact:
        """Reads the version in force.

        Raises:
            ArtefactError: There is none, or it cannot be used.
        """
        version = self.pointer(name, group).version
        if version is None:
            known = ", ".join(self.versions(name)) or "none"
            raise ArtefactError(
                f"no version of policy {name!r} is promoted for group {group!r} in {self.folder} "
                f"(versions there: {known}); promote one, or name it: {name}@VERSION"
            )
        return self.load(name, version)

    def resolve(self, text: str, group: str = DEFAULT_GROUP) -> Artefact:
        """Finds a policy by NAME, NAME@VERSION, or the path of a folder.

        A text with a slash, or one that begins with a dot, is a path.

        Raises:
            ArtefactError: There is none, or it cannot be used.
        """
        if "/" in text or text.startswith((".", "~")):
            return load_artefact(Path(text).expanduser())
        name, at, version = text.partition("@")
        return self.load(name, version) if at else self.load_current(name, group)

    def pointer(self, name: str, group: str = DEFAULT_GROUP) -> Pointer:
        """What is in force for a group, and what was.

        Raises:
            ArtefactError: Its file is damaged.
        """
        path = self._pointer_path(name, group)
        try:
            with path.open("rb") as file:
                text = file.read(_LARGEST_POINTER_BYTES)
        except FileNotFoundError:
            return Pointer()
        except OSError as error:
            raise ArtefactError(f"cannot read {path}: {error.strerror}") from None
        return _parse_pointer(text, str(path))

    def groups(self, name: str) -> tuple[str, ...]:
        """The groups for which a version was ever promoted."""
        check_name(name, what="policy name")
        folder = self.folder / name / _CURRENT
        found = folder.glob("*.json") if folder.is_dir() else ()
        return tuple(sorted(path.stem for path in found if not path.name.startswith(".")))

    def promote(
        self, name: str, version: str, group: str = DEFAULT_GROUP, *, note: str = ""
    ) -> Pointer:
        """Puts a version in force, from the next load on.

        Raises:
            ArtefactError: It is not there or cannot be used.
        """
        self.load(name, version)
        with self._locked(name):
            pointer = self.pointer(name, group)
            # Promoting what is in force anew is recorded, but is no step to roll back.
            stack = pointer.stack if pointer.version == version else (*pointer.stack, version)
            return self._point(name, group, pointer, stack, Event("promote", version, "", note))

    def rollback(self, name: str, group: str = DEFAULT_GROUP, *, note: str = "") -> Pointer:
        """Puts the version before the newest promotion back in force.

        Raises:
            ArtefactError: There is none, or it cannot be used.
        """
        with self._locked(name):
            pointer = self.pointer(name, group)
            if len(pointer.stack) < 2:
                raise ArtefactError(
                    f"nothing to roll back to: policy {name!r} has {len(pointer.stack)} promoted "
                    f"version(s) for group {group!r}; to go back to an analytic policy, name it "
                    f"where learned:{name} is named"
                )
            stack = pointer.stack[:-1]
            self.load(name, stack[-1])
            return self._point(name, group, pointer, stack, Event("rollback", stack[-1], "", note))

    def _point(
        self, name: str, group: str, pointer: Pointer, stack: tuple[str, ...], event: Event
    ) -> Pointer:
        stamped = Event(event.what, event.version, utc_now(), event.note)
        changed = pointer.with_event(stack, stamped)
        _write_text(self._pointer_path(name, group), _pointer_text(changed))
        return changed

    def _path(self, name: str, version: str) -> Path:
        check_name(name, what="policy name")
        return self.folder / name / check_name(version, what="policy version")

    def _pointer_path(self, name: str, group: str) -> Path:
        check_name(name, what="policy name")
        return self.folder / name / _CURRENT / f"{check_name(group, what='group')}.json"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds a policy's pointers, also against other processes."""
        try:
            folder = self.folder / name / _CURRENT
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise ArtefactError(f"cannot write {self.folder}: {error.strerror or error}") from None


def _parts(artefact: Artefact) -> tuple[Any, bytes]:
    return artefact.manifest, artefact.onnx


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _natural(version: str) -> list[tuple[int, int, str]]:
    """A key that orders numbers inside a version by value."""
    parts: list[str] = []
    for character in version:
        if parts and parts[-1].isdigit() == character.isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _parse_pointer(text: bytes, where: str) -> Pointer:
    try:
        values = check_keys(parse_object(text, where=where), ("stack", "events"), where=where)
        stack = tuple(check_name(version, what="version") for version in values["stack"])
        keys = ("what", "version", "at", "note")
        events = (Event(**check_keys(event, keys, where=where)) for event in values["events"])
        return Pointer(stack, tuple(events))
    except (ConfigError, TypeError) as error:
        raise ArtefactError(f"{where} is damaged: {error}") from None


def _pointer_text(pointer: Pointer) -> str:
    values: Mapping[str, Any] = {
        "stack": list(pointer.stack),
        "events": [asdict(event) for event in pointer.events],
    }
    return json.dumps(values, indent=1) + "\n"


def _write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
