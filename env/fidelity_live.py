"""How close the virtual engine is to a live one on this machine.

    python -m batchpilot.env.fidelity_live [--profile FILE] [--rounds 2] [--model smollm2-135m]

Calibrates the model on the live vLLM (or takes a profile that `batchpilot calibrate` wrote), serves
one workload under each policy on the live engine, and the same requests on the virtual one. The KV
cache is too small for them on purpose: memory binds, and sequences are preempted. Three things are
compared:

- Throughput, preemptions and engine steps, summed over the rounds.
- The records: step by step, are the sequences that decode, the prompt tokens, the blocks held,
  the preemptions and the completions the same live and virtual? All requests wait from the start
  and no policy here looks at the clock, so that they may all be.
- The decisions: a fresh policy is shown every record and snapshot of the live run, and must
  decide as the live one did.

Exit code 1 when throughput is more than 10 % off, preemptions more than 20 % or steps more than
2 %, or when a decision differs. Throughput is only as good as the machine is quiet: calibration and
runs must see the same one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import median

from rich.console import Console
from rich.table import Table

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, StepRecord
from batchpilot.agents.parameters import ConfigError
from batchpilot.env.bench.measure import RunMeasurement, Sample, Slo
from batchpilot.env.bench.runner import (
    BenchRun,
    EngineStalledError,
    TimedRequest,
    replay,
)
from batchpilot.env.calibrate.cli import show_progress
from batchpilot.env.calibrate.runner import calibrate
from batchpilot.env.calibrate.settings import CalibrateSettings
from batchpilot.env.engine import Engine
from batchpilot.env.live_engine import LiveEngine, LiveEngineConfig
from batchpilot.env.models import longest_that_fits, resolve_model
from batchpilot.env.profiles import GpuProfile, load_profile
from batchpilot.env.virtual_engine import VirtualEngine, VirtualEngineConfig
from batchpilot.env.witness import WitnessedPolicy, decides_again
from batchpilot.env.workloads import build_workload, engine_requests

WORKLOAD = "chat:output_max=400"
#: Requests that warm the live engine up, unmeasured.
WARM_UP_REQUESTS = 8
TARGETS = {"itl_slo_ms": None, "ttft_slo_ms": None}


@dataclass(frozen=True)
class Tolerance:
    """How far a sum may be off, as a share of the live one."""

    throughput: float = 0.10
    preemptions: float = 0.20
    steps: float = 0.02


@dataclass(frozen=True)
class Setup:
    """One engine, twice: live and virtual."""

    model: str = "smollm2-135m"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_blocks: int = 96
    block_size: int = 32


@dataclass(frozen=True)
class PolicyRun:
    """One policy on one engine over the same requests."""

    measurement: RunMeasurement
    witness: WitnessedPolicy

    @property
    def steps(self) -> int:
        """Engine steps."""
        return len(self.witness.records)


@dataclass(frozen=True)
class Pair:
    """The same requests under the same policy, live and virtual."""

    policy: str
    live: PolicyRun
    virtual: PolicyRun

    @property
    def equal_steps(self) -> int:
        """Steps from the start on whose records and limits agree in all but their time."""
        pairs = zip(_timeless(self.live), _timeless(self.virtual), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def equal_decisions(self) -> int:
        """Decisions that a fresh policy takes again on the live run's records and snapshots."""
        return decides_again(self.live.witness.events, PolicySpec.parse(self.policy).build(TARGETS))


def _timeless(run: PolicyRun) -> list[tuple[StepRecord, BatchLimits]]:
    witness = run.witness
    records = [record._replace(seconds=0.0) for record in witness.records]
    return list(zip(records, (d.limits for d in witness.decisions), strict=False))


