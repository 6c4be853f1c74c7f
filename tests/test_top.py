"""`batchpilot top`: what the rows say, and that it finds, loses and finds its service again."""

import argparse
import json
import os
import pty
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console
from tuner_double import until

from batchpilot.__main__ import main
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service import top
from batchpilot.service.load_engine import LoadEngine, hello
from batchpilot.service.process_meter import ServiceProcess
from batchpilot.service.top_view import COLUMNS, ORDERS, Board, column_widths, view


def status(name="a", *, waiting=4, age_ms=250, **more):
    window = pb.TelemetryWindow(
        seconds=0.5, decode_tokens=500, decode_seconds=15.0, running=10, waiting=waiting
    )
    window.used_blocks = 19_000
    fields = {
        "id": pb.EngineId(group="chat", engine=name),
        "hello": pb.EngineHello(
            model_name="a-model", facts=pb.EngineFacts(total_blocks=20_000), itl_slo_ms=25.0
        ),
        "window": window,
        "binding": pb.BINDING_MAX_NUM_SEQS,
        "applied_limits": pb.BatchLimits(max_num_seqs=10, max_num_batched_tokens=2048),
        "source": "remote",
        "lease": pb.LimitsLease(lease_ms=2000, policy="memory+sla"),
        "report_age_ms": age_ms,
        "lease_age_ms": age_ms,
    }
    return pb.EngineStatus(**fields | more)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def board(*statuses):
    clock = Clock()
    shown = Board(clock)
    shown.take(pb.WatchEngineResponse(engines=statuses))
    return shown, clock


def text(rows, width=160, **more):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view(rows, target="localhost:1", state="connected", **more))
    return console.export_text()


def test_a_row_says_what_the_engine_reported_and_the_service_answered():
    shown, clock = board(status(lease_age_ms=750))  # the newest report went without an answer
    clock.now += 0.5
    (row,) = shown.rows()
    assert (row.engine, row.running, row.waiting) == ("chat/a/0", 10, 4)
    assert row.kv_cache_usage == 0.95
    assert (row.itl_ms, row.itl_slo_ms, row.tokens_per_second) == (30.0, 25.0, 1000.0)
    assert (row.max_num_seqs, row.binding, row.source) == (10, "max_num_seqs", "remote")
    assert row.report_seconds == 0.75
    assert row.lease_seconds == 0.75
    clock.now += 60
    assert shown.rows()[0].lease_seconds == 0.0


def test_what_is_not_known_is_not_made_up():
    shown, _ = board(pb.EngineStatus(id=pb.EngineId(group="g", engine="new")))
    (row,) = shown.rows()
    assert (row.itl_ms, row.itl_slo_ms, row.lease_seconds) == (None, None, None)
    assert "-/-" in text([row])


def test_the_target_in_force_is_shown_and_an_older_service_tells_the_engine_s_own():
    lent = status("a", hello=pb.EngineHello(), itl_slo_ms=50.0)
    shown, _ = board(lent, status("b"), status("c", itl_slo_ms=25.0))
    assert [row.itl_slo_ms for row in shown.rows()] == [50.0, 25.0, 25.0]
    assert "30.0/50" in text(shown.rows())


def test_engines_come_change_and_go():
    shown, _ = board(status("a"), status("b"))
    shown.take(pb.WatchEngineResponse(engines=[status("a", waiting=99)]))
    assert [(row.engine, row.waiting) for row in shown.rows()] == [
        ("chat/a/0", 99),
        ("chat/b/0", 4),
    ]
    shown.take(pb.WatchEngineResponse(gone=[pb.EngineId(group="chat", engine="a")]))
    assert [row.engine for row in shown.rows()] == ["chat/b/0"]


