"""One service: its parts put together, started, and stopped without a dropped call.

Stopping: health turns NOT_SERVING, so that a balancer sends nobody new; streams go on for
`drain_seconds`; then they end with UNAVAILABLE, which tells engines to go to another replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.access import read_access
from batchpilot.service.addresses import Address
from batchpilot.service.canaries import Canaries
from batchpilot.service.exposure import check_exposure
from batchpilot.service.gate import Gate
from batchpilot.service.groups import Groups
from batchpilot.service.health import HealthServicer
from batchpilot.service.meters import Meters
from batchpilot.service.metrics_page import MetricsPage
from batchpilot.service.policies import PolicyServicer
from batchpilot.service.policy_source import PolicySource
from batchpilot.service.promotions import Promotions
from batchpilot.service.rates import ClientRates
from batchpilot.service.recorder import Recorder
from batchpilot.service.refusals import STOPPING, RefusalError
from batchpilot.service.reload import Reloader, WatchedFile
from batchpilot.service.sessions import SessionTable
from batchpilot.service.settings import (
    LimitSettings,
    ServiceSettings,
    StorageSettings,
    load_yaml,
    read_settings,
)
from batchpilot.service.steering import Steering
from batchpilot.service.tls import CertificateFiles
from batchpilot.service.tuner import TunerServicer

logger = logging.getLogger("batchpilot.service")

SERVICE_NAMES = tuple(s.full_name for s in pb.DESCRIPTOR.services_by_name.values())
#: How long calls that remain may take to end by themselves at the very last.
GRACE_SECONDS = 1.0
#: Calls at once beside sessions and watchers: those that are answered and gone, or not yet known.
OTHER_CALLS = 1000
TIDY_SECONDS = 1.0


class Service:
    """The tuning service in one process.

    Args:
        settings: What it does, and where.
        config: The file they were read from; watched for changes of the groups.
        reread: Reads them again.

    Raises:
        ConfigError: Settings that cannot be used together, or a file that cannot be used.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        config: Path | None = None,
        reread: Callable[[], ServiceSettings] | None = None,
    ) -> None:
        """Puts the parts together; opens nothing yet."""
        check_exposure(settings)
        self._source = PolicySource(_path(settings.storage.registry))
        self._settings = settings
        self._config = config
        self._check_policies(settings)
        self._reread = reread or partial(read_settings, config)
        self.address = Address.parse(settings.server.bind, where="bind")
        self.meters = Meters()
        self.groups = Groups(settings.default, settings.groups)
        limits = settings.limits
        self.sessions = SessionTable(
            limits.max_sessions, limits.reports_per_second, limits.report_burst
        )
        self._gate = _gate(settings)
        state = _path(settings.storage.state)
        self._promotions = Promotions(self.groups, self.sessions, state)
        self._promotions.load()
        self._certificates = (
            None if settings.tls.certificate is None else CertificateFiles(settings.tls)
        )
        self._health = HealthServicer(self.meters)
        self._recorder = _recorder(settings.storage)
        self._page = MetricsPage(settings.metrics, self.meters, self.sessions, self._recorder)
        self._canaries = Canaries(self._promotions, self.sessions, settings.canary, self.meters)
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.reloader = Reloader(self._watched_files(), self.meters)
        self._put_together()

    async def start(self) -> Address:
        """Begins to serve; returns the address with the port that was chosen.

        Raises:
            ConfigError: An address cannot be used.
        """
        limits = self._settings.limits
        server = grpc.aio.server(
            options=channel_options(limits),
            maximum_concurrent_rpcs=limits.max_sessions + limits.max_watchers + OTHER_CALLS,
        )
        self._add_services(server)
        port = self._open_port(server)
        self._page.open()
        await server.start()
        self._server = server
        self.address = Address(self.address.host, port)
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._tasks = [
            asyncio.create_task(self.reloader.run()),
            asyncio.create_task(self._tidy()),
        ]
        logger.info("serving on %s, %s", self.address, self._how_safe())
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
        self._tuner.shut(
            RefusalError(grpc.StatusCode.UNAVAILABLE, STOPPING, "the service is shutting down")
        )
        await server.stop(GRACE_SECONDS)
        for task in self._tasks:
            task.cancel()
        self._page.close()
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.log.close)
        logger.info("stopped")

    def _put_together(self) -> None:
        source = self._source
        self._tuner = TunerServicer(
            self._gate,
            self.sessions,
            Steering(self.groups, source, self.meters, self._canaries, self._recorder),
            self.meters,
            self._settings.limits.max_watchers,
        )
        self._policies = PolicyServicer(
            self._gate, source, self._promotions, self.meters, self._canaries
        )

    def _add_services(self, server: grpc.aio.Server) -> None:
        tuner_pb2_grpc.add_TunerServiceServicer_to_server(self._tuner, server)
        tuner_pb2_grpc.add_PolicyServiceServicer_to_server(self._policies, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.server.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)

    def _open_port(self, server: grpc.aio.Server) -> int:
        try:
            if self._certificates is None:
                return int(server.add_insecure_port(str(self.address)))
            return int(server.add_secure_port(str(self.address), self._certificates.credentials()))
        except RuntimeError:
            raise ConfigError(f"bind={self.address}: cannot be opened; is it in use?") from None

    def _how_safe(self) -> str:
        tls = self._settings.tls
        encrypted = "without TLS" if tls.certificate is None else "with TLS"
        if self._settings.access.file is not None:
            return f"{encrypted}, callers known by {self._settings.access.file}"
        return f"{encrypted}, callers known by {'certificate' if tls.client_ca else 'nothing'}"

    def _watched_files(self) -> list[WatchedFile]:
        files = [
            (self._config, self._load_config),
            (_path(self._settings.access.file), self._load_access),
            (_path(self._settings.storage.state), self._promotions.load),
        ]
        return [WatchedFile(path, load) for path, load in files if path is not None]

    def _load_config(self) -> None:
        assert self._config is not None
        if not load_yaml(self._config):  # as while an editor writes it anew
            raise ConfigError(f"{self._config}: empty")
        read = self._reread()
        self._source.forget_networks()
        check_exposure(read)  # what no restart would take is not taken now
        self._check_policies(read)
        self.groups.configure(read.default, read.groups)
        later = self._settings.needing_a_restart(read)
        if later:
            logger.warning("%s: only a restart changes %s", self._config, ", ".join(later))

    def _check_policies(self, settings: ServiceSettings) -> None:
        """Tries every policy of the settings.

        Raises:
            ConfigError: Naming the file, where there is one, and the group.
        """
        try:
            self._source.check_groups(settings)
        except ConfigError as error:
            where = "" if self._config is None else f"{self._config}: "
            raise ConfigError(f"{where}{error}") from None

    def _load_access(self) -> None:
        self._gate.access = read_access(_path(self._settings.access.file))
        self._tuner.end_unknown()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            for work in (self.sessions.sweep, self._canaries.judge, self._promotions.end_holds):
                try:
                    work()
                except Exception:
                    logger.exception("a fault of ours; it is tried again in %g s", TIDY_SECONDS)


def channel_options(limits: LimitSettings) -> list[tuple[str, Any]]:
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


def _gate(settings: ServiceSettings) -> Gate:
    limits = settings.limits
    return Gate(
        read_access(_path(settings.access.file)),
        ClientRates(limits.calls_per_second, limits.call_burst),
        is_open=settings.access.file is None and settings.tls.client_ca is None,
        certificate_names_engines=settings.access.certificate_names_engines,
    )


def _recorder(settings: StorageSettings) -> Recorder | None:
    """The experience log, if there is to be one.

    Raises:
        ConfigError: Its folder cannot be used.
    """
    if settings.experience is None:
        return None
    # pyarrow costs every process tens of MiB.
    from batchpilot.service.experience import ExperienceLog, ExperienceSettings

    kept = ExperienceSettings(settings.experience, max_bytes=settings.experience_max_bytes)
    try:
        return Recorder(ExperienceLog(kept), settings.experience_share)
    except OSError as error:
        raise ConfigError(f"experience={settings.experience}: {error.strerror}") from None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
