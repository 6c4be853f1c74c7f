"""How an engine reaches the tuning service: addresses, TLS files and the token, read afresh.

Files are read at every attempt, so that certificates and tokens rotate without a restart.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from batchpilot.agents.parameters import ConfigError

#: An answer is a few hundred bytes; what is longer is not from our service.
LONGEST_ANSWER_BYTES = 64 * 1024
_TARGET = re.compile(
    r"unix:/.+|(?:dns:///)?(?:[A-Za-z0-9_.-]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})"
)
#: What the service takes as a name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", LONGEST_ANSWER_BYTES),
    # Each attempt stands alone: gRPC's own backoff and its shared connections would add to ours.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # A name with several addresses: every attempt takes the next that answers.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
)


class ServiceSettings(Protocol):
    """What of the hook's settings is about the way to the service."""

    @property
    def service_targets(self) -> str:
        """Addresses, separated by commas."""

    @property
    def service_group(self) -> str:
        """The engines this one shares a policy with."""

    @property
    def service_engine(self) -> str | None:
        """This server's name in its group."""

    @property
    def service_ca_file(self) -> str | None:
        """Certificates that the service's is checked against."""

    @property
    def service_cert_file(self) -> str | None:
        """This engine's own certificate."""

    @property
    def service_key_file(self) -> str | None:
        """Its key."""

    @property
    def service_token_file(self) -> str | None:
        """A bearer token."""


def check(settings: ServiceSettings) -> None:
    """Checks addresses and files at start.

    Raises:
        ConfigError: Something that can never work, or would send a secret in clear.
    """
    targets = parse_targets(settings.service_targets)
    for name in ("service_group", "service_engine"):
        text = getattr(settings, name)
        if text is not None and not _NAME.fullmatch(text):
            raise ConfigError(
                f"{name}={text[:40]!r} must be 1 to 128 letters, digits or ._:/@- and begin with "
                "a letter or digit"
            )
    files = ("service_ca_file", "service_cert_file", "service_key_file", "service_token_file")
    for name in files:
        path = getattr(settings, name)
        if path is not None:
            _read(name, path)
    if (settings.service_cert_file is None) != (settings.service_key_file is None):
        raise ConfigError("service_cert_file and service_key_file go together: give both")
    if settings.service_cert_file and not settings.service_ca_file:
        raise ConfigError("service_cert_file needs service_ca_file, to know the service by")
    if settings.service_token_file and not settings.service_ca_file:
        exposed = next((t for t in targets if not _is_loopback(t)), None)
        if exposed is not None:
            raise ConfigError(
                f"service_token_file: the token would go to {exposed} in clear; "
                "set service_ca_file to use TLS"
            )


def parse_targets(text: str) -> tuple[str, ...]:
    """Reads `HOST:PORT`, `dns:///HOST:PORT` or `unix:/PATH`, several separated by commas.

    Raises:
        ConfigError: None, or one of another form.
    """
    targets = tuple(part.strip() for part in text.split(",") if part.strip())
    if not targets:
        raise ConfigError("service_targets is required in mode remote, such as localhost:50061")
    for target in targets:
        match = _TARGET.fullmatch(target)
        if match is None or (match["port"] and not 1 <= int(match["port"]) <= 65535):
            raise ConfigError(
                f"service_targets: {target!r} is not HOST:PORT, dns:///HOST:PORT or unix:/PATH"
            )
    return targets


def rotation(targets: tuple[str, ...]) -> Iterator[str]:
    """The targets in turn, for ever; engines start at different ones."""
    start = random.randrange(len(targets))
    return itertools.cycle(targets[start:] + targets[:start])


def open_channel(settings: ServiceSettings, target: str) -> Any:
    """A channel that nothing has been sent on yet.

    Raises:
        ConfigError: A file is gone.
    """
    import grpc

    if settings.service_ca_file is None:
        # What is not encrypted goes to the service alone, whatever the environment says of proxies.
        options = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0))
        return grpc.insecure_channel(target, options=options)
    key = certificate = None
    if settings.service_cert_file and settings.service_key_file:
        certificate = _read("service_cert_file", settings.service_cert_file)
        key = _read("service_key_file", settings.service_key_file)
    credentials = grpc.ssl_channel_credentials(
        _read("service_ca_file", settings.service_ca_file), key, certificate
    )
    return grpc.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)


def call_metadata(settings: ServiceSettings) -> tuple[tuple[str, str], ...]:
    """What every call says of its caller.

    Raises:
        ConfigError: The token's file is gone or holds no token.
    """
    if settings.service_token_file is None:
        return ()
    token = _read("service_token_file", settings.service_token_file).decode("ascii", "replace")
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"service_token_file: {settings.service_token_file} holds no token")
    return (("authorization", f"Bearer {token}"),)


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path} ({error.strerror})") from None


def _is_loopback(target: str) -> bool:
    if target.startswith("unix:"):
        return True
    host = target.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
