"""What a report costs in CPU time, by policy: `python -m batchpilot.service.report_cost`.

Parses, checks, decides and serializes in this process, without gRPC, for engines that decode 128
sequences in steps of 25 ms and report every 250 ms. The first reports of each engine are not
measured: policies still learn. `engines` is how many one core could answer at four reports a second
if gRPC cost nothing; `python -m batchpilot.service.load` measures the whole.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from batchpilot.agents.registry import PolicyRegistry
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.access import Caller, Role
from batchpilot.service.groups import Groups
from batchpilot.service.load_engine import LoadEngine, hello
from batchpilot.service.make_example_policy import write_example
from batchpilot.service.meters import Meters
from batchpilot.service.policy_source import PolicySource
from batchpilot.service.sessions import Session, SessionTable
from batchpilot.service.settings import GroupSettings
from batchpilot.service.steering import Steering
from batchpilot.service.validation import check_report

POLICIES = ("static", "memory+sla", "memory-clt", "memory-peak", "predictive", "learned:example@1")
RUNNING, WAITING, STEPS = 128, 12, 10
PROMPT_TOKENS = 400
INTERVAL_SECONDS, REPORTS_PER_SECOND = 0.25, 4
WARM_UP_REPORTS, MEASURED_REPORTS = 120, 40


class Sequences:
    """What an engine runs: sequences that age a token a step, end, and make room for others."""

    def __init__(self, seed: int = 0) -> None:
        """Starts with sequences of all ages."""
        self._random = random.Random(seed)
        self._lengths = [self._length() for _ in range(RUNNING)]
        self._ages = [self._random.randrange(length) for length in self._lengths]

    def step(self) -> pb.StepRecord:
        """One step."""
        record = pb.StepRecord(
            seconds=INTERVAL_SECONDS / STEPS,
            running=RUNNING,
            decode_seqs=RUNNING,
            regular=True,
            binding=pb.BINDING_MAX_NUM_SEQS,
        )
        for place, length in enumerate(self._lengths):
            self._ages[place] += 1
            if self._ages[place] >= length:
                record.finished.add(
                    prompt_tokens=PROMPT_TOKENS, output_tokens=length, completed=True
                )
                record.arrived_prompt_tokens.append(PROMPT_TOKENS)
                record.prefill_tokens += PROMPT_TOKENS
                self._lengths[place], self._ages[place] = self._length(), 1
        record.kv_tokens = RUNNING * PROMPT_TOKENS + sum(self._ages)
        return record

    def columns(self) -> pb.SequenceColumns:
        """Those that run now."""
        return pb.SequenceColumns(
            kv_tokens=[PROMPT_TOKENS + age for age in self._ages],
            output_tokens=self._ages,
            prefill_tokens_left=[0] * RUNNING,
        )

    def _length(self) -> int:
        return 1 + int(self._random.lognormvariate(5.0, 0.8))


def messages(detail: int, count: int) -> list[bytes]:
    """An engine's reports, as they come off the wire."""
    engine, found = Sequences(), []
    waiting = pb.SequenceColumns(
        kv_tokens=[0] * WAITING,
        output_tokens=[0] * WAITING,
        prefill_tokens_left=[PROMPT_TOKENS] * WAITING,
    )
    for sequence in range(1, count + 1):
        message = LoadEngine(0, INTERVAL_SECONDS).report(sequence)
        steps = [engine.step() for _ in range(STEPS)]
        window = message.report.window
        window.steps, window.running, window.waiting = STEPS, RUNNING, WAITING
        if detail == pb.DETAIL_STEPS:
            message.report.steps.extend(steps)
            message.report.running.CopyFrom(engine.columns())
            message.report.waiting.CopyFrom(waiting)
        found.append(message.SerializeToString())
    return found


def measure(policy: str, source: PolicySource, engines: int) -> tuple[int, float]:
    """Size of a report in bytes, and CPU seconds to answer one."""
    groups = Groups(GroupSettings(policy=policy, itl_slo_ms=50.0), {})
    steering = Steering(groups, source, Meters())
    table = SessionTable(max_sessions=engines, reports_per_second=4.0, report_burst=1)
    caller = Caller("cost", Role.ADMIN)
    sessions = [table.open(hello(number).hello, caller, None) for number in range(engines)]
    detail = [steering.welcome(session).detail for session in sessions][0]
    reports = messages(detail, WARM_UP_REPORTS + MEASURED_REPORTS)
    for raw in reports[:WARM_UP_REPORTS]:
        _answer_all(raw, sessions, steering)
    begun = time.process_time()
    for raw in reports[WARM_UP_REPORTS:]:
        _answer_all(raw, sessions, steering)
    seconds = time.process_time() - begun
    return len(reports[-1]), seconds / (engines * MEASURED_REPORTS)


def _answer_all(raw: bytes, sessions: Sequence[Session], steering: Steering) -> None:
    for session in sessions:
        message = pb.TuneRequest.FromString(raw).report
        check_report(message, session.hello.facts)
        steering.is_outdated(session)
        pb.TuneResponse(lease=steering.answer(session, message)).SerializeToString()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=20, help="at once (default 20)")
    parser.add_argument("--policies", default=",".join(POLICIES), metavar="A,B,C")
    args = parser.parse_args(argv)
    print(f"{'policy':20} {'bytes':>6} {'us':>8} {'engines':>8}")
    with tempfile.TemporaryDirectory() as folder:
        write_example(Path(folder) / "made")
        registry = Path(folder) / "registry"
        PolicyRegistry(registry).add(Path(folder) / "made")
        for policy in args.policies.split(","):
            size, seconds = measure(policy, PolicySource(registry), args.engines)
            engines = 1 / (REPORTS_PER_SECOND * seconds)
            print(f"{policy:20} {size:6} {seconds * 1e6:8.1f} {engines:8.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