def test_the_screen_holds_a_line_for_each_engine_and_names_problems():
    shown, _ = board(status("a"), status("b", problem="itl_slo_ms is required", source="fallback"))
    screen = text(shown.rows())
    assert "2 engines, 20 running, 8 waiting, 2,000 tok/s" in screen
    assert "chat/a/0" in screen
    assert "95 %" in screen
    assert "30.0/25" in screen
    assert "chat/b/0: no lease: itl_slo_ms is required" in screen


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_shows_every_engine(order):
    shown, _ = board(status("a"), status("b", waiting=9, age_ms=900))
    screen = text(shown.rows(), order=order)
    assert ("chat/b" in screen, "chat/a" in screen) == (True, True)
    first = screen.index("chat/b") < screen.index("chat/a")
    assert first == (order in ("waiting", "report age"))


def test_markup_in_a_name_is_shown_not_obeyed():
    shown, _ = board(status("[red]x"))
    assert "chat/[red]x/0" in text(shown.rows())


LONG = "vm-with-a-long-name:17086:f26836"
WHOLE = {
    "RUN": "10",
    "WAIT": "1200",
    "KV": "95 %",
    "ITL/TARGET ms": "30.0/25",
    "TOK/S": "1,000",
    "SEQS": "10",
    "TOKENS": "2048",
    "BINDS": "seqs",
    "SOURCE": "remote",
    "POLICY": "memory-clt:memory_overflow_probability=0.001",
    "LEASE": "1.8",
    "AGE": "0.2",
}


@pytest.mark.parametrize(
    ("width", "last"),
    [(30, "WAIT"), (60, "TOK/S"), (80, "BINDS"), (100, "SOURCE"), (120, "AGE"), (200, "AGE")],
)
def test_a_narrow_screen_shortens_names_and_drops_columns_but_cuts_no_number_off(width, last):
    lease = pb.LimitsLease(lease_ms=2000, policy=WHOLE["POLICY"])
    long = status(id=pb.EngineId(group="default", engine=LONG), waiting=1200, lease=lease)
    shown, _ = board(long, status())
    screen = text(shown.rows(), width=width).splitlines()
    assert max(map(len, screen)) <= width
    names = COLUMNS[: COLUMNS.index(last) + 1]
    (at,) = (i for i, line in enumerate(screen) if line.startswith("ENGINE"))
    assert screen[at].split() == " ".join(names).split()
    engine, *cells = screen[at + 2].replace(" %", "_%").split()
    assert f"default/{LONG}/0".startswith(engine.removesuffix("…"))
    for name, cell in zip(names[1:], cells, strict=True):
        whole = WHOLE[name].replace(" ", "_")
        assert cell == whole or (name == "POLICY" and whole.startswith(cell.removesuffix("…")))


@pytest.mark.parametrize(
    ("space", "widths"),
    [
        (57, {"ENGINE": 30, "RUN": 3, "POLICY": 18}),
        (56, {"ENGINE": 30, "RUN": 3, "POLICY": 17}),
        (54, {"ENGINE": 29, "RUN": 3, "POLICY": 16}),
        (41, {"ENGINE": 16, "RUN": 3, "POLICY": 16}),
        (40, {"ENGINE": 30, "RUN": 3}),
        (22, {"ENGINE": 20}),
        (3, {"ENGINE": 16}),
    ],
)
def test_names_are_shortened_before_columns_go(space, widths):
    assert column_widths({"ENGINE": 30, "RUN": 3, "POLICY": 18}, space) == widths


@pytest.fixture(scope="module")
def service():
    with ServiceProcess("memory") as service:
        yield service


@pytest.fixture
def engine(service):
    """An engine's session on the service, with one report."""
    import queue

    import grpc

    from batchpilot.protos.batchpilot.v1.tuner_pb2_grpc import TunerServiceStub

    outbox = queue.SimpleQueue()
    outbox.put(hello(3))
    outbox.put(LoadEngine(3, 0.25).report(1))
    with grpc.insecure_channel(service.target) as channel:
        call = TunerServiceStub(channel).Tune(iter(outbox.get, None))
        assert next(call).HasField("welcome")
        assert next(call).HasField("lease")
        yield
        outbox.put(None)
        call.cancel()


