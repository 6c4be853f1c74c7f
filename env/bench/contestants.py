"""Who takes part in a bench: our policies, and stock vLLM with its own watermark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from batchpilot.agents.catalog import POLICIES, PolicySpec
from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shadow import ShadowedPolicy
from batchpilot.env.engine import Engine

WATERMARK = "watermark"
WATERMARK_SUMMARY = "stock vLLM that keeps this share of KV blocks free at admission"


@dataclass(frozen=True)
class _Watermark(Parameters):
    """The share of KV blocks that stock vLLM keeps free."""

    watermark: float = parameter(above=0, below=1, help=WATERMARK_SUMMARY)


@dataclass(frozen=True)
class Contestant:
    """What steers the engine in a run.

    Attributes:
        label: The text it was asked for by; names it in tables, files and plots.
        spec: Our policy, or None for stock vLLM.
        watermark: vLLM's own setting; 0 except for `watermark:SHARE`.
        shadow: A policy that decides beside ours and is only watched.
    """

    label: str
    spec: PolicySpec | None = None
    watermark: float = 0.0
    shadow: PolicySpec | None = None

    @property
    def identity(self) -> str:
        """The label, and what it points to where that is a file: the same text, another policy.

        Raises:
            ConfigError: What it points to cannot be used.
        """
        content = "" if self.spec is None else self.spec.fingerprint()
        return f"{self.label} {content}".strip()

    @classmethod
    def parse(cls, text: str) -> Contestant:
        """Reads `name`, `name:key=value:...` or `watermark:SHARE`.

        Raises:
            ConfigError: The text has another form. Names and keys are checked by `build`.
        """
        label = text.strip()
        if not label:
            raise ConfigError("a policy's name is empty; write them as a,b,c")
        name, _, share = label.partition(":")
        if name != WATERMARK:
            return cls(label, PolicySpec.parse(label))
        if not share:
            raise ConfigError(f"policy {label!r} needs its share, such as {WATERMARK}:0.05")
        values = {WATERMARK: share.removeprefix(f"{WATERMARK}=")}
        read = _Watermark.from_mapping(values, where=f"policy {label!r}")
        return cls(label, None, read.watermark)

    @property
    def policy_name(self) -> str | None:
        """Our policy's name without its parameters; None for stock vLLM."""
        return None if self.spec is None else self.spec.name

    def build(self, defaults: Mapping[str, Any]) -> LimitPolicy | None:
        """A fresh policy object, or None where vLLM is left alone.

        Raises:
            ConfigError: Unknown policy or key, or a value that does not fit.
        """
        try:
            policy = None if self.spec is None else self.spec.build(defaults)
            if self.shadow is None or policy is None:
                return policy
            return ShadowedPolicy(policy, self.shadow.build(defaults))
        except ConfigError as error:
            if self.spec is not None and self.spec.name not in POLICIES:
                raise ConfigError(f"{error}, {WATERMARK}:SHARE") from None
            raise

    def steer(self, engine: Engine, defaults: Mapping[str, Any]) -> LimitPolicy | None:
        """Puts a fresh policy in charge of the engine, and returns it."""
        policy = self.build(defaults)
        engine.set_policy(policy, watermark=self.watermark)
        return policy


def parse_contestants(
    text: str, defaults: Mapping[str, Any], shadow: str | None = None
) -> tuple[Contestant, ...]:
    """Reads a comma-separated list, and checks that every policy can be built.

    Args:
        text: Such as `static,watermark:0.05,memory:memory_factor=0.9`.
        defaults: Shared settings such as `itl_slo_ms`, for the policies that take them.
        shadow: A policy that decides beside each of ours and is only watched.

    Raises:
        ConfigError: Malformed, unknown, or the same one twice.
    """
    contestants = tuple(Contestant.parse(part) for part in text.split(","))
    labels = [contestant.label for contestant in contestants]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"policy {label!r} is given twice; use --rounds to repeat")
    if shadow is not None:
        if shadow.partition(":")[0] == WATERMARK:
            raise ConfigError(
                f"shadow={shadow!r}: a shadow decides limits, and vLLM's own does not"
            )
        spec = PolicySpec.parse(shadow)
        contestants = tuple(replace(contestant, shadow=spec) for contestant in contestants)
        if all(contestant.spec is None for contestant in contestants):
            raise ConfigError(f"shadow={shadow!r} needs a policy of ours beside it in policies")
    for contestant in contestants:
        contestant.build(defaults)
    return contestants


def describe_policies() -> list[tuple[str, str]]:
    """Every name that can be asked for, with one line that says what it does."""
    listing = []
    for name, kind in POLICIES.items():
        text = kind.build.__doc__ or kind.parameters.__doc__ or ""
        listing.append((name, text.strip().partition("\n")[0]))
    return [*listing, (f"{WATERMARK}:SHARE", WATERMARK_SUMMARY)]
