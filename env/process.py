"""Processes: what one needs before torch or vLLM is imported in it, and pools of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

#: Exit status of a worker whose parent has ended.
ORPHANED = 1


def prepare_process() -> None:
    """Sets what those libraries read from the environment; the user's own choices win.

    Threads that spin while they wait make vLLM crawl, ten times slower and more, on a CPU that
    others use too; threads that sleep cost a little on one that is idle. And nothing here needs a
    model hub.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def worker_pool(
    workers: int, prepare: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes for work that takes minutes; none outlives the block, or this process.

    Ctrl-C reaches every process of a terminal, and the parent decides what it means. Where the
    block is left by an exception the processes end at once: what they still do, nobody waits for.
    A SIGTERM that nobody else handles is such an exception, a KeyboardInterrupt.

    Args:
        workers: How many.
        prepare: Called first in each of them.
        arguments: Of that call; they are sent there.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(prepare, arguments),
    )
    try:
        with _interrupted_by_sigterm():
            yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _start_worker(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def _end_with_parent() -> None:
    """Ends this process as soon as its parent has ended, be it by a signal that nobody handles."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(ORPHANED)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        raise KeyboardInterrupt(f"signal {number}")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
