"""Folders that are either whole or absent: built once, under a lock, beside their final place."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from batchpilot.agents.parameters import ConfigError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "BATCHPILOT_CACHE"
_MIB = 2**20


def cache_folder() -> Path:
    """Where models are kept: $BATCHPILOT_CACHE, or ~/.cache/batchpilot."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "batchpilot"


def build_once(target: Path, build: Callable[[Path], None], *, needed_bytes: int) -> Path:
    """Makes sure that a folder is there, building it where it is not.

    Two processes may ask at once: one builds, the other waits for it. What a killed build left
    behind is never taken for the folder, and goes when the next build starts.

    Args:
        target: The folder; its parents are made.
        build: Fills the empty folder it is given, which then takes the target's name.
        needed_bytes: Disk space the folder takes.

    Returns:
        `target`.

    Raises:
        ConfigError: Too little disk space, or a folder that cannot be written.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.parent / f".{target.name}.lock"):
            if not target.is_dir():
                _remove_leftovers(target)
                _check_space(target.parent, needed_bytes)
                _build_and_rename(target, build)
    except OSError as error:
        raise ConfigError(
            f"cannot build {target}: {error}; ${CACHE_VARIABLE} chooses another folder"
        ) from error
    return target


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    """Holds a file lock, which the system drops by itself when its holder dies."""
    with lock_file.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that holds %s", lock_file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unfinished_prefix(target: Path) -> str:
    return f".{target.name}.unfinished-"


def _remove_leftovers(target: Path) -> None:
    """Removes what killed builds left; the lock says that nobody is building now."""
    for leftover in target.parent.glob(f"{_unfinished_prefix(target)}*"):
        logger.info("removing %s, left by a build that was cut off", leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ConfigError(
            f"{folder} has {free // _MIB} MiB free, {-(-needed_bytes // _MIB)} MiB are needed; "
            f"free some, or choose another folder with ${CACHE_VARIABLE}"
        )


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=_unfinished_prefix(target), dir=target.parent))
    try:
        build(unfinished)
        unfinished.chmod(0o755)
        _flush(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Forces every file to the disk: a power cut might keep the rename and lose what is in them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
