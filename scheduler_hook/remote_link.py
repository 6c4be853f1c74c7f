"""Puts mode `remote` together: the local policy, the lease it gives way to, and the client."""

from __future__ import annotations

import os
import secrets
import socket
from typing import TYPE_CHECKING, NamedTuple

from batchpilot import __version__
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.remote import LeaseHolder
from batchpilot.scheduler_hook.remote import RemotePolicy
from batchpilot.scheduler_hook.settings import HookSettings
from batchpilot.scheduler_hook.tuner_client import TunerClient

if TYPE_CHECKING:
    from batchpilot.agents.limits import EngineFacts
    from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire


class EngineIdentity(NamedTuple):
    """What an engine says of itself beside its settings.

    Attributes:
        facts: What does not change while it runs.
        model_name: The first served model name.
        rank: The data-parallel rank.
        vllm_version: vLLM's version.
    """

    facts: EngineFacts
    model_name: str
    rank: int
    vllm_version: str


class RemoteLink(NamedTuple):
    """A policy that follows the service, and the client that talks to it."""

    policy: RemotePolicy
    client: TunerClient


def remote_link(settings: HookSettings, engine: EngineIdentity, local: LimitPolicy) -> RemoteLink:
    """Connects a local policy to the service; opens nothing before the first decision.

    Raises:
        ConfigError: An address or a file that can never work.
    """
    leases = LeaseHolder(engine.facts.startup_limits, settings.service_max_lease_seconds)
    mark = secrets.token_hex(3)  # the module random may be seeded alike in every engine
    client = TunerClient(settings, lambda: hello(settings, engine, mark), leases)
    return RemoteLink(RemotePolicy(local, leases, client), client)


def default_name(mark: str) -> str:
    """HOSTNAME:PID:MARK.

    Pods on their node's network share its hostname, and each counts its own processes. A
    certificate of the hostname covers it; after a fork the PID is the child's.
    """
    return f"{socket.gethostname()}:{os.getpid()}:{mark}"


def hello(settings: HookSettings, engine: EngineIdentity, mark: str) -> wire.EngineHello:
    """The engine's first words.

    Args:
        settings: The hook's.
        engine: What it says of itself.
        mark: Tells it from others, where the settings give it no name.
    """
    from batchpilot.protos.batchpilot.v1 import tuner_pb2 as wire
    from batchpilot.scheduler_hook.tuner_wire import facts_message

    return wire.EngineHello(
        id=wire.EngineId(
            group=settings.service_group,
            engine=settings.service_engine or default_name(mark),
            data_parallel_rank=engine.rank,
        ),
        facts=facts_message(engine.facts),
        model_name=engine.model_name,
        vllm_version=engine.vllm_version,
        batchpilot_version=__version__,
        itl_slo_ms=settings.itl_slo_ms,
        ttft_slo_ms=settings.ttft_slo_ms,
        min_num_seqs=min(settings.min_num_seqs, engine.facts.startup_limits.max_num_seqs),
        min_prefill_chunk=settings.min_prefill_chunk,
        follows_targets=True,
    )
