"""The service's settings: one YAML file of sections, each key typed, checked and explained.

An unknown section, an unknown key or a bad value is an error that names the file and what is
allowed. `default` and `groups` can change while the service runs; the rest is read at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from batchpilot.agents.canary import CanaryParameters
from batchpilot.agents.parameters import ConfigError, Parameters, parameter

LARGEST_LEASE_MS = 60_000


@dataclass(frozen=True)
class ServerSettings(Parameters):
    """Section `server`: where it listens and how it stops."""

    bind: str = parameter("127.0.0.1:50061", help="HOST:PORT of the gRPC port")
    insecure_bind: bool = parameter(
        False, help="allow a bind beyond loopback without TLS, or without a way to tell who calls"
    )
    reflection: bool = parameter(False, help="answer gRPC reflection, for grpcurl and buf curl")
    drain_seconds: float = parameter(
        5.0, minimum=0, maximum=600, help="time between NOT_SERVING and the end of the streams"
    )
    json_logs: bool = parameter(False, help="log one JSON object a line")


@dataclass(frozen=True)
class LimitSettings(Parameters):
    """Section `limits`: what one service, and one client of it, may ask for."""

    max_sessions: int = parameter(4000, minimum=1, help="engines at once")
    max_watchers: int = parameter(64, minimum=1, help="WatchEngine streams at once")
    max_streams_per_connection: int = parameter(
        1000, minimum=1, help="HTTP/2 streams one connection may hold"
    )
    max_message_bytes: int = parameter(
        262_144, minimum=4096, help="largest request that is read at all"
    )
    reports_per_second: float = parameter(
        20.0, above=0, help="reports one engine may send, averaged"
    )
    report_burst: int = parameter(200, minimum=1, help="reports it may send at once")
    calls_per_second: float = parameter(
        100.0, above=0, help="calls one client may make, averaged: streams opened, unary calls"
    )
    call_burst: int = parameter(2000, minimum=1, help="calls it may make at once")
    keepalive_seconds: float = parameter(
        20.0, minimum=1, help="a connection silent for so long is pinged"
    )
    keepalive_timeout_seconds: float = parameter(
        10.0, minimum=1, help="one that does not answer the ping for so long is closed"
    )


@dataclass(frozen=True)
class TlsSettings(Parameters):
    """Section `tls`: files in PEM; replaced files are taken up without a restart."""

    certificate: str | None = parameter(None, help="the server's certificate chain")
    key: str | None = parameter(None, help="its private key")
    client_ca: str | None = parameter(
        None, help="demand a client certificate that one of these authorities has signed"
    )

    def __post_init__(self) -> None:
        """Checks that the files come together."""
        super().__post_init__()
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("certificate and key come together; give both")
        if self.client_ca is not None and self.certificate is None:
            raise ConfigError("client_ca needs certificate and key")


@dataclass(frozen=True)
class AccessSettings(Parameters):
    """Section `access`: who may do what."""

    file: str | None = parameter(None, help="YAML file of clients: tokens, roles and scopes")
    certificate_names_engines: bool = parameter(
        True, help="with client certificates, an engine must bear a name of its certificate"
    )


@dataclass(frozen=True)
class MetricsSettings(Parameters):
    """Section `metrics`: the Prometheus page."""

    bind: str | None = parameter(None, help="HOST:PORT of the page; none when left out")
    allow_remote: bool = parameter(False, help="allow a page beyond loopback; it has no TLS")
    max_engines: int = parameter(
        1000, minimum=0, help="engines with series of their own; the rest only count in their group"
    )


@dataclass(frozen=True)
class StorageSettings(Parameters):
    """Section `storage`: the folders."""

    registry: str | None = parameter(
        None, help="folder of learned policies; else $BATCHPILOT_POLICIES, or the usual one"
    )
    state: str | None = parameter(
        None, help="file that keeps promotions over restarts and shares them between replicas"
    )
    experience: str | None = parameter(None, help="folder of the experience log; none: no log")
    experience_share: float = parameter(
        1.0, above=0, maximum=1, help="share of the engines that are in it; each row costs CPU"
    )
    experience_max_bytes: int = parameter(
        2**30, minimum=2**16, help="size of that log after which its oldest files go"
    )


@dataclass(frozen=True)
class CanarySettings(CanaryParameters):
    """Section `canary`: when a policy that is tried on a share goes back, or on to all.

    `share` is that of each promotion, and no setting.
    """

    judged: bool = parameter(
        True, help="end trials by their verdict; false leaves that to an admin"
    )
    one_sided_seconds: float = parameter(
        60.0, above=0, help="a trial with nobody on one side goes back, or is a problem, after it"
    )


@dataclass(frozen=True)
class GroupSettings(Parameters):
    """Section `default`, and each entry of `groups`: how engines of one group are steered."""

    policy: str = parameter("predictive", help="what decides, as `name` or `name:key=value`")
    itl_slo_ms: float | None = parameter(
        None, above=0, help="inter-token target of engines that state none"
    )
    ttft_slo_ms: float | None = parameter(
        None, above=0, help="first-token target of engines that state none"
    )
    memory_overflow_probability: float | None = parameter(
        None, above=0, below=0.5, help="how often the KV cache may overflow"
    )
    min_num_seqs: int = parameter(1, minimum=1, help="least sequence limit")
    max_num_seqs: int | None = parameter(None, minimum=1, help="greatest sequence limit")
    report_interval_ms: int = parameter(
        250, minimum=50, maximum=10_000, help="how often engines report"
    )
    lease_ms: int = parameter(
        2000, minimum=100, maximum=LARGEST_LEASE_MS, help="how long limits are valid"
    )

    def __post_init__(self) -> None:
        """Checks the values against each other too."""
        super().__post_init__()
        if self.lease_ms < 2 * self.report_interval_ms:
            raise ConfigError(
                f"lease_ms={self.lease_ms} must be at least twice report_interval_ms="
                f"{self.report_interval_ms}, or one late report ends it"
            )
        if self.max_num_seqs is not None and self.max_num_seqs < self.min_num_seqs:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} must be at least min_num_seqs="
                f"{self.min_num_seqs}"
            )


@dataclass(frozen=True)
class ServiceSettings:
    """Every section of the file."""

    server: ServerSettings = field(default_factory=ServerSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    access: AccessSettings = field(default_factory=AccessSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    default: GroupSettings = field(default_factory=GroupSettings)
    groups: Mapping[str, GroupSettings] = field(default_factory=dict)

    def needing_a_restart(self, newer: ServiceSettings) -> list[str]:
        """What differs from newer settings and is only read at start, as `section.key`."""
        return [
            f"{section}.{key}"
            for section, kind in SECTIONS.items()
            for key in kind.names()
            if getattr(getattr(self, section), key) != getattr(getattr(newer, section), key)
        ]


#: The sections that are only read at start, by name.
SECTIONS: dict[str, type[Parameters]] = {
    "server": ServerSettings,
    "limits": LimitSettings,
    "tls": TlsSettings,
    "access": AccessSettings,
    "metrics": MetricsSettings,
    "storage": StorageSettings,
    "canary": CanarySettings,
}
#: A section's key that no file may set.
NO_SETTING = ("canary", "share")


def read_settings(path: Path | None) -> ServiceSettings:
    """Reads the file; every default when there is none.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or holds what does not fit.
    """
    if path is None:
        return ServiceSettings()
    return parse_settings(load_yaml(path), where=str(path))


def load_yaml(path: Path) -> Mapping[str, Any]:
    """A YAML file's mapping; empty for an empty file.

    Raises:
        ConfigError: It cannot be read or is no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({_where_and_why(error)})") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    return mapping({} if content is None else content, where=str(path))


