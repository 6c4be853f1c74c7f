"""Many engines against one service: `python -m batchpilot.service.load`.

Starts `batchpilot serve` as a process of its own and opens one connection and one stream for each
engine, as a fleet does. Every engine reports at its own times, whether or not the last answer has
come; a latency runs from the moment a report was due to the moment its lease was there, so that a
slow answer also counts for the reports it held up. It holds what the load generator itself takes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.cli import fast_loop
from batchpilot.service.process_meter import ServiceProcess

METHOD = "/batchpilot.v1.TunerService/Tune"
LEASE_SECONDS = 2.0
#: Streams opened at a time, so that opening them is not what is measured.
OPENING_AT_ONCE = 50
WELCOME_SECONDS = 30.0
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
        latencies: Seconds from due to answered, of every report in the measured time.
        expired: Answers that came when their lease was already over.
        wrong: Answers without limits, or to another report.
        errors: Streams that ended, by status code.
    """

    latencies: list[float] = field(default_factory=list)
    expired: int = 0
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadResult:
    """One measurement.

    Attributes:
        load: What was asked for.
        reports: Reports answered.
        reports_per_second: Answered, over the measured time.
        p50_ms: Median latency.
        p99_ms: Its 99th percentile.
        worst_ms: The longest.
        expired: Leases that were over when they came.
        errors: Streams that ended, and answers that were wrong.
        service_cpu_percent: Of one core.
        generator_cpu_percent: Of one core.
        service_rss_mib: The service's memory at its largest.
    """

    load: Load
    reports: int
    reports_per_second: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    expired: int
    errors: int
    service_cpu_percent: float
    generator_cpu_percent: float
    service_rss_mib: float


def hello(number: int) -> pb.TuneRequest:
    """An engine's first words: a 70B model's figures."""
    return pb.TuneRequest(
        hello=pb.EngineHello(
            id=pb.EngineId(group=f"group-{number % 4}", engine=f"engine-{number}"),
            facts=pb.EngineFacts(
                startup_limits=pb.BatchLimits(max_num_seqs=256, max_num_batched_tokens=8192),
                total_blocks=20_000,
                block_size=16,
                tokens_per_decode=1,
            ),
            model_name="load",
            vllm_version="0.32.0",
            batchpilot_version="load",
            itl_slo_ms=50.0,
            min_num_seqs=1,
            min_prefill_chunk=64,
        )
    )


def report(number: int, sequence: int, interval: float) -> pb.TuneRequest:
    """A busy engine's window; engines and windows differ a little."""
    running = 96 + (number * 7 + sequence * 5) % 128
    steps = max(1, round(interval / 0.03))
    decoded = steps * running
    return pb.TuneRequest(
        report=pb.Report(
            sequence=sequence,
            window=pb.TelemetryWindow(
                seconds=interval,
                steps=steps,
                busy_seconds=interval,
                slowest_step_seconds=0.045,
                decode_tokens=decoded,
                decode_seconds=decoded * 0.03,
                prefill_tokens=1500,
                running_seconds=running * interval,
                kv_token_seconds=running * 1200 * interval,
                peak_running=running + 3,
                peak_kv_tokens=running * 1250,
                arrived=2,
                arrived_prompt_tokens=1600,
                finished=2,
                finished_output_tokens=500,
                seqs_bound_steps=steps // 2,
                running=running,
                waiting=12,
                prefill_seqs=2,
                used_blocks=running * 75,
                limits=pb.BatchLimits(max_num_seqs=224, max_num_batched_tokens=8192),
            ),
            source="remote",
            binding=pb.BINDING_MAX_NUM_SEQS,
            lease_remaining_ms=1700,
            local_limits=pb.BatchLimits(max_num_seqs=200, max_num_batched_tokens=8192),
        )
    )