@dataclass(frozen=True)
class Comparison:
    """All rounds of one policy, summed."""

    policy: str
    pairs: tuple[Pair, ...]

    def tokens_per_s(self, side: str) -> float:
        """Output tokens per second, `live` or `virtual`."""
        runs = [getattr(pair, side).measurement for pair in self.pairs]
        return float(sum(r.output_tokens for r in runs) / sum(r.duration_s for r in runs))

    def preemptions(self, side: str) -> int:
        """Preemptions."""
        return sum(getattr(pair, side).measurement.preemptions for pair in self.pairs)

    def steps(self, side: str) -> int:
        """Engine steps."""
        return sum(getattr(pair, side).steps for pair in self.pairs)

    def median_step_ms(self, side: str) -> float:
        """Median time of a step: unlike throughput, a machine's pauses hardly move it."""
        runs = [getattr(pair, side).witness.records for pair in self.pairs]
        return 1e3 * float(median(record.seconds for records in runs for record in records))

    @property
    def equal_steps(self) -> int:
        """Steps that agree, of the live ones."""
        return sum(pair.equal_steps for pair in self.pairs)

    @property
    def decisions(self) -> int:
        """Decisions of the live runs."""
        return sum(len(pair.live.witness.decisions) for pair in self.pairs)

    @property
    def equal_decisions(self) -> int:
        """Those of them that a fresh policy takes again."""
        return sum(pair.equal_decisions for pair in self.pairs)

    def faults(self, allowed: Tolerance) -> list[str]:
        """What is further off than allowed."""
        measured = (
            ("throughput", self.tokens_per_s, allowed.throughput),
            ("preemptions", self.preemptions, allowed.preemptions),
            ("steps", self.steps, allowed.steps),
        )
        faults = [
            f"{self.policy}: {name} {error:+.1%}"
            for name, read, most in measured
            if abs(error := relative_error(read("virtual"), read("live"))) > most
        ]
        if self.equal_decisions != self.decisions:
            faults.append(f"{self.policy}: {self.decisions - self.equal_decisions} decisions")
        return faults


def relative_error(virtual: float, live: float) -> float:
    """(virtual - live) / live; 0 where both are 0."""
    return 0.0 if virtual == live else (virtual - live) / live if live else float("inf")


def compare(
    setup: Setup, profile: GpuProfile, policies: Sequence[str], rounds: int, num_requests: int
) -> list[Comparison]:
    """Runs every policy on both engines, live ones interleaved round by round.

    Raises:
        ConfigError: A setting that cannot be used.
        EngineStalledError: The engine stopped making progress.
    """
    work = [timed_requests(setup, num_requests, seed) for seed in range(rounds)]
    longest = longest_that_fits(resolve_model(setup.model), setup.kv_blocks, setup.block_size)
    simulated = virtual_config(setup, profile, longest)
    config = LiveEngineConfig(
        model=setup.model,
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        kv_blocks=setup.kv_blocks,
        block_size=setup.block_size,
        max_model_len=longest,
    )
    with LiveEngine(config) as engine:
        replay(engine, work[0][:WARM_UP_REQUESTS], Slo(), Silent())
        live = [[run_policy(engine, name, requests) for name in policies] for requests in work]
    with VirtualEngine(simulated) as engine:
        virtual = [[run_policy(engine, name, requests) for name in policies] for requests in work]
    return [
        Comparison(
            name,
            tuple(Pair(name, live[r][p], virtual[r][p]) for r in range(rounds)),
        )
        for p, name in enumerate(policies)
    ]


def check_policies(policies: Sequence[str]) -> None:
    """Builds each once, which takes no time.

    Raises:
        ConfigError: It is not there, or needs what nobody gives it here, such as a target.
    """
    for policy in policies:
        PolicySpec.parse(policy).build(TARGETS)


def virtual_config(setup: Setup, profile: GpuProfile, max_model_len: int) -> VirtualEngineConfig:
    """The virtual engine that stands for the live one; on a CPU vLLM schedules synchronously.

    Raises:
        ConfigError: The profile has blocks of another size.
    """
    if profile.block_size != setup.block_size:
        raise ConfigError(
            f"profile {profile.name!r}: block_size={profile.block_size} must be "
            f"{setup.block_size}, the live engine's"
        )
    return VirtualEngineConfig(
        profile=replace(profile, noise=0.0),
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        kv_blocks=setup.kv_blocks,
        max_model_len=min(max_model_len, profile.max_model_len),
        async_scheduling=False,
    )


