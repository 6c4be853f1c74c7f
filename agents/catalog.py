"""Every policy by name, and the text form in which one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchpilot.agents.combined import MemorySlaParameters, MemorySlaPolicy
from batchpilot.agents.memory import (
    MemoryCltParameters,
    MemoryCltPolicy,
    MemoryParameters,
    MemoryPolicy,
)
from batchpilot.agents.memory_peak import MemoryPeakParameters, MemoryPeakPolicy
from batchpilot.agents.parameters import ConfigError, Parameters
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.sla import SlaGuardedPolicy, SlaParameters, SlaPolicy
from batchpilot.agents.static import StaticParameters, StaticPolicy


@dataclass(frozen=True)
class PolicyKind:
    """How a policy is built: its parameters, and the class that takes them.

    Attributes:
        parameters: Its settings.
        build: Takes them, and makes a fresh policy.
        needs_steps: Whether, with these parameters, it learns from what only single steps and
            sequences tell; others are content with sums over an interval.
    """

    parameters: type[Parameters]
    build: Callable[[Any], LimitPolicy]
    needs_steps: Callable[[Any], bool] = lambda params: False


def _always(params: Parameters) -> bool:
    """Learns lengths, one request at a time."""
    del params
    return True


POLICIES: dict[str, PolicyKind] = {
    "static": PolicyKind(StaticParameters, StaticPolicy),
    "memory": PolicyKind(MemoryParameters, MemoryPolicy),
    "memory-clt": PolicyKind(MemoryCltParameters, MemoryCltPolicy, _always),
    "memory-peak": PolicyKind(MemoryPeakParameters, MemoryPeakPolicy, _always),
    "sla": PolicyKind(SlaParameters, SlaPolicy),
    "sla-guarded": PolicyKind(SlaParameters, SlaGuardedPolicy),
    "memory+sla": PolicyKind(
        MemorySlaParameters, MemorySlaPolicy, lambda params: params.memory != "memory"
    ),
}


def policy_kind(name: str) -> PolicyKind:
    """The policy behind a name.

    Raises:
        ConfigError: No policy has that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]


@dataclass(frozen=True)
class PolicySpec:
    """A policy's name and the parameters given for it: `memory:memory_factor=0.9`."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Reads `name` or `name:key=value:key=value`.

        Raises:
            ConfigError: The text has another form. Names and keys are checked by `build`.
        """
        name, *pairs = text.strip().split(":")
        parameters = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (key and equals and value):
                raise ConfigError(f"policy {text!r}: {pair!r} is not key=value")
            if key in parameters:
                raise ConfigError(f"policy {text!r}: {key} is given twice")
            parameters[key] = value
        return cls(name, parameters)

    def build(self, defaults: Mapping[str, Any] | None = None) -> LimitPolicy:
        """Makes a fresh policy.

        Args:
            defaults: Shared settings such as `itl_slo_ms`; a policy takes those it has a
                parameter for, where the spec itself gives none and the default is not None.

        Raises:
            ConfigError: Unknown policy or key, or a value that does not fit.
        """
        kind = policy_kind(self.name)
        return kind.build(self._read(kind, defaults))

    def needs_steps(self, defaults: Mapping[str, Any] | None = None) -> bool:
        """Whether the policy must be shown every step, and not only sums over an interval.

        Raises:
            ConfigError: As `build`.
        """
        kind = policy_kind(self.name)
        return kind.needs_steps(self._read(kind, defaults))

    def _read(self, kind: PolicyKind, defaults: Mapping[str, Any] | None) -> Parameters:
        accepted = kind.parameters.names()
        shared = {k: v for k, v in (defaults or {}).items() if k in accepted and v is not None}
        return kind.parameters.from_mapping(
            {**shared, **self.parameters}, where=f"policy {self.name!r}"
        )

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return ":".join([self.name, *(f"{k}={v}" for k, v in self.parameters.items())])
