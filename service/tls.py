"""Certificates of the server, taken up anew when their files change, without a restart.

gRPC asks before each handshake; connections that stand keep the certificates they began with.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

from batchpilot.agents.parameters import ConfigError
from batchpilot.service.settings import TlsSettings

logger = logging.getLogger("batchpilot.service")

FileState = tuple[int, int, int]


class CertificateFiles:
    """The files of a server's identity, and of those who may connect.

    Args:
        settings: Which files; certificate and key are set.

    Raises:
        ConfigError: They cannot be read or do not fit together.
    """

    def __init__(self, settings: TlsSettings) -> None:
        """Reads and checks them."""
        assert settings.certificate is not None and settings.key is not None
        self._certificate = Path(settings.certificate)
        self._key = Path(settings.key)
        self._client_ca = None if settings.client_ca is None else Path(settings.client_ca)
        self._lock = threading.Lock()  # handshakes run in threads of gRPC's own
        self._seen = self._states()
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For a port; demands a client certificate where there is a client authority."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, self._changed, self._client_ca is not None
        )

    def _changed(self) -> Any:
        """The new configuration if the files have changed since the last look; None otherwise."""
        with self._lock:
            try:
                states = self._states()
                if states == self._seen:
                    return None
                configuration = self._read()
            except (ConfigError, OSError) as error:
                # Perhaps only half of the files have been replaced: the next handshake looks again.
                logger.error("TLS: the certificates in use stay: %s", error)
                return None
            self._seen, self._configuration = states, configuration
            logger.info("TLS: new certificates from %s are in use", self._certificate)
            return configuration

    def _paths(self) -> list[Path]:
        return [p for p in (self._certificate, self._key, self._client_ca) if p is not None]

    def _states(self) -> tuple[FileState, ...]:
        try:
            found = [os.stat(path) for path in self._paths()]
        except OSError as error:
            raise ConfigError(f"tls: {error.filename}: {error.strerror}") from None
        return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in found)

    def _read(self) -> Any:
        """Reads the files, if they fit together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
            pair = (self._key.read_bytes(), self._certificate.read_bytes())
            authority = None if self._client_ca is None else self._client_ca.read_bytes()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            names = ", ".join(str(path) for path in self._paths())
            reason = getattr(error, "reason", None) or error
            raise ConfigError(f"tls: {names}: cannot be used together ({reason})") from None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)


def _no_password() -> str:
    raise ValueError("the key must not be encrypted")
