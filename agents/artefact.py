"""A trained policy on disk: a folder with `policy.onnx` and `manifest.json`, and nothing else.

It is read once, as bytes: what was hashed and examined is what runs, whatever happens to the files
meanwhile. Nothing in it is ever unpickled, imported or followed to another file.

The network takes `observation`, float32 of shape (1, n) (or an open first size), and gives
`action`, float32 of shape (1, m); one with a memory also takes `state` and gives `next_state`,
both (1, state_size).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batchpilot.agents.manifest import ArtefactError, Manifest, parse_manifest
from batchpilot.agents.onnx_reader import FLOAT32, OnnxContent, OnnxError, OnnxValue, read_onnx
from batchpilot.agents.parameters import ConfigError

ONNX_FILE = "policy.onnx"
MANIFEST_FILE = "manifest.json"
LARGEST_ONNX_BYTES = 16 * 2**20
LARGEST_MANIFEST_BYTES = 2**20


@dataclass(frozen=True)
class Artefact:
    """A policy whose files have been read and found whole.

    Attributes:
        manifest: What it is.
        onnx: The network's file.
        parameters: Numbers in the network.
        path: The folder it was read from; None before it is written.
    """

    manifest: Manifest
    onnx: bytes
    parameters: int
    path: Path | None = None

    @property
    def label(self) -> str:
        """NAME@VERSION."""
        return f"{self.manifest.name}@{self.manifest.version}"

    @property
    def fingerprint(self) -> str:
        """One name for all that decides what it does; another artefact has another."""
        sha = hashlib.sha256(self.onnx)
        sha.update(self.manifest.to_text().encode())
        return sha.hexdigest()


def sha256_hex(data: bytes) -> str:
    """SHA-256, as manifests write it."""
    return hashlib.sha256(data).hexdigest()


def utc_now() -> str:
    """The time, as manifests write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def make_artefact(manifest: Manifest, onnx: bytes, path: Path | None = None) -> Artefact:
    """Puts the two parts together, and checks that they belong together.

    Raises:
        ArtefactError: The network's hash is not the manifest's, its inputs or outputs have another
            shape, or it holds what a policy may not.
    """
    found = sha256_hex(onnx)
    if found != manifest.onnx_sha256:
        raise ArtefactError(
            f"{ONNX_FILE} has SHA-256 {found[:12]}..., the manifest says "
            f"{manifest.onnx_sha256[:12]}...: the file is damaged or was exchanged"
        )
    try:
        content = read_onnx(onnx)
    except OnnxError as error:
        raise ArtefactError(f"{ONNX_FILE}: {error}") from None
    _check_shapes(content, manifest)
    return Artefact(manifest, onnx, content.parameters, path)


def load_artefact(folder: Path) -> Artefact:
    """Reads a policy's folder.

    Raises:
        ArtefactError: A file is missing, too large, cut off, a link or damaged, or the policy is
            none that this batchpilot can run; the text names the folder and says which.
    """
    try:
        manifest = parse_manifest(_read_file(folder / MANIFEST_FILE, LARGEST_MANIFEST_BYTES))
        onnx = _read_file(folder / ONNX_FILE, LARGEST_ONNX_BYTES)
        return make_artefact(manifest, onnx, folder)
    except ConfigError as error:
        raise ArtefactError(f"policy {folder}: {error}") from None


def write_artefact(folder: Path, manifest: Manifest, onnx: bytes) -> Artefact:
    """Writes a policy's folder, whole or not at all.

    Args:
        folder: Must not exist; its parents are made.
        manifest: Its `onnx_sha256` must be that of `onnx`.
        onnx: The network's file.

    Raises:
        ArtefactError: The folder exists, the parts do not belong together, or it cannot be written.
    """
    artefact = make_artefact(manifest, onnx, folder)

    def fill(unfinished: Path) -> None:
        (unfinished / ONNX_FILE).write_bytes(onnx)
        (unfinished / MANIFEST_FILE).write_text(manifest.to_text(), encoding="utf-8")

    write_folder(folder, fill)
    return artefact


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder that is either whole or absent, also after a power cut.

    Raises:
        ArtefactError: It exists, or cannot be written.
    """
    if folder.exists():
        raise ArtefactError(f"{folder} exists: a version is never overwritten; choose another")
    unfinished: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        fill(unfinished)
        unfinished.chmod(0o755)
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        unfinished.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise ArtefactError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: Path) -> None:
    """Forces a file or a folder's list of files to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_file(path: Path, most_bytes: int) -> bytes:
    """A regular file's content; never follows a link, never waits for a pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ArtefactError(f"cannot read {path.name}: {reason}") from None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ArtefactError(f"{path.name} is not a regular file")
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ArtefactError(f"{path.name} is larger than {most_bytes:,} bytes")
    return data


def _check_shapes(content: OnnxContent, manifest: Manifest) -> None:
    """Raises where the network takes or gives anything else than the manifest says."""
    inputs = {"observation": manifest.observation_size}
    outputs = {"action": manifest.action.output_size}
    if manifest.state_size:
        inputs["state"] = outputs["next_state"] = manifest.state_size
    _check_values("inputs", content.inputs, inputs)
    _check_values("outputs", content.outputs, outputs)


def _check_values(what: str, found: tuple[OnnxValue, ...], expected: dict[str, int]) -> None:
    fits = {value.name for value in found} == set(expected) and len(found) == len(expected)
    for value in found:
        size = expected.get(value.name)
        rows = value.shape[0] if len(value.shape) == 2 else 0
        fits &= value.data_type == FLOAT32 and rows in (None, 1) and value.shape[-1:] == (size,)
    if not fits:
        wanted = ", ".join(f"{name} float32 (1, {size})" for name, size in expected.items())
        seen = ", ".join(f"{v.name} type {v.data_type} {v.shape}" for v in found) or "none"
        raise ArtefactError(f"{ONNX_FILE}: its {what} are {seen}; they must be {wanted}")
