"""What tests of the service share: a service on a free port, and engines' messages."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.server import Service
from batchpilot.service.settings import parse_settings

#: Nothing in a test waits longer than this.
PATIENCE_SECONDS = 60.0


@asynccontextmanager
async def serving(config: Path | None = None, **sections: Any) -> AsyncIterator[Service]:
    """A running service on a free port of loopback; `sections` are those of its file."""
    server = {"bind": "127.0.0.1:0", **sections.pop("server", {})}
    service = Service(parse_settings({"server": server, **sections}, where="test"), config)
    await service.start()
    try:
        yield service
    finally:
        await service.stop(drain_seconds=0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Runs an asynchronous test to its end."""

    async def with_patience() -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await test()

    asyncio.run(with_patience())


def channel_to(service: Service, credentials: Any = None) -> grpc.aio.Channel:
    """A connection of its own to a service."""
    if credentials is None:
        return grpc.aio.insecure_channel(str(service.address))
    return grpc.aio.secure_channel(f"localhost:{service.address.port}", credentials)


def hello(engine: str = "node-1:77", group: str = "chat", **fields: Any) -> pb.EngineHello:
    """What an engine with 1,000 blocks of 16 tokens and 256 sequences says first."""
    facts = {
        "startup_limits": pb.BatchLimits(max_num_seqs=256, max_num_batched_tokens=8192),
        "total_blocks": 1000,
        "block_size": 16,
        "tokens_per_decode": 1,
    }
    given = {"model_name": "m", "min_num_seqs": 1, "min_prefill_chunk": 64, **fields}
    return pb.EngineHello(
        id=pb.EngineId(group=group, engine=engine),
        facts=pb.EngineFacts(**{**facts, **given.pop("facts", {})}),
        **given,
    )


def report(sequence: int, **fields: Any) -> pb.Report:
    """A quarter of a second of 10 steps: 50 sequences hold half of the cache, 5 wait."""
    window = {
        "seconds": 0.25,
        "steps": 10,
        "busy_seconds": 0.25,
        "slowest_step_seconds": 0.03,
        "decode_tokens": 500,
        "decode_seconds": 12.5,
        "prefill_tokens": 1000,
        "running_seconds": 12.5,
        "kv_token_seconds": 2000.0,
        "peak_running": 50,
        "peak_kv_tokens": 8000,
        "running": 50,
        "waiting": 5,
        "used_blocks": 500,
        "limits": pb.BatchLimits(max_num_seqs=64, max_num_batched_tokens=8192),
    }
    window.update(fields.pop("window", {}))
    defaults = {"source": "remote", "binding": pb.BINDING_MAX_NUM_SEQS}
    return pb.Report(
        sequence=sequence, window=pb.TelemetryWindow(**window), **{**defaults, **fields}
    )


_COMMAND = (sys.executable, "-m", "batchpilot", "serve", "--bind", "127.0.0.1:0", "--json-logs")

Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@contextmanager
def service_processes() -> Iterator[Start]:
    """Starts services as processes, `start(*options) -> (process, address)`; ends what is left."""
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen([*_COMMAND, *options], stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process, _address(process)

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _address(process: subprocess.Popen[str]) -> str:
    """Where a service that has just been started says it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"serving on ([0-9.:]+)", json.loads(line)["message"])
        if found:
            return found[1]
    raise AssertionError("the service ended before it served")


class Engine:
    """An engine's end of a Tune stream."""

    def __init__(self, channel: grpc.aio.Channel, token: str | None = None) -> None:
        """Opens the stream."""
        metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        self.call = tuner_pb2_grpc.TunerServiceStub(channel).Tune(metadata=metadata)

    async def begin(self, message: pb.EngineHello | None = None) -> pb.Welcome:
        """Says hello; returns the welcome."""
        await self.send(hello=message or hello())
        return (await self.call.read()).welcome

    async def send(self, **kind: Any) -> None:
        """Sends a request."""
        await self.call.write(pb.TuneRequest(**kind))

    async def ask(self, sequence: int, **fields: Any) -> pb.LimitsLease:
        """Sends a report; returns the lease that answers it."""
        await self.send(report=report(sequence, **fields))
        response = await self.call.read()
        assert response is not grpc.aio.EOF, await self.call.details()
        assert response.WhichOneof("kind") == "lease"
        return response.lease

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends, once its last messages are read."""
        with suppress(grpc.aio.AioRpcError):
            while await self.call.read() is not grpc.aio.EOF:
                pass
        return await self.call.code(), await self.call.details()
