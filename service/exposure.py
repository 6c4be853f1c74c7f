"""Whether the addresses are safe to listen on; refused before anything is opened."""

from __future__ import annotations

from batchpilot.agents.parameters import ConfigError
from batchpilot.service.addresses import Address
from batchpilot.service.settings import ServiceSettings


def check_exposure(settings: ServiceSettings) -> None:
    """Refuses to be reached from elsewhere without TLS, or without a way to tell who calls.

    Raises:
        ConfigError: Naming what is missing.
    """
    address = Address.parse(settings.server.bind, where="bind")
    if not address.is_loopback and not settings.server.insecure_bind:
        if settings.tls.certificate is None:
            raise ConfigError(
                f"bind={address} can be reached from elsewhere and has no TLS: set tls.certificate "
                "and tls.key, or say --insecure-bind"
            )
        if settings.tls.client_ca is None and settings.access.file is None:
            raise ConfigError(
                f"bind={address} can be reached from elsewhere and anybody could be an admin: set "
                "access.file or tls.client_ca, or say --insecure-bind"
            )
    if settings.metrics.bind is not None:
        metrics = Address.parse(settings.metrics.bind, where="metrics.bind")
        if not metrics.is_loopback and not settings.metrics.allow_remote:
            raise ConfigError(
                f"metrics.bind={metrics} can be reached from elsewhere, without TLS or token: set "
                "metrics.allow_remote to true if that is meant"
            )
