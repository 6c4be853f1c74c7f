"""What a trained policy is and where it comes from: the `manifest.json` beside its network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from batchpilot.agents.actions import ACTION_VERSION, ActionDesign
from batchpilot.agents.features import FEATURE_NAMES, FEATURES_VERSION, LatencyTargets
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.strict_json import check_keys, parse_object

MANIFEST_SCHEMA = 1
MOST_HISTORY = 64
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CREATED_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


class ArtefactError(ConfigError):
    """A trained policy that cannot be used; the text says what is wrong with it."""


def check_name(name: str, *, what: str) -> str:
    """Makes sure that a name is one, and no path; returns it.

    Raises:
        ArtefactError: It is not lower-case letters, digits, dots, dashes and underscores.
    """
    if not isinstance(name, str):
        raise ArtefactError(f"{what} {name!r} must be text, in quotes")
    if not _NAME.fullmatch(name):
        raise ArtefactError(
            f"{what} {name!r} must be 1 to 63 lower-case letters, digits, dots, dashes or "
            "underscores, and start with a letter or digit"
        )
    return name


@dataclass(frozen=True)
class Normalisation:
    """What observations go through before the network: clip((o - mean) / std, -clip, clip).

    Attributes:
        mean: One a feature.
        std: One a feature, above 0.
        clip: Above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    clip: float

    def __post_init__(self) -> None:
        """Checks every number.

        Raises:
            ArtefactError: One that cannot be used.
        """
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != len(FEATURE_NAMES) or not all(map(_is_finite, values)):
                raise ArtefactError(
                    f"normalisation: {name} must be {len(FEATURE_NAMES)} finite numbers"
                )
        if min(self.std) <= 0 or not (_is_finite(self.clip) and self.clip > 0):
            raise ArtefactError("normalisation: std and clip must be above 0")


