"""Watch a fleet of engines live: what runs and waits, and which limit binds.

Shows every engine that has a session with a tuning service, from its WatchEngine stream: sequences
running and waiting, KV cache, inter-token latency against its target, the limits in force and which
one binds, who decided them, and how much longer the lease runs. It reconnects by itself. Keys: q
quits, s changes the order. Into a file, a pipe or a dumb terminal it prints the rows once an
interval.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from rich.console import Console
from rich.live import Live

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1.tuner_pb2_grpc import TunerServiceStub
from batchpilot.service.connection import (
    ANSWER_SECONDS,
    add_connection_arguments,
    connection,
    said,
)
from batchpilot.service.top_view import ORDERS, Board, view

REFRESHES_PER_SECOND = 4
LONGEST_RETRY_SECONDS = 5.0
LONGEST_INTERVAL_SECONDS = 3600.0
ESCAPE = "\x1b"
QUITS = ("q", "\x03", ESCAPE)
#: What follows an escape so soon was sent with it, by an arrow or a function key.
SEQUENCE_SECONDS = 0.05
EXAMPLES = """\
examples:
  batchpilot top
  batchpilot top --target tuner.internal:50061 --ca-file ca.pem --token-file viewer.token
  batchpilot top --group chat --once --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_connection_arguments(parser)
    parser.add_argument("--group", default="", help="only this group's engines")
    parser.add_argument("--engine", default="", help="only this engine of the group")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between updates")
    parser.add_argument("--once", action="store_true", help="print the engines once and end")
    parser.add_argument("--json", action="store_true", help="JSON, a line for each message")
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    """Shows the engines until told to stop; 1 where there is no service to show.

    Raises:
        ConfigError: A file that cannot be read, or a combination that makes no sense.
    """
    if not 0 < args.interval <= LONGEST_INTERVAL_SECONDS:
        raise ConfigError(
            f"--interval={args.interval} must be greater than 0 and at most "
            f"{LONGEST_INTERVAL_SECONDS:g}"
        )
    watcher = Watcher(args)
    if args.once:
        return _once(watcher, args)
    watcher.start()
    try:
        if args.json:
            return _stream_json(watcher)
        return _live(watcher, args) if _has_screen() else _stream_rows(watcher, args)
    finally:
        watcher.close()


class Watcher:
    """Keeps a WatchEngine stream open in a thread of its own and its board up to date.

    Args:
        args: The command line's.

    Raises:
        ConfigError: A file that cannot be read.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Reads the files; opens nothing yet."""
        self.board = Board()
        self.changed = threading.Event()
        self._args = args
        with connection(args):
            pass  # what cannot work is said at once
        self._closing = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the stream and the thread."""
        self._closing.set()
        call = self._call
        if call is not None:
            call.cancel()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        retry = 0.5
        while not self._closing.is_set():
            try:
                if self._watch():
                    retry = 0.5
                self.board.state = "the service ended the stream"
            except grpc.RpcError as error:
                self.board.state = said(error, self._args)
            except ConfigError as error:
                self.board.state = str(error)
            self.changed.set()
            self._closing.wait(retry)
            retry = min(2 * retry, LONGEST_RETRY_SECONDS)

    def ask_once(self) -> None:
        """Fills the board by a single call.

        Raises:
            grpc.RpcError: The service does not answer or refuses.
        """
        args = self._args
        with connection(args) as (channel, metadata):
            answer = TunerServiceStub(channel).ListEngines(
                pb.ListEnginesRequest(group=args.group), metadata=metadata, timeout=ANSWER_SECONDS
            )
        engines = [e for e in answer.engines if args.engine in ("", e.id.engine)]
        self.board.take(pb.WatchEngineResponse(engines=engines))
        self.board.state = "connected"

    def _watch(self) -> bool:
        """One stream, to its end; whether it brought anything."""
        args, first = self._args, True
        request = pb.WatchEngineRequest(
            group=args.group, engine=args.engine, interval_ms=max(1, round(1e3 * args.interval))
        )
        with connection(args) as (channel, metadata):
            call = self._call = TunerServiceStub(channel).WatchEngine(request, metadata=metadata)
            for response in call:
                if first:
                    self.board.restart()
                    self.board.state, first = "connected", False
                self.board.take(response)
                self.changed.set()
        return not first


def _once(watcher: Watcher, args: argparse.Namespace) -> int:
    try:
        watcher.ask_once()
    except grpc.RpcError as error:
        print(f"batchpilot top: {args.target}: {said(error, args)}", file=sys.stderr)
        return 1
    if args.json:
        _print_json(watcher.board)
    else:
        _print_rows(watcher.board, args)
    return 0


def _stream_json(watcher: Watcher) -> int:
    while True:
        watcher.changed.wait()
        watcher.changed.clear()
        _print_json(watcher.board)


def _stream_rows(watcher: Watcher, args: argparse.Namespace) -> int:
    watcher.changed.wait()
    while True:
        _print_rows(watcher.board, args)
        time.sleep(args.interval)


def _has_screen() -> bool:
    """Whether the output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and not Console().is_dumb_terminal


def _print_rows(board: Board, args: argparse.Namespace) -> None:
    # A pipe has no width of its own; cutting names off there would help nobody. Rich heeds a width
    # on a dumb terminal only with a height.
    console = Console() if _has_screen() else Console(width=200, height=50)
    console.print(view(board.rows(), target=args.target, state=board.state))


def _print_json(board: Board) -> None:
    engines = [row._asdict() for row in board.rows()]
    print(json.dumps({"state": board.state, "engines": engines}), flush=True)


def _live(watcher: Watcher, args: argparse.Namespace) -> int:
    orders, order = list(ORDERS), 0
    board, console = watcher.board, Console()
    with (
        _keys() as read_key,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            shown = view(board.rows(), target=args.target, state=board.state, order=orders[order])
            live.update(shown, refresh=True)
            key = read_key(1 / REFRESHES_PER_SECOND)
            if key in QUITS:
                return 0
            if key == "s":
                order = (order + 1) % len(orders)


@contextmanager
def _keys() -> Iterator[Any]:
    """Reads keys from the terminal, one at a time; from nothing where there is none."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def read(count: int, seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, count).decode(errors="replace") if ready else ""

    def read_key(seconds: float) -> str:
        key = read(1, seconds)
        return key + read(16, SEQUENCE_SECONDS) if key == ESCAPE else key

    try:
        tty.setcbreak(descriptor)
        yield read_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""
