"""Mutated messages both ways, and coverage-guided fuzzing of the answers: `make fuzz`.

`python tests/fuzzing.py --messages 100000` mutates valid messages, their bytes and their fields:
answers go through the engine's session, its lease holder, its policy and its shield; requests
through the service's own stream handler. `--guided SECONDS` lets atheris search the answers' path.
Nothing may raise but what the code declares, and no limit may leave its bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.limits import BatchLimits, EngineFacts, EngineSnapshot, StepRecord
from batchpilot.agents.remote import LONGEST_REASON
from batchpilot.agents.shield import SafetyBounds, shield
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
from batchpilot.scheduler_hook.remote_link import EngineIdentity, hello, remote_link
from batchpilot.scheduler_hook.settings import HookSettings
from batchpilot.scheduler_hook.tuner_session import TunerSession
from batchpilot.service.load_engine import LoadEngine
from batchpilot.service.refusals import RefusalError
from batchpilot.service.server import Service
from batchpilot.service.settings import LimitSettings, ServiceSettings
from batchpilot.service.validation import ReportError

STARTUP = BatchLimits(256, 8192)
FACTS = EngineFacts(STARTUP, total_blocks=20_000, block_size=16)
IDENTITY = EngineIdentity(FACTS, "a-model", 0, "0.32.0")
SETTINGS = HookSettings(mode="remote", service_targets="localhost:1", itl_slo_ms=50.0)
EXTREMES = (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))


def mutated(message: Message, chance: random.Random) -> bytes:
    """A message as bytes with something wrong: in its fields, in its bytes, or in both."""
    if chance.random() < 0.7:
        copy = type(message)()
        copy.CopyFrom(message)
        for _ in range(chance.randrange(1, 4)):
            mutate_field(copy, chance)
        data = copy.SerializeToString()
        if chance.random() < 0.6:
            return data
    else:
        data = message.SerializeToString()
    return mutate_bytes(data, chance)


def mutate_field(message: Message, chance: random.Random) -> None:
    """Sets one field, at any depth, to an extreme, or clears it."""
    field = chance.choice(message.DESCRIPTOR.fields)
    name = field.name
    if chance.random() < 0.15:
        message.ClearField(name)
    elif field.is_repeated:
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            mutate_field(getattr(message, name).add(), chance)
        elif field.message_type is None:
            getattr(message, name).extend([chance.randrange(2**32)] * chance.randrange(20))
        else:
            getattr(message, name)["x" * chance.randrange(200)] = chance.randrange(2**32)
    elif field.message_type is not None:
        mutate_field(getattr(message, name), chance)
    else:
        setattr(message, name, extreme(field, chance))


def extreme(field: Any, chance: random.Random) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return chance.choice(FLOATS)
    if kind == field.CPPTYPE_STRING:
        return chance.choice(("", "\n\x1b[31m", "x" * 5000, "\u202e", "a" * chance.randrange(300)))
    if kind == field.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind == field.CPPTYPE_ENUM:
        return chance.choice((0, 1, 4, 5, 1000))
    bits = 32 if kind == field.CPPTYPE_UINT32 else 64
    return chance.choice([v for v in EXTREMES if v < 2**bits] + [chance.randrange(300)])


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Replaces, inserts, removes, doubles or cuts."""
    raw = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(5):
            case 0 if at < len(raw):
                raw[at] = chance.randrange(256)
            case 1:
                raw[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 2:
                del raw[at : at + chance.randrange(1, 9)]
            case 3:
                raw[at:at] = raw[at : at + chance.randrange(1, 40)]
            case _:
                del raw[at + 1 :]
    return bytes(raw)


class AnswerPath:
    """Everything an answer goes through in an engine, on a clock that the fuzzer moves."""

    def __init__(self) -> None:
        local = PolicySpec.parse("memory").build()
        self.now = 1000.0
        self.policy, self.client = remote_link(SETTINGS, IDENTITY, local)
        self.client.clock = self.policy._clock = lambda: self.now
        self.client.start = lambda: None
        self.outcomes: Counter[str] = Counter()
        self.session = TunerSession(self.client, "fuzzer")

    def valid(self, chance: random.Random) -> wire.TuneResponse:
        """An answer in good order to the newest report."""
        sequence = self.session._leases.sending(self.now)
        if chance.random() < 0.1:
            welcome = wire.Welcome(
                session_id="s", report_interval_ms=250, detail=1, policy="sla", itl_slo_ms=50.0
            )
            return wire.TuneResponse(welcome=welcome)
        limits = wire.BatchLimits(max_num_seqs=64, max_num_batched_tokens=2048)
        lease = wire.LimitsLease(
            sequence=sequence, limits=limits, lease_ms=2000, source="sla", reason="r", policy="p"
        )
        return wire.TuneResponse(lease=lease)

    def take(self, data: bytes) -> None:
        """One answer, and the step after it."""
        try:
            response = wire.TuneResponse.FromString(data)
        except DecodeError:
            self.outcomes["no message"] += 1  # gRPC ends the stream
            return
        self.session.take(response)
        self._check()

    def _check(self) -> None:
        settings, held = self.client.settings, self.client.leases.current
        interval = self.client.interval_seconds
        least, most = settings.service_min_report_seconds, settings.service_max_report_seconds
        assert least <= interval <= most, interval
        target = self.client.itl_slo_seconds
        assert target is None or 0 <= target < math.inf, target
        if held is not None:
            assert held.expires_at <= self.now + settings.service_max_lease_seconds
            assert 1 <= held.decision.limits.max_num_seqs <= STARTUP.max_num_seqs
            assert len(held.decision.reason) <= LONGEST_REASON
            assert held.decision.reason.isprintable()
        snapshot = EngineSnapshot(FACTS, self.now, running=40, waiting=9, used_blocks=4000)
        decision = self.policy.decide(snapshot)
        self.policy.observe(StepRecord(0.02, 40, 40, 0))
        limits = shield(decision.limits, snapshot, SafetyBounds()).limits
        assert 40 <= limits.max_num_seqs <= STARTUP.max_num_seqs
        assert 104 <= limits.max_num_batched_tokens <= STARTUP.max_num_batched_tokens
        self.outcomes[decision.source] += 1


def fuzz_answers(messages: int, seed: int) -> Counter[str]:
    """Mutated answers through the engine's side."""
    chance, path = random.Random(seed), AnswerPath()
    for number in range(messages):
        path.now += chance.random()
        path.take(mutated(path.valid(chance), chance))
        if number % 500 == 499:
            path.session = TunerSession(path.client, "fuzzer")
    path.outcomes.update({f"lease {k}": v for k, v in path.client.stats.leases.items()})
    return path.outcomes


class Stream:
    """Stands in for gRPC's side of one stream of the service."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self._requests = iter(requests)
        self.sent: list[wire.TuneResponse] = []

    async def read(self) -> Any:
        """The next request; bytes that are no message end the stream, as in gRPC."""
        data = next(self._requests, None)
        try:
            return grpc.aio.EOF if data is None else wire.TuneRequest.FromString(data)
        except DecodeError:
            return grpc.aio.EOF

    async def write(self, response: wire.TuneResponse) -> None:
        self.sent.append(response)


class RequestPath:
    """The service's own handlers, without a network."""

    def __init__(self) -> None:
        unlimited = LimitSettings(reports_per_second=1e12, report_burst=10**12)
        service = Service(ServiceSettings(limits=unlimited))
        self.tuner, self.sessions = service._tuner, service.sessions
        self.outcomes: Counter[str] = Counter()

    async def stream(self, hello_bytes: bytes, reports: Sequence[bytes], caller: Any) -> None:
        """One stream: a hello and reports, any of which may be spoiled."""
        stream, session = Stream([hello_bytes, *reports]), None
        try:
            opened = await self.tuner._hello(caller, stream)
            session = self.sessions.open(opened, caller, None)
            await self.tuner._serve(session, stream)
            self.outcomes["served"] += 1
        except (ReportError, RefusalError) as refusal:
            self.outcomes[type(refusal).__name__] += 1
        finally:
            if session is not None:
                self.sessions.close(session)
                self._check(session, stream.sent)

    def _check(self, session: Any, sent: Sequence[wire.TuneResponse]) -> None:
        startup = session.facts.startup_limits
        for response in sent:
            if response.HasField("lease"):
                limits = response.lease.limits
                assert 1 <= limits.max_num_seqs <= startup.max_num_seqs, response
                assert 1 <= limits.max_num_batched_tokens <= startup.max_num_batched_tokens
                self.outcomes["leases"] += 1


def fuzz_requests(messages: int, seed: int) -> Counter[str]:
    """Mutated requests through the service's side."""
    return asyncio.run(_fuzz_requests(messages, seed))


async def _fuzz_requests(messages: int, seed: int) -> Counter[str]:
    from batchpilot.service.access import Caller, Role

    chance, path, fuzzed = random.Random(seed), RequestPath(), 0
    greeting = wire.TuneRequest(hello=hello(SETTINGS, IDENTITY, "a1b2c3"))
    while fuzzed < messages:
        first = greeting.SerializeToString()
        if chance.random() < 0.3:
            first, fuzzed = mutated(greeting, chance), fuzzed + 1
        reports = [LoadEngine(1, 0.25).report(1).SerializeToString()]
        for sequence in range(2, 5):
            reports.append(mutated(LoadEngine(fuzzed, 0.25).report(sequence), chance))
            fuzzed += 1
        await path.stream(first, reports, Caller("fuzzer", Role.ADMIN))
    return path.outcomes


def guided(seconds: int) -> int:
    """Runs atheris on the answers' path in a process of its own; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--atheris", folder, f"-max_total_time={seconds}"]
        status = subprocess.run([*command, "-max_len=512", "-verbosity=0"]).returncode
        print("guided:", (Path(folder) / "outcomes.json").read_text())
        return status


def search(arguments: list[str]) -> None:
    """Atheris's loop; libFuzzer's options follow the corpus folder."""
    import atheris

    from batchpilot.agents import remote
    from batchpilot.scheduler_hook import remote as remote_policy
    from batchpilot.scheduler_hook import tuner_client, tuner_session, tuner_wire

    for module in (remote, remote_policy, tuner_client, tuner_session, tuner_wire):
        instrument(atheris, module)
    path, folder, chance = AnswerPath(), Path(arguments[0]), random.Random(0)

    def one(data: bytes) -> None:
        # A stream with three reports on their way: an answer to any of them can be in order.
        path.session = TunerSession(path.client, "fuzzer")
        for _ in range(3):
            path.session._leases.sending(path.now)
            path.now += 0.01
        path.take(data)
        path.outcomes["inputs"] += 1
        if path.outcomes["inputs"] % 10_000 == 0:  # libFuzzer ends the process without a word
            leases = {f"lease {k}": v for k, v in path.client.stats.leases.items()}
            totals = {**path.outcomes, **leases}
            (folder / "outcomes.json").write_text(json.dumps(totals))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """Half the time by the message's fields, half the time by libFuzzer's own ways."""
        if seed % 2:
            return bytes(atheris.Mutate(data, most))
        chance.seed(seed)
        try:
            return mutated(wire.TuneResponse.FromString(data), chance)[:most]
        except DecodeError:
            return mutate_bytes(data, chance)[:most]

    corpus = write_seeds(folder / "corpus", chance)
    atheris.Setup([sys.argv[0], corpus, *arguments[1:]], one, custom_mutator=mutate)
    atheris.Fuzz()


def write_seeds(corpus: Path, chance: random.Random) -> str:
    """A folder of answers in good order."""
    corpus.mkdir()
    path = AnswerPath()
    for number in range(20):
        (corpus / str(number)).write_bytes(path.valid(chance).SerializeToString())
    return str(corpus)


def instrument(atheris: Any, module: Any) -> None:
    """Lets atheris see which branches a module's functions and methods take."""
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    for item in own:
        for function in vars(item).values() if isinstance(item, type) else (item,):
            if hasattr(function, "__code__"):
                atheris.instrument_func(function)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.disable(logging.CRITICAL)
    if arguments[:1] == ["--atheris"]:
        search(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=100_000, help="each way (default 100000)")
    parser.add_argument("--guided", type=int, default=0, metavar="SECONDS", help="run atheris too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for name, fuzz in (("answers", fuzz_answers), ("requests", fuzz_requests)):
        outcomes = fuzz(args.messages, args.seed)
        print(f"{args.messages} {name}: {dict(sorted(outcomes.items()))}", flush=True)
    return guided(args.guided) if args.guided else 0


if __name__ == "__main__":
    sys.exit(main())