def timed_requests(setup: Setup, num_requests: int, seed: int) -> tuple[TimedRequest, ...]:
    """The requests of one round, all there from the start."""
    workload = build_workload(WORKLOAD, num_requests=num_requests, seed=seed)
    vocab_size = resolve_model(setup.model).vocab_size
    requests = engine_requests(workload, vocab_size=vocab_size, seed=seed)
    return tuple(TimedRequest(0.0, request) for request in requests)


def run_policy(engine: Engine, policy: str, requests: Sequence[TimedRequest]) -> PolicyRun:
    """Serves the requests under a fresh policy, witnessed."""
    engine.reset()
    witness = WitnessedPolicy(PolicySpec.parse(policy).build(TARGETS))
    engine.set_policy(witness)
    try:
        measurement = replay(engine, requests, Slo(), Silent())
    finally:
        engine.set_policy(None)
    return PolicyRun(measurement, witness)


class Silent:
    """Shows nothing of a run."""

    def run_started(self, policy: str, round_index: int, requests: int) -> None:
        """Nothing."""

    def advanced(self, ended: int, tokens_per_s: float, sample: Sample) -> None:
        """Nothing."""

    def run_finished(self, run: BenchRun) -> None:
        """Nothing."""


def comparison_table(comparisons: Sequence[Comparison], title: str) -> Table:
    """A line per policy and sum."""
    table = Table(title=title)
    for heading in ("policy", "sum", "live", "virtual", "error", "at most"):
        table.add_column(heading, justify="left" if heading in ("policy", "sum") else "right")
    allowed = Tolerance()
    for item in comparisons:
        lines = (
            ("tokens/s", item.tokens_per_s, allowed.throughput, "{:,.1f}"),
            ("preemptions", item.preemptions, allowed.preemptions, "{:,d}"),
            ("engine steps", item.steps, allowed.steps, "{:,d}"),
            ("median step, ms", item.median_step_ms, None, "{:,.1f}"),
        )
        for name, read, most, form in lines:
            live, virtual = read("live"), read("virtual")
            error = relative_error(virtual, live)
            table.add_row(
                item.policy, name, form.format(live), form.format(virtual), f"{error:+.1%}",
                "" if most is None else f"{most:.0%}",
            )  # fmt: skip
        table.add_row(item.policy, "same steps", f"{item.steps('live'):,}", f"{item.equal_steps:,}")
        table.add_row(
            item.policy, "same decisions", f"{item.decisions:,}", f"{item.equal_decisions:,}"
        )
        table.add_section()
    return table


def calibrated(setup: Setup, console: Console) -> GpuProfile:
    """Calibrates the live engine that is then compared."""
    settings = CalibrateSettings(
        model=setup.model,
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        kv_blocks=setup.kv_blocks,
        block_size=setup.block_size,
    )
    with show_progress(console) as progress:
        return calibrate(settings, progress)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where the engines differ by more than allowed, 2 for a bad setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=Setup.model, help="a model (default %(default)s)")
    parser.add_argument("--profile", help="a profile's file; calibrates when left out")
    parser.add_argument("--policies", nargs="+", default=["static", "memory-peak"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=2, help="default %(default)s")
    parser.add_argument("--num-requests", type=int, default=30, help="a round (default 30)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.num_requests < 1:
        parser.error("--rounds and --num-requests must be at least 1")
    setup = Setup(model=options.model)
    console = Console(stderr=True)
    try:
        check_policies(options.policies)
        profile = load_profile(options.profile) if options.profile else calibrated(setup, console)
        comparisons = compare(
            setup, profile, options.policies, options.rounds, options.num_requests
        )
    except (ConfigError, EngineStalledError) as error:
        print(f"fidelity-live: {error}", file=sys.stderr)
        return 2
    off = profile.fit_error.mean_relative
    title = f"{profile.name}: live and virtual (calibration off by {off:.1%})"
    Console().print(comparison_table(comparisons, title))
    faults = [fault for item in comparisons for fault in item.faults(Tolerance())]
    if faults:
        print(f"fidelity-live: further off than allowed: {'; '.join(faults)}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
