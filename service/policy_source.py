"""Where policies come from: the analytic ones by name, the learned ones from the registry."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

import grpc

from batchpilot.agents.catalog import POLICIES, PolicySpec
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.policy import LimitPolicy
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.refusals import RefusalError
from batchpilot.service.settings import GroupSettings, ServiceSettings

#: Stand in for targets that a group has not set, when a policy is tried before it is promoted.
TRIAL_TARGETS: Mapping[str, float] = {"itl_slo_ms": 50.0, "ttft_slo_ms": 1000.0}


class BuiltPolicy(NamedTuple):
    """A fresh policy, and whether it must be shown every step."""

    policy: LimitPolicy
    needs_steps: bool


class PolicySource:
    """Builds policies from their texts."""

    def build(self, text: str, group: str, targets: Mapping[str, float | None]) -> BuiltPolicy:
        """A fresh policy for one engine.

        Raises:
            ConfigError: There is none of that text, or it cannot be used with these targets.
        """
        del group
        spec = PolicySpec.parse(text)
        return BuiltPolicy(spec.build(targets), spec.needs_steps(targets))

    def check_groups(self, settings: ServiceSettings) -> None:
        """Tries every policy that the settings name.

        Raises:
            ConfigError: Naming the group.
        """
        for name, group in {"default": settings.default, **settings.groups}.items():
            try:
                self.build(group.policy, name, trial_targets(group))
            except ConfigError as error:
                raise ConfigError(f"group {name}: {error}") from None

    async def verify(self, text: str, group: str) -> None:
        """Tries whether a policy can be built.

        Raises:
            RefusalError: NOT_FOUND, INVALID_ARGUMENT or FAILED_PRECONDITION.
        """
        try:
            spec = PolicySpec.parse(text)
        except ConfigError as error:
            raise _refusal(grpc.StatusCode.INVALID_ARGUMENT, error) from None
        if spec.name not in POLICIES:
            known = ", ".join(POLICIES)
            raise _refusal(
                grpc.StatusCode.NOT_FOUND, f"no policy {spec.name!r}; there are: {known}"
            )
        try:
            await asyncio.to_thread(self.build, text, group, TRIAL_TARGETS)
        except ConfigError as error:
            raise _refusal(grpc.StatusCode.INVALID_ARGUMENT, error) from None

    def list(self) -> list[pb.PolicyInfo]:
        """Every policy there is."""
        return [
            pb.PolicyInfo(policy=name, summary=_summary(kind.build.__doc__))
            for name, kind in POLICIES.items()
        ]


def trial_targets(group: GroupSettings) -> dict[str, float | None]:
    """A group's targets, with stand-ins where it leaves them to its engines."""
    return {
        "itl_slo_ms": group.itl_slo_ms or TRIAL_TARGETS["itl_slo_ms"],
        "ttft_slo_ms": group.ttft_slo_ms or TRIAL_TARGETS["ttft_slo_ms"],
        "memory_overflow_probability": group.memory_overflow_probability,
    }


def _summary(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _refusal(code: grpc.StatusCode, text: object) -> RefusalError:
    return RefusalError(code, "policy", str(text))
