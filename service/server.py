"""One service: its parts put together, started, and stopped without a dropped call.

Stopping: health turns NOT_SERVING, so that a balancer sends nobody new; streams go on for
`drain_seconds`; then they end with UNAVAILABLE, which tells engines to go to another replica.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.addresses import Address
from batchpilot.service.groups import Groups
from batchpilot.service.meters import Meters
from batchpilot.service.refusals import RefusalError
from batchpilot.service.sessions import SessionTable
from batchpilot.service.settings import LimitSettings, ServiceSettings
from batchpilot.service.steering import Steering
from batchpilot.service.tuner import TunerServicer

logger = logging.getLogger("batchpilot.service")

SERVICE_NAMES = tuple(s.full_name for s in pb.DESCRIPTOR.services_by_name.values())
#: How long calls that remain may take to end by themselves at the very last.
GRACE_SECONDS = 1.0


class Service:
    """The tuning service in one process.

    Args:
        settings: What it does, and where.

    Raises:
        ConfigError: Settings that cannot be used together.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        """Puts the parts together; opens nothing yet."""
        self._settings = settings
        self.address = Address.parse(settings.server.bind, where="bind")
        limits = settings.limits
        self.meters = Meters()
        self.groups = Groups(settings.default, settings.groups)
        self.sessions = SessionTable(
            limits.max_sessions, limits.reports_per_second, limits.report_burst
        )
        self._tuner = TunerServicer(self.sessions, Steering(self.groups, self.meters))
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> Address:
        """Begins to serve; returns the address with the port that was chosen.

        Raises:
            ConfigError: The address cannot be used.
        """
        server = grpc.aio.server(options=channel_options(self._settings.limits))
        tuner_pb2_grpc.add_TunerServiceServicer_to_server(self._tuner, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            port = server.add_insecure_port(str(self.address))
        except RuntimeError:
            raise ConfigError(f"bind={self.address}: cannot be opened; is it in use?") from None
        await server.start()
        self._server = server
        self.address = Address(self.address.host, port)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving on %s", self.address)
        return self.address

    async def stop(self, drain_seconds: float | None = None) -> None:
        """Ends every stream after the drain time."""
        if self._server is None:
            return
        server, self._server = self._server, None
        await self._health.enter_graceful_shutdown()
        drain = self._settings.server.drain_seconds if drain_seconds is None else drain_seconds
        logger.info("stopping: health is NOT_SERVING, streams end in %g s", drain)
        await asyncio.sleep(drain)
        for session in self.sessions:
            why = RefusalError(
                grpc.StatusCode.UNAVAILABLE, "stopping", "the service is shutting down"
            )
            self.sessions.end(session, why)
        await server.stop(GRACE_SECONDS)
        logger.info("stopped")

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, status)


def channel_options(limits: LimitSettings) -> list[tuple[str, int]]:
    """GRPC's own limits: message size, streams, pings, dead connections."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.max_metadata_size", 16_384),
        ("grpc.keepalive_time_ms", int(limits.keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout_seconds * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 2),
    ]