class Fleet:
    """Engines that report to one address.

    Args:
        target: The service's address.
        load: How many, and how often.
    """

    def __init__(self, target: str, load: Load) -> None:
        """Opens nothing yet."""
        self._target = target
        self._load = load
        self._opening = asyncio.Semaphore(OPENING_AT_ONCE)
        self._arrived = 0
        self._all_open = asyncio.Event()
        self._begins_at = math.inf
        self._ends_at = math.inf
        self.tally = Tally()

    async def run(self, service: ServiceProcess) -> LoadResult:
        """Opens every stream, then measures."""
        loop, load = asyncio.get_running_loop(), self._load
        engines = [asyncio.create_task(self._engine(number)) for number in range(load.engines)]
        await asyncio.wait_for(self._all_open.wait(), WELCOME_SECONDS + load.engines / 20)
        # What stands stays: searching it for garbage would hold up every engine at once.
        gc.collect()
        gc.freeze()
        self._begins_at = loop.time() + 2.0  # a moment of steady reporting first
        self._ends_at = self._begins_at + load.seconds
        await asyncio.sleep(self._begins_at - loop.time())
        before = service.cpu_seconds(), ServiceProcess.own_cpu_seconds()
        await asyncio.sleep(load.seconds)
        after = service.cpu_seconds(), ServiceProcess.own_cpu_seconds()
        await asyncio.wait(engines, timeout=LEASE_SECONDS + 1.0)
        missing = sum(not task.done() for task in engines)
        for task in engines:
            task.cancel()
        await asyncio.gather(*engines, return_exceptions=True)
        if missing:
            self.tally.errors["NO_ANSWER"] = missing
        busy = tuple((b - a) / load.seconds * 100 for a, b in zip(before, after, strict=True))
        return _result(load, self.tally, busy, service.peak_rss_mib())

    async def _engine(self, number: int) -> None:
        # The pool is its own, so that each engine has its own connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._target, options=options) as channel:
            tune = channel.stream_stream(
                METHOD,
                request_serializer=pb.TuneRequest.SerializeToString,
                response_deserializer=pb.TuneResponse.FromString,
            )
            try:
                async with self._opening:
                    call = tune()
                    await call.write(hello(number))
                    await call.read()
                self._arrive()
                await self._report(call, number)
                call.cancel()
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                self.tally.errors[code] = self.tally.errors.get(code, 0) + 1
                self._arrive()  # once more, if it had: what matters is that none is waited for

    def _arrive(self) -> None:
        self._arrived += 1
        if self._arrived >= self._load.engines:
            self._all_open.set()

    async def _report(self, call: Any, number: int) -> None:
        """Reports at even times, each engine's own, to the end of the measurement."""
        loop, interval = asyncio.get_running_loop(), 1.0 / self._load.reports_per_second
        due = loop.time() + interval * ((number * 0.618) % 1.0)
        sequence, request = 0, report(number, 1, interval)
        while due < self._ends_at:
            await asyncio.sleep(due - loop.time())
            sequence += 1
            request.report.sequence = sequence
            await call.write(request)
            answer = await call.read()
            self._note(answer, sequence, due, loop.time())
            due += interval

    def _note(self, answer: Any, sequence: int, due: float, now: float) -> None:
        if due < self._begins_at:
            return
        self.tally.latencies.append(now - due)
        lease = answer.lease if answer is not grpc.aio.EOF else pb.LimitsLease()
        if lease.sequence != sequence or not lease.limits.max_num_seqs:
            self.tally.wrong += 1
        if now - due > LEASE_SECONDS:
            self.tally.expired += 1


def _result(load: Load, tally: Tally, busy: Sequence[float], rss_mib: float) -> LoadResult:
    latencies = sorted(tally.latencies) or [math.inf]

    def quantile(share: float) -> float:
        return 1e3 * latencies[min(len(latencies) - 1, int(share * len(latencies)))]

    return LoadResult(
        load=load,
        reports=len(tally.latencies),
        reports_per_second=len(tally.latencies) / load.seconds,
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
