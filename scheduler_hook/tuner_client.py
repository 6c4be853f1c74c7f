"""The engine's side of the tuning service: a thread, one stream at a time, and patience.

The engine's thread only ever calls `offer`, which appends to a queue and returns. Whatever happens
out here (no service, a slow one, nonsense, an exception in this very file) costs a lease, and then
the local policy decides.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.remote import LeaseHolder, printable
from batchpilot.scheduler_hook import tuner_channel
from batchpilot.scheduler_hook.remote import EngineReport

if TYPE_CHECKING:
    from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
    from batchpilot.scheduler_hook.settings import HookSettings
    from batchpilot.scheduler_hook.tuner_session import TunerSession

logger = logging.getLogger("vllm.batchpilot")

#: Reports that wait for the stream; what is older goes.
OUTBOX_REPORTS = 16
#: Until the service says how often it wants one.
FIRST_INTERVAL_SECONDS = 0.25
CLOSE_SECONDS = 2.0
#: A stream that lived for so long was a success.
LASTING_SECONDS = 10.0
#: How the service ends a stream when another session of its engine's name begins.
REPLACED = "ABORTED"
#: How streams end with a service that stops or dies.
GONE = "UNAVAILABLE"


@dataclass(slots=True)
class ClientStats:
    """Running totals; written by the client's threads, read by the reporter's.

    Attributes:
        connected: Whether a stream is welcome now.
        sessions: Streams that were welcomed.
        failures: Attempts and streams that ended, by gRPC status code.
        leases: Answers, by `accepted` or why they were refused.
        reports_sent: Reports that went out.
        reports_dropped: Reports that were never sent.
    """

    connected: bool = False
    sessions: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    leases: Counter[str] = field(default_factory=Counter)
    reports_sent: int = 0
    reports_dropped: int = 0


class Backoff:
    """How long to wait before the next attempt: doubling, capped, and never in step with others.

    Formula: min(longest, first 2^n), times a number between a half and one and a half.
    """

    def __init__(self, first_seconds: float = 0.2, longest_seconds: float = 10.0) -> None:
        """Starts with the shortest wait."""
        self._first = first_seconds
        self._longest = longest_seconds
        self._attempts = 0

    def reset(self) -> None:
        """After a success."""
        self._attempts = 0

    def next_seconds(self) -> float:
        """The next wait."""
        seconds = min(self._longest, self._first * 2.0 ** min(self._attempts, 32))
        self._attempts += 1
        return seconds * random.uniform(0.5, 1.5)


def has_worked(code: str, lived_seconds: float, leases: int) -> bool:
    """Whether a stream that has ended was a success, after which the next attempt comes soon.

    A service that restarts is sought at once, however short its stream was. One that sends the
    engine away soon, or for a namesake's sake at any time, would only do so again.

    Args:
        code: How it ended.
        lived_seconds: From its welcome to its end; 0 without a welcome.
        leases: Those it brought that were accepted; an idle engine is sent none.
    """
    lasted = lived_seconds >= LASTING_SECONDS
    if code == REPLACED:
        return False
    if code == GONE:
        return lasted or leases > 0
    return lasted and leases > 0


class TunerClient:
    """Keeps an engine's session with the service alive; implements `remote.Post`.

    Args:
        settings: Where the service is, and how often it may want reports.
        make_hello: The engine's first words.
        leases: Where what the service says is put in force.
        clock: Monotonic seconds, the one `RemotePolicy` reads.
        backoff: How long to wait between attempts.
    """

    def __init__(
        self,
        settings: HookSettings,
        make_hello: Callable[[], wire.EngineHello],
        leases: LeaseHolder,
        *,
        clock: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
    ) -> None:
        """Checks addresses and files; opens nothing.

        Raises:
            ConfigError: An address or a file that can never work.
        """
        tuner_channel.check(settings)
        self.settings = settings
        self.leases = leases
        self.clock = clock
        self.stats = ClientStats()
        self.interval_seconds = FIRST_INTERVAL_SECONDS
        self.wants_detail = False
        self.make_hello = make_hello
        self.policy_problem = ""
        self._service_itl_slo_ms: float | None = None
        self._backoff = backoff or Backoff()
        self._targets = tuner_channel.rotation(
            tuner_channel.parse_targets(settings.service_targets)
        )
        self._process: int | None = None
        self._last_failure: str | None = None
        self._silent_sessions = 0
        self._prepare()

    def _prepare(self) -> None:
        """What belongs to one process, and does not survive a fork."""
        self.outbox: deque[EngineReport] = deque(maxlen=OUTBOX_REPORTS)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._session: TunerSession | None = None
        self._welcomed_at: float | None = None
        self._welcome_told = False

    def start(self) -> None:
        """Starts the thread in this process; does nothing when it runs or has been closed.

        After a fork the parent's thread, stream and lease are the parent's: the child begins anew.
        """
        process = os.getpid()
        if process == self._process:
            return
        if self._process is not None:
            self._prepare()
            self.stats = ClientStats()
            self.leases.current = None
        self._process = process
        self._thread = threading.Thread(target=self._run, name="batchpilot-tuner", daemon=True)
        self._thread.start()

    def offer(self, report: EngineReport) -> None:
        """Queues a report, dropping the oldest where too many wait; never waits."""
        if len(self.outbox) >= OUTBOX_REPORTS:
            with suppress(IndexError):  # the sender was quicker
                self.outbox.popleft()
                self.stats.reports_dropped += 1
        self.outbox.append(report)
        session = self._session
        if session is not None:
            session.ring()

    def close(self) -> None:
        """Ends the stream and the thread; the lease in force ends by itself."""
        self._closing.set()
        session, thread = self._session, self._thread
        if session is not None:
            session.end()
        if thread is not None and self._process == os.getpid():
            thread.join(timeout=CLOSE_SECONDS)

    @property
    def patience_seconds(self) -> float:
        """How long a report may go without an answer before the stream is given up.

        At first no longer than the longest lease: a later answer could bring nothing any more, and
        another replica may live. Twice as long after each stream that said welcome and nothing
        else: a service whose policy has failed still wants the reports.
        """
        return float(self.leases.longest_seconds * 2 ** min(self._silent_sessions, 5))

    @property
    def itl_slo_seconds(self) -> float | None:
        """Steps longer than this are slow: the engine's own target, or else the service's."""
        target = self.settings.itl_slo_ms or self._service_itl_slo_ms
        return None if target is None else target / 1e3

    def welcomed(self, target: str, welcome: wire.Welcome) -> None:
        """The service says how to go on."""
        from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
        from batchpilot.scheduler_hook.tuner_wire import itl_target_ms

        asked = welcome.report_interval_ms / 1e3
        least = self.settings.service_min_report_seconds
        most = self.settings.service_max_report_seconds
        self.interval_seconds = min(max(asked, least), most) if asked else FIRST_INTERVAL_SECONDS
        self.wants_detail = welcome.detail == wire.DETAIL_STEPS
        self._service_itl_slo_ms = itl_target_ms(welcome)
        self.policy_problem = printable(welcome.problem)
        if not self.stats.connected:
            self.stats.connected = True
            self.stats.sessions += 1
            self._welcomed_at = self.clock()
            if not self._welcome_told:
                self._welcome_told = True
                logger.info(
                    "batchpilot follows the tuning service at %s: a report every %.2f s",
                    target,
                    self.interval_seconds,
                )

    def _run(self) -> None:
        while not self._closing.is_set():
            target = next(self._targets)
            self._welcomed_at, accepted_before = None, self.stats.leases["accepted"]
            try:
                why = self._attempt(target)
            except ConfigError as error:
                why = f"CONFIG: {error}"
            except Exception as error:
                logger.debug("batchpilot's session with %s broke", target, exc_info=True)
                why = f"INTERNAL: {type(error).__name__}: {error}"
            if self._closing.is_set():
                return
            leases = self.stats.leases["accepted"] - accepted_before
            if leases:
                self._silent_sessions = 0
            lived = 0.0 if self._welcomed_at is None else self.clock() - self._welcomed_at
            if has_worked(status_code(why), lived, leases):
                self._backoff.reset()
                self._last_failure = None
            self._lost(target, why)
            self._closing.wait(self._backoff.next_seconds())

    def _attempt(self, target: str) -> str:
        """One stream from its opening to its end; returns why it ended."""
        # gRPC is imported out here: the engine's thread has no time for it.
        from batchpilot.scheduler_hook.tuner_session import TunerSession

        channel = tuner_channel.open_channel(self.settings, target)
        try:
            session = self._session = TunerSession(self, target)
            if self._closing.is_set():
                return "closing"
            why = session.run(channel)
            self._silent_sessions += why.startswith("SILENT")
            return why
        finally:
            self._session = None
            self.stats.connected = False
            channel.close()

    def _lost(self, target: str, why: str) -> None:
        """Counts the failure; logs it once until a stream has worked or it is another."""
        code = status_code(why)
        self.stats.failures[code] += 1
        if code != self._last_failure:
            self._last_failure = code
            self._welcome_told = False
            remedy = "; another engine has this one's name: give each a service_engine of its own"
            logger.warning(
                "batchpilot has no tuning service at %s (%s); the local policy decides "
                "meanwhile, and it tries again%s",
                target,
                why,
                remedy if code == REPLACED else "",
            )


def status_code(why: str) -> str:
    """The code that an end's text begins with."""
    return why.partition(":")[0]
