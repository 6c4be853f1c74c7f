"""The faults of tests/faults.py on a real model under load: `make chaos`, six minutes.

SmolLM2-135M on a live vLLM serves without a pause. Each fault strikes, lasts and heals between two
stretches of the local policy alone, and its throughput is told as a ratio to the mean of the two,
so that what the machine does meanwhile falls out as far as it can. The last lines pool these
ratios: their median, its 95 % interval from order statistics (David and Nagaraja, Order Statistics,
section 7.1) and their quartiles; and the same of pairs of local stretches, which is the noise.
Where there are two cores the services get one of them, as they run on other machines in earnest;
doubles, the network's stand-in and the client stay with the engine. It fails where a request was
lost.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import FAULTS, Fault, FaultLog, Scale, World, remote_share, striking
from traffic import Stretch, Traffic

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, Source
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig

STARTUP = BatchLimits(32, 1024)
LOCAL = "memory"
WARM_UP_SECONDS = 12.0
#: A fresh policy has seen nothing yet: what it does at first is not measured.
SETTLING_SECONDS = 1.5
#: Tells the command that has begun again which core is the services'.
SERVICE_CORE = "CHAOS_SERVICE_CORE"


@dataclass(frozen=True)
class Outcome:
    """What came of one fault.

    Attributes:
        fault: Its name.
        noticed: What the client counted, by name.
        local_rate: Tokens per second by the local policy.
        remote_share: Of the steps, those that the service decided, 0 to 1.
        served: Requests served meanwhile.
        ratio: Tokens per second from the strike to the return, over the local policy's.
        noise: Those of the local stretch before, over those of the one after.
        back_seconds: From healed to the first lease for a report sent since.
    """

    fault: str
    noticed: dict[str, int]
    local_rate: float
    remote_share: float
    served: int
    ratio: float
    noise: float
    back_seconds: float

    def row(self) -> str:
        """A line of the table."""
        counted = ", ".join(f"{name} {count}" for name, count in sorted(self.noticed.items()))
        return (
            f"| {self.fault} | {counted} | {100 * self.remote_share:.0f} % | {self.served} "
            f"| {self.ratio:.3f} | {self.back_seconds:.2f} s |"
        )


class Chaos:
    """One live engine that every fault strikes in turn.

    Args:
        engine: Serves.
        local_seconds: How long each stretch of the local policy lasts.
        service_cores: Those that services run on; None for any.
    """

    def __init__(
        self, engine: LiveEngine, local_seconds: float, service_cores: frozenset[int] | None
    ) -> None:
        """Serves for a while: the first steps are slow."""
        self._engine = engine
        self._service_cores = service_cores
        self._local_seconds = local_seconds
        self.traffic = Traffic(engine)
        self.traffic.serve(after(WARM_UP_SECONDS))
        self._before = self._serve_locally()

    def strike(self, fault: Fault, scale: Scale) -> Outcome:
        """One fault between two stretches of the local policy."""
        with tempfile.TemporaryDirectory() as folder:
            world = World(scale, Path(folder), service_cores=self._service_cores)
            try:
                during, log, noticed = self._serve_through(world, fault)
            finally:
                world.close()
        before, after = self._before, self._serve_locally()
        self._before = after
        local = statistics.fmean((before.tokens_per_second, after.tokens_per_second))
        return Outcome(
            fault=fault.name,
            noticed=noticed,
            local_rate=local,
            remote_share=remote_share(during.decisions),
            served=during.served,
            ratio=during.tokens_per_second / local,
            noise=before.tokens_per_second / after.tokens_per_second,
            back_seconds=log.back_at - log.healed_at,
        )

    def _serve_through(
        self, world: World, fault: Fault
    ) -> tuple[Stretch, FaultLog, dict[str, int]]:
        engine = self._engine
        link = world.follow(engine.facts, **fault.prepare(world))
        engine.set_policy(link.policy)
        link.policy.attach(engine._hook)
        world.is_local = lambda: engine.decision.source is Source.FALLBACK
        with striking(world, fault) as log:
            self.traffic.serve(lambda: bool(log.struck_at) or log.over)
            during = self.traffic.serve(lambda: log.over)
        if log.error is not None:
            raise log.error
        stats = link.client.stats
        return during, log, {**stats.failures, **stats.leases}

    def _serve_locally(self) -> Stretch:
        self._engine.set_policy(PolicySpec.parse(LOCAL).build())
        self.traffic.serve(after(SETTLING_SECONDS))
        return self.traffic.serve(after(self._local_seconds))


def after(seconds: float) -> Callable[[], bool]:
    """Becomes true."""
    ends_at = time.monotonic() + seconds
    return lambda: time.monotonic() >= ends_at


def spread(ratios: Sequence[float]) -> str:
    """The median, its 95 % interval (between order statistics) and the quartiles."""
    ordered, count = sorted(ratios), len(ratios)
    low, _, high = statistics.quantiles(ordered, n=4)
    rank = max(0, rank_below_median(count))
    return (
        f"median {statistics.median(ordered):.3f} (95 %: {ordered[rank]:.3f} to "
        f"{ordered[count - 1 - rank]:.3f}), quartiles {low:.3f} to {high:.3f}"
    )


def rank_below_median(count: int) -> int:
    """The greatest rank, from 0, that the median is below with a chance of at most 2.5 %.

    -1 where there are too few values for any. The number of values below the median is binomial.
    """
    chance, rank = 0.0, -1
    while (chance := chance + math.comb(count, rank + 1) / 2**count) <= 0.025:
        rank += 1
    return rank


def scale_of(fault: Fault, args: argparse.Namespace) -> Scale:
    """Stopped for 30 s, a restart or a change of service every 2 s, 5 s of delay."""
    hold = {
        "stopped with SIGSTOP": args.stopped_seconds,
        "restarted again and again": 2.5 * args.seconds,
        "two services in conflict": 2.0 * args.seconds,
        "answers delayed": args.seconds + 5.0,
    }
    return Scale(
        local=LOCAL,
        hold_seconds=hold.get(fault.name, args.seconds),
        restart_seconds=2.0,
        delay_seconds=5.0,
        lease_seconds=2.0,
        good=STARTUP,
        report_ms=250,
        look_seconds=0.05,
    )


def begin_on_own_cores() -> None:
    """Starts this command again on all cores but one, which is for the services.

    Again, because OpenMP counts cores when it is loaded, and its threads must not share one.
    """
    *own, last = sorted(os.sched_getaffinity(0))
    if not own or SERVICE_CORE in os.environ:
        return
    os.environ[SERVICE_CORE] = str(last)
    os.sched_setaffinity(0, own)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def service_cores() -> frozenset[int] | None:
    """Those of the services; None where there is only one for all."""
    core = os.environ.get(SERVICE_CORE)
    return None if core is None else frozenset({int(core)})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m or tiny")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long most faults last")
    parser.add_argument("--stopped-seconds", type=float, default=30.0, help="SIGSTOP's length")
    parser.add_argument("--local-seconds", type=float, default=4.0, help="each local stretch")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Strikes with every fault and prints; 1 where a request was lost."""
    args = parse(argv)
    config = LiveEngineConfig(
        args.model,
        max_num_seqs=STARTUP.max_num_seqs,
        max_num_batched_tokens=STARTUP.max_num_batched_tokens,
        kv_blocks=128,
        block_size=32,
        max_model_len=512,
    )
    with LiveEngine(config) as engine:
        chaos = Chaos(engine, args.local_seconds, service_cores())
        print("| fault | noticed | service decided | served | throughput | back after |")
        print("|---|---|---|---|---|---|")
        outcomes = []
        for fault in (fault for fault in FAULTS if args.only in fault.name):
            outcomes.append(chaos.strike(fault, scale_of(fault, args)))
            print(outcomes[-1].row(), flush=True)
        lost = chaos.traffic.finish()
        print(f"\n{chaos.traffic.asked} requests, {lost} lost")
    if len(outcomes) > 1:
        print(f"throughput over the local policy's: {spread([o.ratio for o in outcomes])}")
        rates = [outcome.local_rate for outcome in outcomes]
        print(f"tokens per second by the local policy: {min(rates):.0f} to {max(rates):.0f}")
        print(f"local before over local after: {spread([o.noise for o in outcomes])}")
    return int(lost > 0)


if __name__ == "__main__":
    begin_on_own_cores()
    sys.exit(main())
