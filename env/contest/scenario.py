"""What the contest is held on: GPU profiles, traffic, targets, and the settings vLLM would take.

Everything follows from the profile, so that no scenario is tuned for anybody: targets are multiples
of its unloaded step, start-up limits are vLLM's own defaults for the device, and the rates that are
tried are multiples of an estimate that is made from the profile alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

from batchpilot.agents.limits import BatchLimits
from batchpilot.env.bench.measure import Slo
from batchpilot.env.profiles import GpuProfile, load_profile
from batchpilot.env.workloads import build_workload

#: Context of the single sequence whose step time targets are multiples of.
UNLOADED_CONTEXT_TOKENS = 1024
#: Relative deviation of a step's time: no real GPU is exact.
NOISE = 0.05
#: Coefficient of variation of the gaps between arrivals: bursts.
BURSTINESS = 2.0
#: Requests are as many as arrive in this time at the estimated capacity, but at least as many a
#: second of it as let a share of 99 % be told from 98 %.
HORIZON_SECONDS = 20.0
FEWEST_PER_SECOND = 10

#: Short names of the lengths, and what a workload is asked for by.
LENGTHS = {"ShareGPT": "sharegpt", "Azure": "empirical:azure-2023-conv"}
#: vLLM's defaults of `vllm serve`: for H100 and H200, and for any other device.
_LARGE_DEFAULTS = BatchLimits(1024, 8192)
_SMALL_DEFAULTS = BatchLimits(256, 2048)
_SAMPLE_REQUESTS = 2000


@dataclass(frozen=True)
class Scenario:
    """One place to be compared in.

    Attributes:
        profile: The GPU and model.
        workload: Lengths, as a workload is asked for.
        label: Names it in tables.
        slo: Targets; none is set where throughput is compared.
        arrivals: Process of the arrivals at a rate scale of 1.
        num_requests: Requests of a run.
        rate_per_s: Mean arrival rate at a rate scale of 1; 0 for all at once.
        kv_blocks: KV blocks; None takes the profile's.
    """

    profile: str
    workload: str
    label: str
    slo: Slo
    arrivals: str
    num_requests: int
    rate_per_s: float
    kv_blocks: int | None = None

    @property
    def startup_limits(self) -> BatchLimits:
        """What vLLM would start with on this device."""
        return startup_limits(load_profile(self.profile))


def startup_limits(profile: GpuProfile) -> BatchLimits:
    """The defaults of vLLM's own for `vllm serve`, by the name of the device."""
    is_large = any(name in profile.gpu for name in ("H100", "H200"))
    return _LARGE_DEFAULTS if is_large else _SMALL_DEFAULTS


def unloaded_step_ms(profile: GpuProfile) -> float:
    """The step time of one sequence alone."""
    return 1e3 * profile.step_time.seconds(1, 0, UNLOADED_CONTEXT_TOKENS)


@lru_cache(maxsize=64)
def mean_lengths(workload: str) -> tuple[float, float]:
    """Mean prompt and output tokens of a workload's requests."""
    requests = build_workload(workload, num_requests=_SAMPLE_REQUESTS).requests
    prompts = fmean(request.prompt_tokens for request in requests)
    return prompts, fmean(request.output_tokens for request in requests)


def estimated_capacity(profile: GpuProfile, workload: str, step_ms: float) -> float:
    """The most requests per second that smooth traffic allows with steps of `step_ms` or less.

    In balance a rate of r brings r t prompts a step of t seconds and keeps r t l_out sequences
    decoding, half of their output old on average. The step time of that batch rises with r; the
    most at t is the r at which it is t, or at which the KV cache is full, and a full cache may
    allow more at a shorter t. Bursts and queueing are not in it: it is where a search begins, not a
    result.

    Args:
        profile: The GPU and model.
        workload: The lengths.
        step_ms: The longest t, in milliseconds.
    """
    lengths = mean_lengths(workload)
    shortest = unloaded_step_ms(profile)
    spread = max(step_ms - shortest, 0.0)
    steps = [shortest + spread * part / _STEPS_TRIED for part in range(1, _STEPS_TRIED + 1)]
    return max(_balanced_rate(profile, lengths, step / 1e3) for step in steps)


_STEPS_TRIED = 20


def _balanced_rate(profile: GpuProfile, lengths: tuple[float, float], seconds: float) -> float:
    """The highest rate whose balanced step takes at most `seconds` and fits the KV cache."""
    prompt, output = lengths
    low, high = 0.0, 1e4
    for _ in range(60):
        rate = (low + high) / 2
        decodes = rate * seconds * output
        kv_tokens = decodes * (prompt + output / 2)
        load = round(decodes), round(rate * seconds * prompt), round(kv_tokens)
        fits = kv_tokens <= profile.kv_capacity_tokens
        if fits and profile.step_time.seconds(*load) <= seconds:
            low = rate
        else:
            high = rate
    return low


