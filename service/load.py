"""Many engines against one service: `python -m batchpilot.service.load`.

Starts `batchpilot serve` as a process of its own and opens one connection and one stream for each
engine, as a fleet does. Every engine reports at its own times, whether or not the last answer has
come, and runs as many sequences as its lease says. The service leaves reports unanswered that would
bring nothing new (see `Tune` in the contract); for the others a latency runs from the moment the
report was due to the moment its lease was there. It holds what the load generator itself takes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.cli import fast_loop
from batchpilot.service.load_engine import LoadEngine, hello
from batchpilot.service.load_stream import LoadStream
from batchpilot.service.process_meter import ServiceProcess

METHOD = "/batchpilot.v1.TunerService/Tune"
#: Streams opened at a time, so that opening them is not what is measured.
OPENING_AT_ONCE = 50
WELCOME_SECONDS = 30.0
#: Steady reporting before what is measured.
SETTLING_SECONDS = 5.0
KNEE_SECONDS = 0.1
KNEE_STEPS = (250, 500, 1000, 1500, 2000, 2500, 3000, 3500)


@dataclass(frozen=True)
class Load:
    """How much.

    Attributes:
        engines: Streams.
        reports_per_second: Of each.
        seconds: How long is measured, once all streams are open.
        policy: What the service decides by.
    """

    engines: int
    reports_per_second: float
    seconds: float
    policy: str


@dataclass
class Tally:
    """What the engines saw.

    Attributes:
        reports: Sent in the measured time.
        latencies: Seconds from due to answered, of each of them that was answered.
        expired: Times that an engine was without a lease.
        wrong: Answers without limits, or to no report.
        errors: Streams that ended, by how.
    """

    reports: int = 0
    latencies: list[float] = field(default_factory=list)
    expired: int = 0
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadResult:
    """One measurement.

    Attributes:
        load: What was asked for.
        reports: Reports sent.
        reports_per_second: Sent, over the measured time.
        answered: Share of the reports that were answered, 0 to 1.
        p50_ms: Median latency.
        p99_ms: Its 99th percentile.
        worst_ms: The longest.
        expired: Times that an engine was without a lease.
        errors: Streams that ended, and answers that were wrong.
        service_cpu_percent: Of one core.
        generator_cpu_percent: Of one core.
        service_rss_mib: The service's memory at its largest.
    """

    load: Load
    reports: int
    reports_per_second: float
    answered: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    expired: int
    errors: int
    service_cpu_percent: float
    generator_cpu_percent: float
    service_rss_mib: float


class Engine:
    """One engine's stream: reports at even times of its own, and follows the leases that come.

    Args:
        number: Which engine.
        fleet: Whose.
    """

    def __init__(self, number: int, fleet: Fleet) -> None:
        """Opens nothing yet."""
        self._fleet = fleet
        self._interval = 1.0 / fleet.load.reports_per_second
        self._number = number
        self._engine = LoadEngine(number, self._interval)
        self._loop = asyncio.get_running_loop()
        self._stream = LoadStream(fleet.target, METHOD, self._heard, self._ended)
        self._welcome: asyncio.Future[None] = self._loop.create_future()
        self._sequence = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._sent: deque[tuple[int, float]] = deque()  # reports that an answer may name, when due
        self._expires_at = math.inf  # of the lease in force; none is awaited before the first

    async def open(self) -> None:
        """Connects, says hello and waits for the welcome, or for the end of the stream."""
        host, _, port = self._fleet.target.rpartition(":")
        try:
            await self._loop.create_connection(lambda: self._stream, host, int(port))
        except OSError as error:
            self._ended(type(error).__name__)
            return
        self._stream.send(hello(self._number).SerializeToString())
        async with asyncio.timeout(WELCOME_SECONDS):
            await self._welcome

    def start(self) -> None:
        """Begins to report, at a moment of its own."""
        if self._stream.is_open:
            self._due = self._loop.time() + self._interval * ((self._number * 0.618) % 1.0)
            self._timer = self._loop.call_at(self._due, self._report)

    def close(self) -> None:
        """Hangs up; a lease that is over by then was dropped."""
        if self._timer is not None:
            self._timer.cancel()
        self._look_at_lease(self._loop.time())
        self._stream.close()

    def _report(self) -> None:
        now = self._loop.time()
        self._sequence += 1
        self._sent.append((self._sequence, self._due))
        remaining = self._expires_at - now if self._expires_at < math.inf else 0.0
        self._stream.send(self._engine.report(self._sequence, remaining).SerializeToString())
        self._fleet.note_report(self._due)
        self._due += self._interval
        self._timer = self._loop.call_at(self._due, self._report)

    def _heard(self, message: bytes) -> None:
        now, response = self._loop.time(), pb.TuneResponse.FromString(message)
        if response.HasField("welcome"):
            if not self._welcome.done():
                self._welcome.set_result(None)
            return
        lease, sent = response.lease, self._sent
        while sent and sent[0][0] < lease.sequence:  # went without an answer
            sent.popleft()
        if not sent or sent[0][0] != lease.sequence or not lease.limits.max_num_seqs:
            self._fleet.note_wrong()
            return
        _, due = sent.popleft()
        self._look_at_lease(now)
        self._expires_at = due + lease.lease_ms / 1e3
        self._engine.apply(lease.limits)
        self._fleet.note_answer(due, now)

    def _look_at_lease(self, now: float) -> None:
        if now >= self._expires_at:
            self._fleet.note_expired(now)

    def _ended(self, why: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._welcome.done():
            self._welcome.set_result(None)
        self._fleet.note_end(why)


class Fleet:
    """Engines that report to one address.

    Args:
        target: The service's address, `HOST:PORT`.
        load: How many, and how often.
    """

    def __init__(self, target: str, load: Load) -> None:
        """Opens nothing yet."""
        self.target = target
        self.load = load
        self.tally = Tally()
        self._begins_at = math.inf
        self._ends_at = math.inf

    async def run(self, service: ServiceProcess) -> LoadResult:
        """Opens every stream, then measures."""
        loop, load = asyncio.get_running_loop(), self.load
        engines = [Engine(number, self) for number in range(load.engines)]
        await self._open(engines)
        # What stands stays: searching it for garbage would hold up every engine at once.
        gc.collect()
        gc.freeze()
        for engine in engines:
            engine.start()
        self._begins_at = loop.time() + SETTLING_SECONDS
        self._ends_at = self._begins_at + load.seconds
        await asyncio.sleep(self._begins_at - loop.time())
        before = service.cpu_seconds(), ServiceProcess.own_cpu_seconds()
        await asyncio.sleep(load.seconds)
        after = service.cpu_seconds(), ServiceProcess.own_cpu_seconds()
        for engine in engines:
            engine.close()
        busy = tuple((b - a) / load.seconds * 100 for a, b in zip(before, after, strict=True))
        return _result(load, self.tally, busy, service.peak_rss_mib())

    async def _open(self, engines: Sequence[Engine]) -> None:
        opening = asyncio.Semaphore(OPENING_AT_ONCE)

        async def open_one(engine: Engine) -> None:
            async with opening:
                try:
                    await engine.open()
                except TimeoutError:
                    self.note_end("NO_WELCOME")

        await asyncio.gather(*(open_one(engine) for engine in engines))

    def note_report(self, due: float) -> None:
        """A report was sent."""
        self.tally.reports += self._begins_at <= due < self._ends_at

    def note_answer(self, due: float, now: float) -> None:
        """A lease was there."""
        if self._begins_at <= due < self._ends_at:
            self.tally.latencies.append(now - due)

    def note_expired(self, now: float) -> None:
        """An engine was without a lease for a while."""
        self.tally.expired += now >= self._begins_at

    def note_wrong(self) -> None:
        """An answer made no sense."""
        self.tally.wrong += 1

    def note_end(self, why: str) -> None:
        """A stream ended."""
        self.tally.errors[why] = self.tally.errors.get(why, 0) + 1


def _result(load: Load, tally: Tally, busy: Sequence[float], rss_mib: float) -> LoadResult:
    latencies = sorted(tally.latencies) or [math.inf]

    def quantile(share: float) -> float:
        return 1e3 * latencies[min(len(latencies) - 1, int(share * len(latencies)))]

    return LoadResult(
        load=load,
        reports=tally.reports,
        reports_per_second=tally.reports / load.seconds,
        answered=len(tally.latencies) / max(1, tally.reports),
        p50_ms=quantile(0.5),
        p99_ms=quantile(0.99),
        worst_ms=1e3 * latencies[-1],
        expired=tally.expired,
        errors=tally.wrong + sum(tally.errors.values()),
        service_cpu_percent=busy[0],
        generator_cpu_percent=busy[1],
        service_rss_mib=rss_mib,
    )


def measure(load: Load) -> LoadResult:
    """Starts a service, loads it and stops it."""
    with (
        ServiceProcess(load.policy) as service,
        asyncio.Runner(loop_factory=fast_loop()) as runner,
    ):
        return runner.run(_measure(service, load))


async def _measure(service: ServiceProcess, load: Load) -> LoadResult:
    return await Fleet(service.target, load).run(service)


def find_knee(load: Load, steps: Sequence[int] = KNEE_STEPS) -> list[LoadResult]:
    """Measures more and more engines until the 99th percentile passes 100 ms or something fails."""
    results = []
    for engines in steps:
        results.append(measure(Load(engines, load.reports_per_second, load.seconds, load.policy)))
        print_table(results[-1:], heading=len(results) == 1)
        if results[-1].p99_ms > 1e3 * KNEE_SECONDS or results[-1].errors:
            break
    return results


COLUMNS = (
    ("engines", lambda r: r.load.engines),
    ("reports/s", lambda r: f"{r.reports_per_second:.0f}"),
    ("answered %", lambda r: f"{100 * r.answered:.0f}"),
    ("p50 ms", lambda r: f"{r.p50_ms:.1f}"),
    ("p99 ms", lambda r: f"{r.p99_ms:.1f}"),
    ("worst ms", lambda r: f"{r.worst_ms:.0f}"),
    ("expired", lambda r: r.expired),
    ("errors", lambda r: r.errors),
    ("service CPU %", lambda r: f"{r.service_cpu_percent:.0f}"),
    ("generator CPU %", lambda r: f"{r.generator_cpu_percent:.0f}"),
    ("service MiB", lambda r: f"{r.service_rss_mib:.0f}"),
)


def print_table(results: Sequence[LoadResult], *, heading: bool = True) -> None:
    """Prints a line for each measurement."""
    if heading:
        print("  ".join(name for name, _ in COLUMNS))
    for result in results:
        print("  ".join(f"{value(result)!s:>{len(name)}}" for name, value in COLUMNS), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 where a stream failed or a lease came too late."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=1000, help="streams (default 1000)")
    parser.add_argument("--reports-per-second", type=float, default=4.0, help="each (default 4)")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured (default 60)")
    parser.add_argument("--policy", default="memory+sla", help="of the service")
    parser.add_argument(
        "--knee", action="store_true", help="go up in engines until p99 passes 100 ms"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    load = Load(args.engines, args.reports_per_second, args.seconds, args.policy)
    results = find_knee(load) if args.knee else [measure(load)]
    if not args.knee:
        print_table(results)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2))
    return int(not args.knee and any(result.errors or result.expired for result in results))


if __name__ == "__main__":
    sys.exit(main())