@dataclass(frozen=True)
class Manifest:
    """Everything that must be known to run a policy, and to trust it.

    Attributes:
        name: Of the policy.
        version: Of this artefact of it.
        algorithm: What trained it, such as `ppo`.
        action: What its outputs mean.
        base_policy: The policy its actions are relative to, and that stands in for it: a text
            that `PolicySpec.parse` reads.
        decision_interval_s: Engine seconds between two decisions.
        targets: The latency targets it was trained for.
        onnx_sha256: Of the network's file.
        created_at: UTC, such as 2026-01-31T12:00:00Z.
        git_commit: Of the code that trained it; empty where unknown.
        config_sha256: Of the configuration it was trained with; empty where there is none.
        training: Figures of its training.
        evaluation: Figures of its evaluation.
        normalisation: Of observations, where the network does not do it itself.
        history: Observations it sees at once, oldest first.
        state_size: Numbers it carries from one decision to the next; 0: it has no memory.
        observation_version: `FEATURES_VERSION` of its training.
        action_version: `ACTION_VERSION` of its training.

    Raises:
        ArtefactError: A value that cannot be used, or a version that this batchpilot does not have.
    """

    name: str
    version: str
    algorithm: str
    action: ActionDesign
    base_policy: str
    decision_interval_s: float
    targets: LatencyTargets
    onnx_sha256: str
    created_at: str
    git_commit: str = ""
    config_sha256: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    normalisation: Normalisation | None = None
    history: int = 1
    state_size: int = 0
    observation_version: int = FEATURES_VERSION
    action_version: int = ACTION_VERSION

    def __post_init__(self) -> None:
        """Checks every value."""
        check_name(self.name, what="policy name")
        check_name(self.version, what="policy version")
        self._check_versions()
        self._check_texts()
        if not (_is_finite(self.decision_interval_s) and self.decision_interval_s > 0):
            raise ArtefactError(f"decision_interval_s={self.decision_interval_s!r} must be above 0")
        if not (_is_whole(self.history) and 1 <= self.history <= MOST_HISTORY):
            raise ArtefactError(f"history={self.history!r} must be from 1 to {MOST_HISTORY}")
        if not (_is_whole(self.state_size) and 0 <= self.state_size <= 4096):
            raise ArtefactError(f"state_size={self.state_size!r} must be from 0 to 4096")

    @property
    def observation_size(self) -> int:
        """Numbers that the network takes in at once."""
        return len(FEATURE_NAMES) * self.history

    def to_text(self) -> str:
        """The text of its file; `parse_manifest` reads it back."""
        values = {"schema": MANIFEST_SCHEMA, **asdict(self)}
        return json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Builds it from JSON values.

        Raises:
            ConfigError: A key is missing or unknown, or a value does not fit.
        """
        found = dict(check_keys(values, ("schema", *_keys(cls)), where="manifest"))
        schema = found.pop("schema")
        if schema != MANIFEST_SCHEMA:
            raise ArtefactError(f"manifest: schema {schema!r}; this batchpilot reads only 1")
        found["action"] = _action(found["action"])
        found["targets"] = LatencyTargets.from_mapping(
            check_keys(found["targets"], LatencyTargets.names(), where="targets"), where="targets"
        )
        if found["normalisation"] is not None:
            found["normalisation"] = _normalisation(found["normalisation"])
        return cls(**found)

    def _check_versions(self) -> None:
        """Raises where observations or actions mean something else here than in training."""
        expected = {"observation_version": FEATURES_VERSION, "action_version": ACTION_VERSION}
        for name, version in expected.items():
            if getattr(self, name) != version:
                raise ArtefactError(
                    f"{name}={getattr(self, name)!r}: this batchpilot has version {version}; "
                    "train or export the policy again"
                )

    def _check_texts(self) -> None:
        for name in ("algorithm", "base_policy", "git_commit", "config_sha256"):
            if not isinstance(getattr(self, name), str):
                raise ArtefactError(f"{name}={getattr(self, name)!r} is not a text")
        if self.base_policy.partition(":")[0] in ("", "learned"):
            raise ArtefactError(f"base_policy={self.base_policy!r} must be an analytic policy")
        if not _matches(_SHA256, self.onnx_sha256):
            raise ArtefactError(f"onnx_sha256={self.onnx_sha256!r} is not a SHA-256")
        if not _matches(_CREATED_AT, self.created_at):
            raise ArtefactError(f"created_at={self.created_at!r} is not YYYY-MM-DDTHH:MM:SSZ")
        for name in ("training", "evaluation"):
            if not isinstance(getattr(self, name), Mapping):
                raise ArtefactError(f"{name} is not a JSON object")


def parse_manifest(text: str | bytes) -> Manifest:
    """Reads the text of a `manifest.json`.

    Raises:
        ArtefactError: It is no manifest of a policy that this batchpilot can run.
    """
    try:
        return Manifest.from_json(parse_object(text, where="manifest"))
    except ArtefactError:
        raise
    except ConfigError as error:
        raise ArtefactError(str(error)) from None


def _keys(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


def _action(values: object) -> ActionDesign:
    found = dict(check_keys(values, _keys(ActionDesign), where="action"))
    for name in ("min_num_seqs", "min_num_batched_tokens"):
        if not _is_whole(found[name]):
            raise ArtefactError(f"action: {name}={found[name]!r} is not a whole number")
    for name in ("seqs_span", "tokens_span"):
        if not _is_finite(found[name]):
            raise ArtefactError(f"action: {name}={found[name]!r} is not a number")
    for name in ("seqs_factors", "tokens_factors"):
        found[name] = _numbers(found[name], where=f"action: {name}")
    return ActionDesign(**found)


def _normalisation(values: object) -> Normalisation:
    found = dict(check_keys(values, _keys(Normalisation), where="normalisation"))
    for name in ("mean", "std"):
        found[name] = _numbers(found[name], where=f"normalisation: {name}")
    return Normalisation(**found)


def _numbers(values: object, *, where: str) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(map(_is_finite, values)):
        raise ArtefactError(f"{where} is not a list of numbers")
    return tuple(float(value) for value in values)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
