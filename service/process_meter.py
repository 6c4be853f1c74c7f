"""`batchpilot serve` as a process of its own, and what it takes of the machine."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

START_SECONDS = 60.0
STOP_SECONDS = 15.0
#: Of those that Linux gives to nobody who does not ask for them.
FREE_PORTS = (20_000, 32_768)


class ServiceProcess:
    """A service on a free port of this machine, from `with` to its end.

    Args:
        policy: What it decides by.
        arguments: Further ones of `batchpilot serve`.
        port: Where it listens; a free one when left out.
        cores: Those it runs on; any when left out.
    """

    def __init__(
        self,
        policy: str,
        *arguments: str,
        port: int | None = None,
        cores: frozenset[int] | None = None,
    ) -> None:
        """Chooses a port; starts nothing yet."""
        self.port = port or free_port()
        self.target = f"127.0.0.1:{self.port}"
        self._cores = cores
        self._arguments = ("--bind", self.target, "--policy", policy, *arguments)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Starts it and waits until it listens.

        Raises:
            RuntimeError: It ended, or does not listen in time; the text holds its log.
        """
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops it."""
        self.stop()

    def start(self) -> None:
        """Starts it and waits until it listens.

        Raises:
            RuntimeError: It ended, or does not listen in time; the text holds its log.
        """
        command = [sys.executable, "-m", "batchpilot", "serve", *self._arguments]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        if self._cores is not None:
            os.sched_setaffinity(self.process.pid, self._cores)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"{' '.join(command)} does not listen:\n{self.log()[-2000:]}")

    def stop(self) -> None:
        """Ends it the graceful way, and the hard way where that takes too long."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        if self.process is not None:
            self.process.send_signal(number)

    def log(self) -> str:
        """What it printed."""
        # Read at a position of its own: the process writes at the one that a seek would move.
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def cpu_seconds(self) -> float:
        """Processor time it has taken, all threads."""
        # After the name, which may hold anything: fields 14 and 15 of the line.
        fields = self._read("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_rss_mib(self) -> float:
        """Its memory at its largest."""
        match = re.search(r"VmHWM:\s+(\d+) kB", self._read("status"))
        return int(match[1]) / 1024 if match else 0.0

    @staticmethod
    def own_cpu_seconds() -> float:
        """Processor time of this process."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    def _read(self, name: str) -> str:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


def free_port() -> int:
    """A port that nothing listens on, and that nobody is given before it is used."""
    while True:
        port = random.randrange(*FREE_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
