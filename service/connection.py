"""How a command on somebody's desk reaches a running service: address, TLS files, token.

Files are read again for every connection: certificates and tokens are replaced now and then.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from batchpilot.agents.parameters import ConfigError
from batchpilot.service.addresses import Address

#: Longest wait for the answer to a single call.
ANSWER_SECONDS = 10.0
#: What is not encrypted goes to the service alone, whatever the environment says of proxies.
_NO_PROXY = (("grpc.enable_http_proxy", 0),)
#: How gRPC begins where no address lets it in, as a service with TLS lets nobody in without it.
_NOT_CONNECTED = "failed to connect"


class Connection(NamedTuple):
    """A way to the service.

    Attributes:
        channel: For stubs.
        metadata: What every call says of its caller.
    """

    channel: Any
    metadata: tuple[tuple[str, str], ...]


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a service and what it is shown."""
    parser.add_argument(
        "--target",
        default="localhost:50061",
        metavar="HOST:PORT",
        help="the service; also dns:///HOST:PORT or unix:/PATH (default: %(default)s)",
    )
    parser.add_argument("--ca-file", type=Path, help="PEM certificates to check the service's by")
    parser.add_argument("--cert-file", type=Path, help="own PEM certificate, for mutual TLS")
    parser.add_argument("--key-file", type=Path, help="its key")
    parser.add_argument("--token-file", type=Path, help="file that holds a bearer token")


@contextmanager
def connection(args: argparse.Namespace) -> Iterator[Connection]:
    """Reads the files and opens a channel, closed at the end; nothing has been sent on it yet.

    Args:
        args: With the options above.

    Raises:
        ConfigError: An address or a file that cannot be used, options that make no sense together,
            or a token that would be sent in clear.
    """
    is_local = _is_this_machine(args.target)
    if (args.cert_file is None) != (args.key_file is None):
        raise ConfigError("--cert-file and --key-file go together: give both")
    if args.cert_file is not None and args.ca_file is None:
        raise ConfigError("--cert-file needs --ca-file, to know the service by")
    if args.token_file is not None and args.ca_file is None and not is_local:
        raise ConfigError(
            f"--token-file: the token would go to {args.target} in clear; give --ca-file for TLS"
        )
    metadata = _authorization(args.token_file)
    with _channel(args) as channel:
        yield Connection(channel, metadata)


def said(error: grpc.RpcError, args: argparse.Namespace) -> str:
    """A failed call in one line, with what may mend it."""
    code, details, hint = error.code(), error.details() or "", ""
    if details.startswith(_NOT_CONNECTED) and args.ca_file is None:
        hint = " (a service with TLS needs --ca-file)"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        hint = " (see --token-file, and --cert-file)"
    return f"{code.name}: {details}{hint}"


def _channel(args: argparse.Namespace) -> Any:
    if args.ca_file is None:
        return grpc.insecure_channel(args.target, options=_NO_PROXY)
    key, certificate = _content(args.key_file), _content(args.cert_file)
    credentials = grpc.ssl_channel_credentials(_content(args.ca_file), key, certificate)
    return grpc.secure_channel(args.target, credentials)


def _is_this_machine(target: str) -> bool:
    """Whether what is sent there stays on this machine.

    Raises:
        ConfigError: No address.
    """
    if target.startswith("unix:"):
        return True
    return Address.parse(target.removeprefix("dns:///"), where="--target").is_loopback


def _authorization(path: Path | None) -> tuple[tuple[str, str], ...]:
    content = _content(path)
    if content is None:
        return ()
    token = content.decode("ascii", "replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{path}: holds no token")
    return (("authorization", f"Bearer {token}"),)


def _content(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
