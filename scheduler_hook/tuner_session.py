"""One stream to the tuning service, from the hello to its end.

gRPC reads the requests from `_requests` in a thread of its own; answers arrive in the client's.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc

from batchpilot.agents.remote import LeaseSession, printable
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
from batchpilot.protos.batchpilot.v1.tuner_pb2_grpc import TunerServiceStub
from batchpilot.scheduler_hook import tuner_channel, tuner_wire
from batchpilot.scheduler_hook.remote import EngineReport

if TYPE_CHECKING:
    from batchpilot.scheduler_hook.tuner_client import TunerClient

logger = logging.getLogger("vllm.batchpilot")

#: How often a sender with nothing to send looks whether the stream still lives.
LOOK_SECONDS = 0.25
#: A service that has not said a word by then is given up.
WELCOME_SECONDS = 5.0
#: Steps of the reports that are sent as one after an outage; the service takes no more than 20,000.
MOST_JOINED_STEPS = 16_384


class TunerSession:
    """A stream to one address.

    Args:
        client: Whose reports it takes and whose leases it brings.
        target: The address.
    """

    def __init__(self, client: TunerClient, target: str) -> None:
        """Starts counting reports; sends nothing yet."""
        self._client = client
        self._target = target
        self._leases: LeaseSession = client.leases.open_session()
        self._opened_at = client.clock()
        self._welcome = threading.Event()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._over = False
        self._why = ""
        self._dropped_told = 0
        self._call: Any = None

    def run(self, channel: Any) -> str:
        """Sends reports and takes answers until the stream ends; returns why it did."""
        stub = TunerServiceStub(channel)
        metadata = tuner_channel.call_metadata(self._client.settings)
        try:
            self._call = stub.Tune(self._requests(), metadata=metadata)
            for response in self._call:
                self.take(response)
            return self._why or "ENDED: the service ended the stream"
        except grpc.RpcError as error:
            return self._why or f"{error.code().name}: {printable(error.details() or '')}"
        finally:
            self.end()

    def end(self, why: str = "") -> None:
        """Ends the stream, from whichever thread."""
        self._why = self._why or why
        self._over = True
        self._welcome.set()
        self.ring()
        if self._call is not None:
            self._call.cancel()

    def ring(self) -> None:
        """Wakes the sender, from whichever thread; never waits."""
        if self._bell.empty():  # one ring tells of all that came before it
            self._bell.put(None)

    def take(self, response: wire.TuneResponse) -> None:
        """One message of the service's: checked, and counted whatever it was."""
        kind = response.WhichOneof("kind")
        if kind == "welcome":
            self._client.welcomed(self._target, response.welcome)
            self._welcome.set()  # lets reports go, which are counted as it says
        elif kind == "lease":
            offer = tuner_wire.lease_offer(response.lease)
            refusal = self._leases.accept(offer, self._client.clock())
            self._client.stats.leases[refusal or "accepted"] += 1
        else:
            self._client.stats.leases["empty"] += 1

    def _requests(self) -> Iterator[wire.TuneRequest]:
        """What the engine says: a hello, then reports as they come."""
        try:
            yield wire.TuneRequest(hello=self._client.make_hello())
            while not self._over:
                self._wait()
                late = self._what_is_late()
                if late:
                    self.end(late)
                report = self._waiting_reports()
                if report is not None:
                    yield wire.TuneRequest(report=self._message(report))
        except Exception as error:
            logger.debug("batchpilot could not say what it had to", exc_info=True)
            self.end(f"INTERNAL: {type(error).__name__}: {error}")

    def _wait(self) -> None:
        """Until there may be something to say, or a while without."""
        if not self._welcome.wait(LOOK_SECONDS) or self._client.outbox:
            return
        with suppress(queue.Empty):
            self._bell.get(timeout=LOOK_SECONDS)

    def _waiting_reports(self) -> EngineReport | None:
        """All that wait, as one; None without any or without a welcome.

        What would be more than `MOST_JOINED_STEPS` is left to the next message, and once the stream
        is over all of it to the next stream.
        """
        if not self._welcome.is_set() or self._over:
            return None
        waiting: list[EngineReport] = []
        outbox, steps = self._client.outbox, 0
        with suppress(IndexError):  # the engine's thread drops the oldest of a full outbox
            while steps + len(outbox[0].steps) <= MOST_JOINED_STEPS or not waiting:
                waiting.append(outbox.popleft())
                steps += len(waiting[-1].steps)
        return tuner_wire.joined(waiting) if waiting else None

    def _what_is_late(self) -> str:
        """Why the stream is of no use any more; empty while it is."""
        now = self._client.clock()
        if not self._welcome.is_set():
            return "SILENT: no welcome" if now - self._opened_at > WELCOME_SECONDS else ""
        since = self._leases.unanswered_since()
        if since is not None and now - since > self._client.patience_seconds:
            why = self._client.policy_problem
            told = f"; the service says: {why}" if why else ""
            return f"SILENT: no answer to a report in {now - since:.1f} s{told}"
        return ""

    def _message(self, report: EngineReport) -> wire.Report:
        client = self._client
        now, lease = client.clock(), client.leases.current
        dropped, self._dropped_told = (
            client.stats.reports_dropped - self._dropped_told,
            client.stats.reports_dropped,
        )
        remaining = lease.expires_at - now if lease is not None else 0.0
        client.stats.reports_sent += 1
        return tuner_wire.report_message(
            report,
            tuner_wire.ReportFacts(
                sequence=self._leases.sending(now),
                dropped_reports=dropped,
                lease_remaining_seconds=remaining if remaining > 0 else None,
                itl_slo_seconds=client.itl_slo_seconds,
            ),
        )