def test_once_prints_the_engines_and_ends(service, engine, capsys):
    assert main(["top", "--target", service.target, "--once"]) == 0
    printed = capsys.readouterr().out
    assert "1 engines, 117 running, 0 waiting" in printed
    assert "group-3/engine-3/0" in printed


def test_json_is_for_programs(service, engine, capsys):
    assert main(["top", "--target", service.target, "--once", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["engines"]
    assert (row["engine"], row["running"], row["binding"]) == (
        "group-3/engine-3/0",
        117,
        "none",
    )
    assert main(["top", "--target", service.target, "--once", "--json", "--group", "other"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"] == []


def test_into_a_pipe_it_prints_the_rows_once_an_interval(service, engine):
    command = [sys.executable, "-m", "batchpilot", "top", "--target", service.target]
    process = subprocess.Popen(
        [*command, "--interval", "0.1"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        engines = (line for line in process.stdout if line.startswith("group-3/engine-3/0"))
        assert [next(engines).split()[1] for _ in range(3)] == ["117"] * 3
        assert process.poll() is None
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("once", [True, False])
def test_a_dumb_terminal_is_as_a_pipe(service, engine, once):
    hand, screen = pty.openpty()
    command = [sys.executable, "-m", "batchpilot", "top", "--target", service.target]
    command += ["--once"] if once else ["--interval", "0.1"]
    process = subprocess.Popen(
        command, stdin=screen, stdout=screen, env={**os.environ, "TERM": "dumb"}
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    os.close(screen)
    try:
        with os.fdopen(hand, encoding="utf-8") as printed:
            lines = (line.split() for line in printed if line.startswith("group-3/engine-3/0"))
            for _ in range(1 if once else 3):
                assert len(next(lines)) == len(COLUMNS) + 1  # the space in KV's 9 %
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


@pytest.fixture
def terminal(monkeypatch):
    """Types into what `top` takes for its keyboard."""
    hand, keyboard = pty.openpty()
    with os.fdopen(keyboard, "r", closefd=True) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda keys: os.write(hand, keys)
    os.close(hand)


@pytest.mark.parametrize("quits", [b"q", b"\x1b"])
def test_only_keys_that_mean_it_quit(terminal, quits):
    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    args = parser.parse_args([])
    ended = threading.Thread(target=top._live, args=(top.Watcher(args), args), daemon=True)
    ended.start()
    for keys in (b"\x1b[A", b"\x1bOB", b"\x1b[15~", b"sx\xc3\xa4"):
        terminal(keys)
        time.sleep(0.2)
        assert ended.is_alive()
    terminal(quits)
    ended.join(timeout=10)
    assert not ended.is_alive()


def test_no_service_is_said_in_a_line(capsys):
    assert main(["top", "--target", "localhost:1", "--once"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--interval", "0"], "--interval=0.0 must be greater than 0"),
        (["--interval", "nan"], "--interval=nan must be greater than 0"),
        (["--cert-file", "x"], "--cert-file and --key-file go together"),
        (["--token-file", "/nowhere/token"], "/nowhere/token: cannot be read (No such file"),
    ],
)
def test_what_cannot_work_is_refused(options, message, capsys):
    assert main(["top", "--once", *options]) == 2
    assert message in capsys.readouterr().err


def test_it_reconnects_by_itself():
    service = ServiceProcess("memory")
    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    args = parser.parse_args(["--target", service.target, "--interval", "0.2"])
    watcher = top.Watcher(args)
    watcher.start()
    try:
        assert until(lambda: "UNAVAILABLE" in watcher.board.state)
        for _ in range(2):
            service.start()
            assert until(lambda: watcher.board.state == "connected")
            service.kill()
            assert until(lambda: watcher.board.state != "connected")
    finally:
        watcher.close()
        service.kill()
