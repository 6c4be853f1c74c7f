"""A policy in the service against the same policy in the engine, in virtual time.

The engine is vLLM's scheduler on a virtual GPU, and both sides are the real ones: reports of the
hook as they go over the wire, decisions of the service, leases as the hook takes them. Only
the wire itself takes no time. What is left is what a decision at a distance costs: it is made once
an interval, from what a report tells, and holds until the next.

`python tests/leased.py` (`make bench-leased`) prints the table of docs/service.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import EngineFacts
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.remote import LeaseHolder, LeaseOffer
from batchpilot.agents.shield import SafetyBounds
from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.contest.scenario import Scenario
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.trial import Outcome, Trial, run_trial
from batchpilot.env.engine import Engine
from batchpilot.env.process import worker_pool
from batchpilot.env.virtual_engine import VirtualEngine
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.scheduler_hook.remote import EngineReport, RemotePolicy
from batchpilot.scheduler_hook.tuner_wire import ReportFacts, report_message
from batchpilot.service.decider import Decider

#: As the service's settings have it where nobody says otherwise.
INTERVAL_SECONDS = 0.25
#: Longer than any run: whether leases end in time is tested elsewhere.
LEASE_SECONDS = 1e6


class DirectPost:
    """A service at the other end of no wire: answers each report at once.

    Args:
        policy: Decides.
        leases: Where the answers go.
        facts: The engine's.
        clock: Engine seconds.
        interval_seconds: How often it wants a report.
        wants_detail: Whether it wants every step.
    """

    def __init__(
        self,
        policy: LimitPolicy,
        leases: LeaseHolder,
        facts: EngineFacts,
        clock: Callable[[], float],
        *,
        interval_seconds: float,
        wants_detail: bool,
    ) -> None:
        self.interval_seconds = interval_seconds
        self.wants_detail = wants_detail
        self._decider = Decider(policy, facts, SafetyBounds())
        self._session = leases.open_session()
        self._clock = clock

    def start(self) -> None:
        """Nothing has to be opened."""

    def offer(self, report: EngineReport) -> None:
        """Sends, decides, and brings the lease back."""
        number = self._session.sending(self._clock())
        sent = report_message(report, ReportFacts(number, 0, None, None)).SerializeToString()
        limits = self._decider.decide(pb.Report.FromString(sent)).limits
        refusal = self._session.accept(LeaseOffer(number, limits, LEASE_SECONDS), self._clock())
        assert refusal is None, refusal


def follow(
    engine: VirtualEngine,
    policy: LimitPolicy,
    *,
    interval_seconds: float = INTERVAL_SECONDS,
    wants_detail: bool = True,
) -> None:
    """Puts an engine under a policy that sits in a service."""
    facts, leases = engine.facts, LeaseHolder(engine.facts.startup_limits, LEASE_SECONDS)

    def clock() -> float:
        return engine.clock_seconds

    post = DirectPost(
        policy,
        leases,
        facts,
        clock,
        interval_seconds=interval_seconds,
        wants_detail=wants_detail,
    )
    remote = RemotePolicy(PolicySpec.parse("static").build(), leases, post, clock)
    engine.set_policy(remote)
    remote.attach(engine._hook)


@dataclass(frozen=True)
class Leased(Contestant):
    """A contestant whose policy sits in a service."""

    interval_seconds: float = INTERVAL_SECONDS

    def steer(self, engine: Engine, defaults: Mapping[str, Any]) -> LimitPolicy | None:
        """Puts a fresh policy in a service, and the engine under it."""
        assert self.spec is not None and isinstance(engine, VirtualEngine)
        policy = self.spec.build(defaults)
        detail = self.spec.needs_steps(defaults)
        follow(engine, policy, interval_seconds=self.interval_seconds, wants_detail=detail)
        return policy


def trials(scenario: Scenario, policy: str, interval: float, seeds: int) -> Iterator[Trial]:
    """For each seed one in the engine and one in the service."""
    spec = PolicySpec.parse(policy)
    for seed in range(seeds):
        for contestant in (Contestant(policy, spec), Leased(policy, spec, 0.0, None, interval)):
            yield Trial(scenario, contestant, seed=seed)


def row(scenario: Scenario, policy: str, outcomes: Sequence[Outcome]) -> str:
    """A line of the table: means over seeds, and the spread of the ratio that counts."""
    local, leased = outcomes[0::2], outcomes[1::2]
    if scenario.slo.itl_slo_ms is None:
        ratios = [b.tokens_per_s / a.tokens_per_s for a, b in zip(local, leased, strict=True)]
        told = [f"{_mean([o.preemptions for o in each]):.1f}" for each in (local, leased)]
    else:
        ratios = [b.inside / max(a.inside, 1) for a, b in zip(local, leased, strict=True)]
        told = [f"{_mean([100 * o.attainment for o in each]):.1f} %" for each in (local, leased)]
    spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
    return f"| {scenario.label} | {policy} | {_mean(ratios):.3f} ({spread}) | {' | '.join(told)} |"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def print_table(
    title: str, scenarios: Sequence[Scenario], policies: Sequence[str], asked: argparse.Namespace
) -> None:
    """Runs every scenario under every policy, and prints a line for each as it is done."""
    print(title, "|---|---|---|---|---|", sep="\n", flush=True)
    with worker_pool(asked.jobs) as pool:
        for scenario in scenarios:
            for policy in policies:
                runs = trials(scenario, policy, asked.interval, asked.seeds)
                print(row(scenario, policy, list(pool.map(run_trial, runs))), flush=True)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--interval", type=float, default=INTERVAL_SECONDS, help="of reports, in s")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each, seeds from 0")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    asked = parser.parse_args()
    contest = ContestSettings()
    print_table(
        "| saturated | policy | tokens/s, service over engine | preempted, engine | service |",
        contest.saturated_scenarios(),
        ("memory", "memory-peak", "predictive"),
        asked,
    )
    print_table(
        "| overloaded | policy | inside, service over engine | inside, engine | service |",
        contest.overloaded_scenarios(),
        ("memory+sla", "predictive"),
        asked,
    )


if __name__ == "__main__":
    main()
