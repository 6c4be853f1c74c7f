"""Every policy by name, and the text form in which one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchpilot.agents.artefact import Artefact
from batchpilot.agents.bandit import BanditParameters, BanditPolicy
from batchpilot.agents.combined import MemorySlaParameters, MemorySlaPolicy
from batchpilot.agents.concurrency import (
    AimdParameters,
    AimdPolicy,
    Gradient2Parameters,
    Gradient2Policy,
)
from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.learned import LearnedParameters, LearnedPolicy
from batchpilot.agents.learned_model import OnnxModel, PolicyModel
from batchpilot.agents.memory import (
    MemoryCltParameters,
    MemoryCltPolicy,
    MemoryParameters,
    MemoryPolicy,
)
from batchpilot.agents.memory_peak import MemoryPeakParameters, MemoryPeakPolicy
from batchpilot.agents.p_pas import PPasParameters, PPasPolicy
from batchpilot.agents.parameters import ConfigError, Parameters
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.predictive import PredictiveParameters, PredictivePolicy
from batchpilot.agents.registry import PolicyRegistry
from batchpilot.agents.sla import SlaGuardedPolicy, SlaParameters, SlaPolicy
from batchpilot.agents.static import StaticParameters, StaticPolicy
from batchpilot.agents.trtllm import TrtllmParameters, TrtllmPolicy


@dataclass(frozen=True)
class PolicyKind:
    """How a policy is built: its parameters, and the class that takes them.

    Attributes:
        parameters: Their class.
        build: Takes them; its docstring is the policy's.
        positional: The parameter that may be given without its name, first: `learned:PATH`.
        fingerprint: Names what the parameters point to on disk and may change there.
        needs_steps: Whether, with these parameters, it learns from what only single steps and
            sequences tell; others are content with sums over an interval.
    """

    parameters: type[Parameters]
    build: Callable[[Any], LimitPolicy]
    positional: str | None = None
    fingerprint: Callable[[Any], str] | None = None
    needs_steps: Callable[[Any], bool] = lambda params: False


def _always(params: Parameters) -> bool:
    """Learns from single lengths, step times or peaks."""
    del params
    return True


def build_learned(params: LearnedParameters) -> LearnedPolicy:
    """Reads, checks and loads a trained policy, and builds its base.

    Raises:
        ConfigError: It is not there, or cannot be used.
    """
    artefact = find_learned(params)
    return learned_policy(artefact, params)


def learned_policy(
    artefact: Artefact, targets: LatencyTargets, model: PolicyModel | None = None
) -> LearnedPolicy:
    """A fresh policy on an artefact that has been read and checked.

    Args:
        artefact: The trained policy.
        targets: The latency targets; those not set are the artefact's.
        model: Its network, where that is loaded already; one model serves one policy.

    Raises:
        ConfigError: onnxruntime refuses it, or its base policy cannot be built.
    """
    trained = artefact.manifest.targets
    defaults = {
        "itl_slo_ms": targets.itl_slo_ms or trained.itl_slo_ms,
        "ttft_slo_ms": targets.ttft_slo_ms or trained.ttft_slo_ms,
    }
    base = PolicySpec.parse(artefact.manifest.base_policy).build(defaults)
    return LearnedPolicy(model or OnnxModel(artefact), artefact.manifest, base, targets)


def find_learned(params: LearnedParameters) -> Artefact:
    """Reads and checks the artefact that the parameters name.

    Raises:
        ArtefactError: It is not there, or cannot be used.
    """
    if not params.artefact:
        raise ConfigError("artefact is required: a folder, NAME@VERSION or NAME")
    return PolicyRegistry().resolve(params.artefact, params.group)


def _learned_fingerprint(params: LearnedParameters) -> str:
    return find_learned(params).fingerprint


def build_bandit(params: BanditParameters) -> BanditPolicy:
    """Builds the base policy, and the bandit around it.

    Raises:
        ConfigError: The base policy needs a target that is not set.
    """
    targets = {"itl_slo_ms": params.itl_slo_ms, "ttft_slo_ms": params.ttft_slo_ms}
    return BanditPolicy(params, PolicySpec(params.base).build(targets))


def _bandit_needs_steps(params: BanditParameters) -> bool:
    """What its base policy needs; its own reward is made of sums."""
    return PolicySpec(params.base).needs_steps({"itl_slo_ms": params.itl_slo_ms})


build_learned.__doc__ = LearnedPolicy.__doc__
build_bandit.__doc__ = BanditPolicy.__doc__

POLICIES: dict[str, PolicyKind] = {
    "static": PolicyKind(StaticParameters, StaticPolicy),
    "memory": PolicyKind(MemoryParameters, MemoryPolicy),
    "memory-clt": PolicyKind(MemoryCltParameters, MemoryCltPolicy, needs_steps=_always),
    "memory-peak": PolicyKind(MemoryPeakParameters, MemoryPeakPolicy, needs_steps=_always),
    "sla": PolicyKind(SlaParameters, SlaPolicy),
    "sla-guarded": PolicyKind(SlaParameters, SlaGuardedPolicy),
    "memory+sla": PolicyKind(
        MemorySlaParameters,
        MemorySlaPolicy,
        needs_steps=lambda params: params.memory != "memory",
    ),
    "trtllm": PolicyKind(TrtllmParameters, TrtllmPolicy, needs_steps=_always),
    "p-pas": PolicyKind(PPasParameters, PPasPolicy),
    "aimd": PolicyKind(AimdParameters, AimdPolicy),
    "gradient2": PolicyKind(Gradient2Parameters, Gradient2Policy),
    "predictive": PolicyKind(PredictiveParameters, PredictivePolicy, needs_steps=_always),
    "bandit": PolicyKind(BanditParameters, build_bandit, needs_steps=_bandit_needs_steps),
    "learned": PolicyKind(
        # Its observation holds peaks, which mean steps would hide.
        LearnedParameters,
        build_learned,
        "artefact",
        _learned_fingerprint,
        _always,
    ),
}

#: The policies that are complete by their name, without a file of their own.
SELF_CONTAINED = tuple(name for name, kind in POLICIES.items() if kind.positional is None)


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
        """Reads `name`, `name:key=value:key=value`, or `learned:PATH:key=value`.

        Raises:
            ConfigError: The text has another form. Names and keys are checked by `build`: what
                follows an unknown name is not read, as its form is not known either.
        """
        name, *pairs = text.strip().split(":")
        kind = POLICIES.get(name)
        if kind is None:
            return cls(name)
        parameters = {}
        if kind.positional and pairs and _is_positional(pairs[0], kind):
            parameters[kind.positional] = pairs.pop(0)
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (key and equals and value):
                raise ConfigError(f"policy {text!r}: {pair!r} is not key=value")
            if key in parameters:
                raise ConfigError(f"policy {text!r}: {key} is given twice")
            if "," in value and "=" in value:
                raise ConfigError(f"policy {text!r}: write ':' between parameters, not ','")
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

    def fingerprint(self) -> str:
        """Names what the policy is made of beside its text: files that may change; mostly nothing.

        Raises:
            ConfigError: What it points to is not there, or cannot be used.
        """
        kind = policy_kind(self.name)
        return "" if kind.fingerprint is None else kind.fingerprint(self._read(kind, None))

    def needs_steps(self, defaults: Mapping[str, Any] | None = None) -> bool:
        """Whether the policy must be shown every step, and not only sums over an interval.

        Raises:
            ConfigError: As `build`.
        """
        kind = policy_kind(self.name)
        return kind.needs_steps(self._read(kind, defaults))

    def _read(self, kind: PolicyKind, defaults: Mapping[str, Any] | None) -> Any:
        accepted = kind.parameters.names()
        shared = {k: v for k, v in (defaults or {}).items() if k in accepted and v is not None}
        return kind.parameters.from_mapping(
            {**shared, **self.parameters}, where=f"policy {self.name!r}"
        )

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return ":".join([self.name, *(f"{k}={v}" for k, v in self.parameters.items())])


def _is_positional(text: str, kind: PolicyKind) -> bool:
    """Whether a part of a policy's text is a value without its name; a path may hold an `=`."""
    key, equals, _ = text.partition("=")
    return bool(text) and not (equals and key in kind.parameters.names())
