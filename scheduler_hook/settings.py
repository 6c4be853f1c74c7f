"""The hook's settings: from `--additional-config '{"batchpilot": {...}}'` and `BATCHPILOT_*`.

An environment variable wins over the same key in the configuration, so that one server of a fleet
can be switched without changing its command line. Whatever is wrong stops the server at start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.agents.policy import LimitPolicy
from batchpilot.agents.shadow import ShadowedPolicy
from batchpilot.agents.shield import SafetyBounds
from batchpilot.scheduler_hook import tuner_channel

CONFIG_KEY = "batchpilot"
ENVIRONMENT_PREFIX = "BATCHPILOT_"
#: Variables of other parts of batchpilot, which are not settings of the hook.
OTHER_VARIABLES = frozenset({"BATCHPILOT_CACHE", "BATCHPILOT_POLICIES"})


@dataclass(frozen=True)
class HookSettings(Parameters):
    """How the hook behaves in one engine."""

    mode: str = parameter(
        "local",
        choices=("off", "observe", "local", "remote"),
        help="off: stock vLLM; observe: decide and report, apply nothing; local: decide and apply; "
        "remote: apply what the tuning service says, and decide locally without it",
    )
    policy: str = parameter("predictive", help="name, or name:key=value:key=value")
    itl_slo_ms: float | None = parameter(None, above=0, help="inter-token latency target")
    ttft_slo_ms: float | None = parameter(None, above=0, help="time-to-first-token target")
    memory_overflow_probability: float | None = parameter(
        None, above=0, below=0.5, help="how often the KV cache may overflow (the paper's eps_M)"
    )
    min_num_seqs: int = parameter(1, minimum=1, help="least sequence limit")
    max_num_seqs: int | None = parameter(None, minimum=1, help="greatest sequence limit")
    min_prefill_chunk: int = parameter(
        64, minimum=1, help="prompt tokens a step always has room for beside its decodes"
    )
    shadow: str | None = parameter(
        None, help="a policy that decides beside it and is only watched, written in the same way"
    )
    metrics_port: int | None = parameter(
        None,
        minimum=1,
        maximum=65535,
        help="serve Prometheus metrics here; data-parallel rank r listens on port + r",
    )
    metrics_host: str = parameter("127.0.0.1", help="address of metrics_port")
    log_interval_seconds: float = parameter(
        10.0, minimum=1, help="how often a line of what batchpilot does is logged"
    )
    allow_untested_vllm: bool = parameter(
        False, help="steer a vLLM version that batchpilot does not know, if its parts look right"
    )
    service_targets: str = parameter(
        "", help="the tuning service: HOST:PORT, dns:///HOST:PORT or unix:/PATH, comma-separated"
    )
    service_ca_file: str | None = parameter(
        None, help="PEM certificates to check the service's by; without it there is no TLS"
    )
    service_cert_file: str | None = parameter(None, help="this engine's PEM certificate (mTLS)")
    service_key_file: str | None = parameter(None, help="its PEM key")
    service_token_file: str | None = parameter(None, help="file that holds a bearer token")
    service_group: str = parameter("default", help="the engines this one shares a policy with")
    service_engine: str | None = parameter(
        None, help="this server's name in its group; HOSTNAME:PID:RANDOM if left out"
    )
    service_max_lease_seconds: float = parameter(
        2.0, minimum=0.1, maximum=60, help="limits are dropped so long after the report they answer"
    )
    service_min_report_seconds: float = parameter(
        0.1, minimum=0.02, help="reports are sent no more often, whatever the service asks"
    )
    service_max_report_seconds: float = parameter(
        5.0, minimum=0.02, help="reports are sent no less often while the engine works"
    )

    def __post_init__(self) -> None:
        """Checks every value, the policy's parameters included.

        Raises:
            ConfigError: Naming the key, the value and what is allowed.
        """
        super().__post_init__()
        if self.max_num_seqs is not None and self.max_num_seqs < self.min_num_seqs:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} must be at least min_num_seqs="
                f"{self.min_num_seqs}"
            )
        if self.service_max_report_seconds < self.service_min_report_seconds:
            raise ConfigError(
                f"service_max_report_seconds={self.service_max_report_seconds} must be at least "
                f"service_min_report_seconds={self.service_min_report_seconds}"
            )
        if self.mode != "off":
            self.with_shadow(self.build_policy())
        if self.mode == "remote":
            tuner_channel.check(self)

    @property
    def bounds(self) -> SafetyBounds:
        """What the shield allows."""
        return SafetyBounds(self.min_num_seqs, self.max_num_seqs, self.min_prefill_chunk)

    def build_policy(self) -> LimitPolicy:
        """A fresh policy with the shared targets filled in."""
        return self._build(self.policy)

    def with_shadow(self, policy: LimitPolicy) -> LimitPolicy:
        """The policy with a fresh shadow beside it; the policy itself where none is set."""
        if self.shadow is None:
            return policy
        return ShadowedPolicy(policy, self._build(self.shadow), self.bounds)

    def _build(self, text: str) -> LimitPolicy:
        targets = {
            "itl_slo_ms": self.itl_slo_ms,
            "ttft_slo_ms": self.ttft_slo_ms,
            "memory_overflow_probability": self.memory_overflow_probability,
            "min_prefill_chunk": self.min_prefill_chunk,
        }
        return PolicySpec.parse(text).build(targets)


def read_settings(
    additional_config: object, environment: Mapping[str, str] | None = None
) -> HookSettings:
    """Reads the settings of this engine.

    Args:
        additional_config: vLLM's `additional_config`; other keys than "batchpilot" are not ours.
        environment: Environment variables; the process's own when left out.

    Raises:
        ConfigError: An unknown key or a value that does not fit.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    section = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(section, dict):
        raise ConfigError(f'additional_config["{CONFIG_KEY}"]={section!r} is not a JSON object')
    values.update(section)
    links = _service_links(environment)
    known = {f"{ENVIRONMENT_PREFIX}{item.name.upper()}": item.name for item in fields(HookSettings)}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in known and variable.startswith(links):
            continue
        if variable not in known:
            raise ConfigError(f"unknown variable {variable}; allowed: {', '.join(known)}")
        values[known[variable]] = text
    return HookSettings.from_mapping(values, where="batchpilot settings")


def _service_links(environment: Mapping[str, str]) -> tuple[str, ...]:
    """How the variables begin that Kubernetes sets for each service of a pod's namespace.

    For a service `batchpilot-tuner` they are BATCHPILOT_TUNER_SERVICE_HOST, BATCHPILOT_TUNER_PORT,
    whose value is an address such as tcp://10.0.0.1:50061, and more with the same beginnings.
    """
    found = []
    for variable, text in environment.items():
        name = variable.removesuffix("_PORT")
        if name != variable and "://" in text and f"{name}_SERVICE_HOST" in environment:
            found += [f"{name}_PORT", f"{name}_SERVICE_HOST", f"{name}_SERVICE_PORT"]
    return tuple(found)
