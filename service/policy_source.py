"""Where policies come from: the analytic ones by name, the learned ones from the registry.

A learned policy's network is loaded once for all engines that run it; each engine has its own
memory of what it has seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from batchpilot.agents.artefact import Artefact, sha256_hex
from batchpilot.agents.catalog import (
    POLICIES,
    SELF_CONTAINED,
    PolicySpec,
    learned_policy,
    policy_kind,
)
from batchpilot.agents.learned import LearnedParameters, LearnedPolicy
from batchpilot.agents.learned_model import OnnxModel
from batchpilot.agents.manifest import ArtefactError
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.registry import PolicyRegistry
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.refusals import RefusalError
from batchpilot.service.settings import GroupSettings, ServiceSettings

LEARNED = "learned"
#: Stand in for targets that a group has not set, when a policy is tried before it is used.
TRIAL_TARGETS: Mapping[str, float] = {"itl_slo_ms": 50.0, "ttft_slo_ms": 1000.0}

Targets = Mapping[str, float | None]


class BuiltPolicy(NamedTuple):
    """A fresh policy, and whether it must be shown every step."""

    policy: LimitPolicy
    needs_steps: bool


class LoadedNetwork(NamedTuple):
    """A learned policy that is ready for engines."""

    artefact: Artefact
    model: OnnxModel


class PolicySource:
    """Builds policies from their texts.

    Args:
        folder: The registry; None for the one that the environment names.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Loads nothing yet."""
        self._registry = PolicyRegistry(folder)
        self._networks: dict[tuple[str, str], LoadedNetwork] = {}

    def build(self, text: str, group: str, targets: Targets) -> BuiltPolicy:
        """A fresh policy for one engine.

        Args:
            text: The policy's text.
            group: The engine's, for a learned policy without a version.
            targets: Shared settings; those that the policy has no parameter for are left out.

        Raises:
            ConfigError: There is none of that text, or it cannot be used with these targets.
        """
        spec = PolicySpec.parse(text)
        if spec.name == LEARNED:
            return BuiltPolicy(self._build_learned(spec, group, targets), needs_steps=True)
        return BuiltPolicy(spec.build(targets), spec.needs_steps(targets))

    def forget_networks(self) -> None:
        """Looks up anew, from now on, which version of a learned policy is in force."""
        self._networks.clear()

    def check_groups(self, settings: ServiceSettings) -> None:
        """Tries every policy that the settings name, and so loads the learned ones.

        Raises:
            ConfigError: Naming the group.
        """
        for name, group in {"default": settings.default, **settings.groups}.items():
            try:
                self.build(group.policy, name, trial_targets(group))
            except ConfigError as error:
                where = name if name == "default" else f"group {name}"
                raise ConfigError(f"{where}: {error}") from None

    async def verify(self, text: str, group: str, every: Sequence[Targets]) -> None:
        """Tries a policy that somebody asks for over the network.

        Args:
            text: The policy's text.
            group: For which.
            every: The targets it must do with, such as those of the group's engines.

        Raises:
            RefusalError: NOT_FOUND, INVALID_ARGUMENT or FAILED_PRECONDITION.
        """
        try:
            spec = PolicySpec.parse(text)
            if spec.name not in POLICIES:
                known = ", ".join(POLICIES)
                raise _refusal(
                    grpc.StatusCode.NOT_FOUND, f"no policy {spec.name[:40]!r}; there are: {known}"
                )
            if spec.name == LEARNED:
                self._check_in_registry(str(spec.parameters.get("artefact", "")))
            for targets in every:
                await asyncio.to_thread(self.build, text, group, targets)
        except ArtefactError as error:
            raise _refusal(grpc.StatusCode.FAILED_PRECONDITION, error) from None
        except ConfigError as error:
            text = with_its_fix(error, group)
            raise _refusal(grpc.StatusCode.INVALID_ARGUMENT, text) from None

    def list(self) -> list[pb.PolicyInfo]:
        """Every policy there is; reads the registry's files."""
        analytic = [
            pb.PolicyInfo(policy=name, summary=_summary(POLICIES[name].build.__doc__))
            for name in SELF_CONTAINED
        ]
        learned = [
            self._describe(name, version)
            for name in self._registry.names()
            for version in self._registry.versions(name)
        ]
        return analytic + learned

    def listed_as(self, text: str, group: str) -> str:
        """What `list` calls a policy that a group has."""
        spec = PolicySpec.parse(text)
        if spec.name != LEARNED:
            return spec.name
        name, at, version = str(spec.parameters.get("artefact", "")).partition("@")
        with suppress(ArtefactError):  # listed with what is wrong
            version = version if at else self._registry.load_current(name, group).manifest.version
        return f"{LEARNED}:{name}@{version}"

    def _build_learned(self, spec: PolicySpec, group: str, targets: Targets) -> LearnedPolicy:
        accepted = LearnedParameters.names()
        given: dict[str, Any] = {k: v for k, v in targets.items() if k in accepted}
        params = policy_kind(LEARNED).parameters.from_mapping(
            {**given, "group": group, **spec.parameters}, where=f"policy {LEARNED!r}"
        )
        assert isinstance(params, LearnedParameters)
        network = self._network(params)
        return learned_policy(network.artefact, params, network.model.twin())

    def _network(self, params: LearnedParameters) -> LoadedNetwork:
        """Loads a network, once."""
        key = (params.artefact, params.group)
        if key not in self._networks:
            artefact = self._registry.resolve(params.artefact, params.group)
            # Another group's is taken whole: its file too would be held once for each of them.
            same = (known for known in self._networks.values() if known.artefact == artefact)
            self._networks[key] = next(same, None) or LoadedNetwork(artefact, OnnxModel(artefact))
        return self._networks[key]

    def _check_in_registry(self, text: str) -> None:
        """Lets nobody name a path of this machine, or a version that is not there.

        Raises:
            RefusalError: The text is no name, or there is no such policy.
        """
        name, at, version = text.partition("@")
        try:
            versions = self._registry.versions(name)
        except ArtefactError as error:
            raise _refusal(grpc.StatusCode.INVALID_ARGUMENT, error) from None
        if not versions or (at and version not in versions):
            known = ", ".join(versions) or "none"
            raise _refusal(
                grpc.StatusCode.NOT_FOUND,
                f"no policy {text[:80]!r} in the registry; versions of {name[:40]!r}: {known}",
            )

    def _describe(self, name: str, version: str) -> pb.PolicyInfo:
        info = pb.PolicyInfo(policy=f"{LEARNED}:{name}@{version}")
        try:
            artefact = self._registry.load(name, version)
        except ArtefactError as error:
            info.problem = str(error)
            return info
        manifest = artefact.manifest
        info.sha256 = sha256_hex(artefact.onnx)
        info.summary = f"a network of {artefact.parameters} numbers on {manifest.base_policy}"
        return info


def trial_targets(group: GroupSettings) -> dict[str, float | None]:
    """A group's targets, with stand-ins where it leaves them to its engines."""
    return {
        "itl_slo_ms": group.itl_slo_ms or TRIAL_TARGETS["itl_slo_ms"],
        "ttft_slo_ms": group.ttft_slo_ms or TRIAL_TARGETS["ttft_slo_ms"],
        "memory_overflow_probability": group.memory_overflow_probability,
    }


def with_its_fix(error: ConfigError, group: str) -> str:
    """What is wrong with a policy, and for a target that it cannot do without where to set it."""
    is_target = str(error).endswith("_slo_ms is required")
    return f"{error}: set it for group {group} or in its engines" if is_target else str(error)


def _summary(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _refusal(code: grpc.StatusCode, text: object) -> RefusalError:
    return RefusalError(code, "policy", str(text))
