"""Who may do what: roles, tokens, certificates, and the engines a client may speak for.

The file of clients:

    clients:
      - {name: chat-fleet, role: engine, token_sha256: 9f86d0..., groups: [chat],
         engines: ["node-*"]}
      - {name: grafana, role: viewer, certificate: grafana.example.org}
      - {name: operators, role: admin, token: a-long-random-text}

A client is known by a token (given as itself or, better, as its SHA-256) or by a name in its
certificate. `groups` and `engines` are patterns that bind the role engine; without them it may
speak for any. A file of no clients says so: `clients: []`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.service.settings import load_yaml, mapping
from batchpilot.service.wire import EngineKey

SHORTEST_TOKEN = 16


class Role(StrEnum):
    """What a client is."""

    ENGINE = "engine"
    VIEWER = "viewer"
    ADMIN = "admin"


@dataclass(frozen=True)
class Scope:
    """The engines a client may speak for.

    Attributes:
        groups: Patterns of group names.
        engines: Patterns of engine names.
    """

    groups: tuple[str, ...] = ("*",)
    engines: tuple[str, ...] = ("*",)

    def allows(self, key: EngineKey) -> bool:
        """Whether it holds an engine."""
        return any(fnmatchcase(key.group, pattern) for pattern in self.groups) and any(
            fnmatchcase(key.engine, pattern) for pattern in self.engines
        )


@dataclass(frozen=True)
class Caller:
    """Whoever makes a call, once known.

    Attributes:
        name: For logs and rate limits.
        role: What it is.
        scopes: An engine it speaks for must be in all of them.
        client: Its entry in the file; None without one.
    """

    name: str
    role: Role
    scopes: tuple[Scope, ...] = ()
    client: Client | None = None

    def may_speak_for(self, key: EngineKey) -> bool:
        """Whether it may be this engine."""
        return all(scope.allows(key) for scope in self.scopes)


@dataclass(frozen=True)
class _ClientFields(Parameters):
    """The scalar keys of a client."""

    name: str = parameter(help="for logs and metrics")
    role: str = parameter(choices=tuple(Role), help="what it may do")
    token: str | None = parameter(None, help="what it presents")
    token_sha256: str | None = parameter(None, help="SHA-256 of what it presents, hexadecimal")
    certificate: str | None = parameter(None, help="a name in its certificate")

    def __post_init__(self) -> None:
        """Checks that it can be known, in one way."""
        super().__post_init__()
        given = [v for v in (self.token, self.token_sha256, self.certificate) if v is not None]
        if len(given) != 1:
            raise ConfigError(
                f"client {self.name!r} needs exactly one of token, token_sha256, certificate"
            )
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise ConfigError(
                f"client {self.name!r}: a token must have at least {SHORTEST_TOKEN} characters; "
                "try: openssl rand -hex 32"
            )
        digest = self.token_sha256
        if digest is not None and not _is_sha256(digest):
            raise ConfigError(f"client {self.name!r}: token_sha256 is not 64 hexadecimal digits")


@dataclass(frozen=True)
class Client:
    """One entry of the file.

    Attributes:
        name: For logs.
        role: What it may do.
        scope: The engines it may speak for.
        token_digest: SHA-256 of its token; None for one known by certificate.
        certificate: A name in its certificate; None for one known by token.
    """

    name: str
    role: Role
    scope: Scope
    token_digest: bytes | None
    certificate: str | None


@dataclass(frozen=True)
class AccessList:
    """Every client the service knows.

    Attributes:
        clients: Those of the file.
    """

    clients: tuple[Client, ...] = ()

    def by_token(self, token: str) -> Client | None:
        """The client of a token; the time taken says nothing of the tokens there are."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for client in self.clients:
            known = client.token_digest or bytes(len(digest))
            if hmac.compare_digest(known, digest):
                found = client
        return found

    def by_certificate(self, names: Iterable[str]) -> Client | None:
        """The first client that is known by one of a certificate's names."""
        there = set(names)
        return next((c for c in self.clients if c.certificate in there), None)


def read_access(path: Path | None) -> AccessList:
    """Reads the file of clients; an empty list without one.

    Raises:
        ConfigError: It cannot be read, is empty, others may read or change it, or an entry does not
            fit.
    """
    if path is None:
        return AccessList()
    content = load_yaml(path)
    unknown = sorted(set(content) - {"clients"}, key=str)
    if unknown:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; allowed: clients")
    entries = content.get("clients")
    if entries is None:  # as while an editor writes it anew
        raise ConfigError(f"{path}: empty; for no clients, say so: clients: []")
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: clients is not a list")
    clients = tuple(
        _client(entry, where=f"{path}: client {number}")
        for number, entry in enumerate(entries, start=1)
    )
    _check_permissions(path, secret=any("token" in entry for entry in entries))
    _check_unique(clients, where=str(path))
    return AccessList(clients)


def certificate_scope(names: Iterable[str]) -> Scope:
    """The engines that a certificate names: `NAME`, and `NAME:` with anything after it."""
    exact = [_literal(name) for name in names]
    return Scope(engines=(*exact, *(f"{name}:*" for name in exact)))


def _client(entry: Any, *, where: str) -> Client:
    values = dict(mapping(entry, where=where))
    groups = _patterns(values, "groups", where=where)
    engines = _patterns(values, "engines", where=where)
    fields = _ClientFields.from_mapping(values, where=where)
    role = Role(fields.role)
    if role is not Role.ENGINE and Scope(groups, engines) != Scope():
        raise ConfigError(f"{where}: groups and engines bind the role engine only")
    digest = None
    if fields.token is not None:
        digest = hashlib.sha256(fields.token.encode()).digest()
    elif fields.token_sha256 is not None:
        digest = bytes.fromhex(fields.token_sha256)
    return Client(fields.name, role, Scope(groups, engines), digest, fields.certificate)


def _patterns(values: dict[str, Any], key: str, *, where: str) -> tuple[str, ...]:
    given = values.pop(key, ["*"])
    if not isinstance(given, list) or not given or not all(isinstance(v, str) for v in given):
        raise ConfigError(f"{where}: {key}={given!r} is not a list of patterns such as ['node-*']")
    return tuple(given)


def _check_unique(clients: tuple[Client, ...], *, where: str) -> None:
    names = [client.name for client in clients]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"{where}: client {repeated!r} is there twice")


def _check_permissions(path: Path, *, secret: bool) -> None:
    """Refuses a file that others can change, or, where it holds tokens themselves, read."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o022:
        raise ConfigError(f"{path}: others may change it (mode {mode:04o}); try: chmod 600 {path}")
    if secret and mode & 0o077:
        raise ConfigError(
            f"{path}: it holds tokens and others may read it (mode {mode:04o}); "
            f"try: chmod 600 {path}, or keep token_sha256 instead"
        )


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdefABCDEF" for c in text)


def _literal(name: str) -> str:
    """A pattern that matches one name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """Common name and subject alternative names of a verified client certificate; empty without."""
    found = [
        value.decode(errors="replace")
        for key in ("x509_common_name", "x509_subject_alternative_name")
        for value in auth_context.get(key, ())
    ]
    return tuple(dict.fromkeys(found))