def slo_scenario(
    profile_name: str,
    lengths: str,
    *,
    itl_factor: float,
    ttft_slo_ms: float,
    horizon_s: float = HORIZON_SECONDS,
) -> Scenario:
    """Bursty traffic under targets.

    Args:
        profile_name: The GPU and model.
        lengths: A key of `LENGTHS`.
        itl_factor: The inter-token target as a multiple of the unloaded step.
        ttft_slo_ms: Target for the first token.
        horizon_s: How long the requests take to come at the estimated capacity.
    """
    profile = load_profile(profile_name)
    itl_slo_ms = round(itl_factor * unloaded_step_ms(profile), 2)
    workload = LENGTHS[lengths]
    rate = estimated_capacity(profile, workload, itl_slo_ms)
    wanted = max(rate, FEWEST_PER_SECOND) * horizon_s
    return Scenario(
        profile=profile_name,
        workload=workload,
        label=f"{profile_name}, {lengths}, ITL {itl_factor:g}x, TTFT {ttft_slo_ms / 1e3:g} s",
        slo=Slo(itl_slo_ms, ttft_slo_ms),
        arrivals=f"gamma:rate={rate:.6g}:cv={BURSTINESS:g}",
        num_requests=round(wanted),
        rate_per_s=float(f"{rate:.6g}"),
    )


#: How many times the requests that fit the KV cache are served where memory is to bind.
TURNOVERS = 2.5
#: And at least so many requests a turnover.
FEWEST_PER_TURNOVER = 75


def saturated_scenario(
    profile_name: str, lengths: str, kv_blocks: int | None = None, turnovers: float = TURNOVERS
) -> Scenario:
    """Everything there at once and no target: throughput, bound by memory."""
    profile = load_profile(profile_name)
    if kv_blocks is not None:
        profile = replace(profile, num_blocks=kv_blocks)
    workload = LENGTHS[lengths]
    prompt, output = mean_lengths(workload)
    fit = profile.kv_capacity_tokens / (prompt + output)
    cut = "" if kv_blocks is None else f", {kv_blocks} KV blocks"
    return Scenario(
        profile=profile_name,
        workload=workload,
        label=f"{profile_name}, {lengths}{cut}",
        slo=Slo(),
        arrivals="saturated",
        num_requests=round(turnovers * max(fit, FEWEST_PER_TURNOVER)),
        rate_per_s=0.0,
        kv_blocks=kv_blocks,
    )


@dataclass(frozen=True)
class Shift:
    """A scenario whose traffic or GPU changes half-way.

    Attributes:
        scenario: What is served.
        phase_starts_s: When each phase begins.
        slow_factor: Multiplies step times from the second phase on.
    """

    scenario: Scenario
    phase_starts_s: tuple[float, float]
    slow_factor: float = 1.0


#: Targets of the shifts.
SHIFT_ITL_FACTOR, SHIFT_TTFT_SLO_MS = 3.0, 2000.0
#: Share of the estimated capacity that each phase is loaded to; the rate shift's is its high phase.
SHIFT_LOAD = 0.8
SLOW_FACTOR = 1.5
_LONG_PROMPTS = "lognormal:prompt_mean=1024:output_mean=128" + (
    ":prompt_sigma=0.5:output_sigma=0.5:prompt_max=4096:output_max=4096"
)
_LONG_OUTPUTS = _LONG_PROMPTS.replace(
    "prompt_mean=1024:output_mean=128", "prompt_mean=128:output_mean=1024"
)


def shifts(profile_name: str, phase_s: float) -> tuple[Shift, ...]:
    """The three shifts on a profile: lengths, rate, and a GPU that becomes slower.

    Args:
        profile_name: The GPU and model.
        phase_s: Seconds of each phase.
    """
    profile = load_profile(profile_name)
    itl_slo_ms = round(SHIFT_ITL_FACTOR * unloaded_step_ms(profile), 2)
    azure = LENGTHS["Azure"]

    def load(workload: str, step_ms: float = itl_slo_ms) -> float:
        return SHIFT_LOAD * estimated_capacity(profile, workload, step_ms)

    def shift(what: str, workload: str, rates: tuple[float, float], slow: float = 1.0) -> Shift:
        first, second = (f"gamma:rate={rate:.6g}:cv={BURSTINESS:g}" for rate in rates)
        scenario = Scenario(
            profile=profile_name,
            workload=workload,
            label=f"{profile_name}, {what}",
            slo=Slo(itl_slo_ms, SHIFT_TTFT_SLO_MS),
            arrivals=f"{first},{second}@{phase_s:g}",
            num_requests=round(sum(rates) * phase_s),
            rate_per_s=sum(rates) / 2,
        )
        return Shift(scenario, (0.0, phase_s), slow)

    high = load(azure)
    slowed = load(azure, itl_slo_ms / SLOW_FACTOR)
    return (
        shift(
            "prompt 1024 to 128, output 128 to 1024",
            f"{_LONG_PROMPTS},{_LONG_OUTPUTS}@{phase_s:g}",
            (load(_LONG_PROMPTS), load(_LONG_OUTPUTS)),
        ),
        shift("rate x0.25 to x4", azure, (high / 16, high)),
        shift(f"GPU slows by {SLOW_FACTOR:g}x", azure, (slowed, slowed), SLOW_FACTOR),
    )
