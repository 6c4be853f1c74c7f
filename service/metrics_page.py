"""The port that serves the Prometheus page."""

from __future__ import annotations

import logging
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from batchpilot.agents.parameters import ConfigError
from batchpilot.service.addresses import Address
from batchpilot.service.meters import Meters
from batchpilot.service.metrics import ServiceCollector
from batchpilot.service.recorder import Recorder
from batchpilot.service.sessions import SessionTable
from batchpilot.service.settings import MetricsSettings

logger = logging.getLogger("batchpilot.service")


class MetricsPage:
    """Serves the page, if it has an address, in a thread of its own.

    Attributes:
        address: With the port that was chosen, once open; None without a page.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        meters: Meters,
        sessions: SessionTable,
        recorder: Recorder | None = None,
    ) -> None:
        """Opens nothing yet."""
        self.address: Address | None = None
        if settings.bind is not None:
            self.address = Address.parse(settings.bind, where="metrics.bind")
        self._registry = CollectorRegistry()
        collector = ServiceCollector(meters, sessions, settings.max_engines, recorder)
        self._registry.register(collector)
        self._server: Any = None

    def open(self) -> None:
        """Begins to serve.

        Raises:
            ConfigError: The address cannot be used.
        """
        if self.address is None:
            return
        host, port = self.address
        try:
            self._server, _ = start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.bind={self.address}: cannot be opened ({error.strerror})"
            ) from None
        self.address = Address(host, self._server.server_port)
        logger.info("metrics on http://%s/metrics", self.address)

    def close(self) -> None:
        """Closes the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