def _where_and_why(error: Exception) -> str:
    """A YAML error without the line it quotes: that may hold a token, and the text is logged."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"{getattr(error, 'problem', '')}, line {mark.line + 1}, column {mark.column + 1}"


class _Loader(yaml.SafeLoader):
    """Names a value that looks like a date or a number and is none."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As the loader it extends, but what it cannot make sense of is a YAMLError."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{node.value!r} is no {kind} ({error}); put text in quotes"
            raise ConstructorError(None, None, problem, node.start_mark) from None


def parse_settings(content: Mapping[str, Any], *, where: str) -> ServiceSettings:
    """Checks the sections of a file.

    Raises:
        ConfigError: An unknown section or key, or a value that does not fit.
    """
    allowed = [item.name for item in fields(ServiceSettings)]
    for name in content:
        if name not in allowed:
            raise ConfigError(f"{where}: unknown section {name!r}; allowed: {', '.join(allowed)}")
    given = {name: _section(content.get(name), where=f"{where}: {name}") for name in allowed}
    section, key = NO_SETTING
    if key in given[section]:
        raise ConfigError(f"{where}: {section}: {key} is given with each promotion, not here")
    sections: dict[str, Any] = {
        name: kind.from_mapping(given[name], where=f"{where}: {name}")
        for name, kind in SECTIONS.items()
    }
    shared, groups = given["default"], given["groups"]
    return ServiceSettings(
        **sections,
        default=GroupSettings.from_mapping(shared, where=f"{where}: default"),
        groups={
            str(name): _group(shared, values, where=f"{where}: groups: {name}")
            for name, values in groups.items()
        },
    )


def _group(shared: Mapping[str, Any], values: Any, *, where: str) -> GroupSettings:
    """A group's own keys over those of `default`."""
    own = _section(values, where=where)
    return GroupSettings.from_mapping({**shared, **own}, where=where)


def _section(value: Any, *, where: str) -> Mapping[str, Any]:
    """A section's keys; none where it is left empty."""
    return mapping({} if value is None else value, where=where)


def mapping(value: Any, *, where: str) -> Mapping[str, Any]:
    """The value, if it is a mapping.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {value!r} is not a mapping of keys to values")
    return value
