"""The settings of the environments; also the keywords of `gymnasium.make`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast, get_args

from batchpilot.agents.actions import ActionDesign, Design
from batchpilot.agents.catalog import PolicySpec
from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.parameters import ConfigError, parameter
from batchpilot.agents.policy import LimitPolicy
from batchpilot.env.request_stream import own_times
from batchpilot.env.workloads import WorkloadSpec, read_spec


@dataclass(frozen=True)
class EnvParameters(LatencyTargets):
    """What every environment of this kind takes; also keywords of `gymnasium.make`.

    Attributes:
        synthetic_arrivals: What None as `arrivals` means where neither a trace nor a YAML file has
            any.
        num_requests: Most requests of an episode; None: as many as the horizon needs (see
            `RequestStream`).
        rate_spread: Each episode multiplies `rate_scale` by a factor drawn from 1 / rate_spread to
            rate_spread, evenly on a log scale; 1 draws nothing.
        random_start: Each episode replays another stretch of a trace, which must come at its own
            times.
        action_design: `residual` shifts the base policy's limits, so that an action of 0 is the
            base policy; `grid` chooses from a few such shifts; `absolute` names the limits.
        base_policy: What `residual` and `grid` are relative to. It decides before each engine
            step, and starts afresh in each episode.
        history: Observations an agent sees side by side, oldest first.
        shaping_discount: Of the potential in the reward; best the agent's own discount.
        capacity_tokens_per_s: The goodput that counts as 1 in the reward; None: worked out from
            the engine and the workload's mean lengths.

    Raises:
        ConfigError: A value of the wrong type or out of range, or two that do not go together.
    """

    synthetic_arrivals: ClassVar[str | None] = None

    workload: str = parameter("chat", help="see WorkloadSpec")
    arrivals: str | None = parameter(None, help="see WorkloadSpec")
    num_requests: int | None = parameter(None, minimum=1, help="most requests of an episode")
    rate_scale: float = parameter(1.0, above=0, help="multiplies the arrival rate")
    rate_spread: float = parameter(1.0, minimum=1, help="each episode's rate, at random")
    random_start: bool = parameter(False, help="replay another stretch of a trace each episode")
    itl_slo_ms: float | None = parameter(50.0, above=0, help="target for a request's TPOT")
    ttft_slo_ms: float | None = parameter(5000.0, above=0, help="target for a request's TTFT")
    decision_interval_s: float = parameter(1.0, above=0, help="engine time between two actions")
    horizon_s: float = parameter(120.0, above=0, help="engine time of an episode")
    action_design: str = parameter(
        "residual", choices=get_args(Design), help="what an action means"
    )
    base_policy: str = parameter("predictive", help="what residual and grid actions shift")
    history: int = parameter(1, minimum=1, help="observations an agent sees at once")
    min_num_seqs: int = parameter(1, minimum=1, help="least max_num_seqs of an action")
    min_num_batched_tokens: int = parameter(
        64, minimum=1, help="least max_num_batched_tokens of an action"
    )
    seqs_span: float = parameter(2.0, above=1, help="residual: most factor of max_num_seqs")
    tokens_span: float = parameter(
        8.0, above=1, help="residual: most factor of max_num_batched_tokens"
    )
    slo_weight: float = parameter(0.5, minimum=0, help="weight of late requests in the reward")
    preemption_weight: float = parameter(0.2, minimum=0, help="weight of work thrown away")
    shield_weight: float = parameter(0.1, minimum=0, help="weight of steps the shield changed")
    shaping_discount: float = parameter(
        0.98, minimum=0, maximum=1, help="discount of the potential in the reward"
    )
    capacity_tokens_per_s: float | None = parameter(None, above=0, help="goodput that counts as 1")

    def __post_init__(self) -> None:
        """Checks each value, then what must hold between them."""
        super().__post_init__()
        if self.horizon_s < self.decision_interval_s:
            raise ConfigError(
                f"horizon_s={self.horizon_s:g} must be at least "
                f"decision_interval_s={self.decision_interval_s:g}"
            )
        self.build_base_policy()

    @property
    def actions(self) -> ActionDesign:
        """What an action means."""
        return ActionDesign(
            design=cast(Design, self.action_design),
            min_num_seqs=self.min_num_seqs,
            min_num_batched_tokens=self.min_num_batched_tokens,
            seqs_span=self.seqs_span,
            tokens_span=self.tokens_span,
        )

    def build_base_policy(self) -> LimitPolicy:
        """A fresh base policy; absolute actions need none, so that theirs does nothing.

        Raises:
            ConfigError: An unknown policy or parameter.
        """
        base = PolicySpec.parse(self.base_policy).build(
            {"itl_slo_ms": self.itl_slo_ms, "ttft_slo_ms": self.ttft_slo_ms}
        )
        return PolicySpec("static").build() if self.action_design == "absolute" else base

    @property
    def workload_spec(self) -> WorkloadSpec:
        """The workload that the parameters describe.

        Raises:
            ConfigError: A workload file that cannot be used, or a random start with nothing to
                start in.
        """
        spec = read_spec(
            WorkloadSpec(self.workload, self.arrivals, self.num_requests, self.rate_scale)
        )
        if spec.arrivals is None and spec.replay is None:
            spec = replace(spec, arrivals=self.synthetic_arrivals)
        if self.random_start and own_times(spec) is None:
            raise ConfigError(
                f"random_start=True needs a trace at its own times, not workload="
                f"{spec.workload!r} with arrivals={spec.arrivals!r}"
            )
        return spec


@dataclass(frozen=True)
class VirtualEnvParameters(EnvParameters):
    """The parameters of `batchpilot/BatchLimits-v0`: those of `EnvParameters`, and the engine's.

    The defaults are a GPU whose KV cache is scarce under traffic in bursts, so that both limits
    matter: too few sequences leave requests waiting, too many are preempted.
    """

    synthetic_arrivals = "gamma:4.5:3"

    workload: str = parameter(
        "lognormal:prompt_mean=200:output_mean=400:output_sigma=0.9:output_max=2048",
        help="see WorkloadSpec",
    )
    itl_slo_ms: float | None = parameter(35.0, above=0, help="target for a request's TPOT")
    ttft_slo_ms: float | None = parameter(3000.0, above=0, help="target for a request's TTFT")
    profile: str = parameter("llama-3.1-8b-rtx4090", help="GPU profile, a name or a file")
    max_num_seqs: int = parameter(256, minimum=2, help="start-up limit; that of the action 1")
    max_num_batched_tokens: int = parameter(
        2048, minimum=2, help="start-up limit; that of the action 1"
    )
    kv_blocks: int | None = parameter(None, minimum=2, help="KV blocks; None takes the profile's")
    enable_prefix_caching: bool = parameter(True, help="reuse KV blocks of equal prefixes")
    async_scheduling: bool = parameter(True, help="schedule a step ahead, as on a GPU")
    noise: float = parameter(
        0.0, minimum=0, maximum=1, help="relative standard deviation of a step's time"
    )
