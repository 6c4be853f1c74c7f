"""A GPU that is not there: vLLM's own scheduler, the hook that ships, and a virtual clock.

Scheduler and KV-cache manager are vLLM's, so that admission, chunking, prefix caching and
preemption are exactly its own. The model is replaced by a GPU profile, whose step-time form says
how long each step would take; the clock jumps by so much. Hours of a large model pass in seconds,
and the same requests under the same seed give the same numbers to the last digit.

Time, as in vLLM's engine core: tokens are there when their step ends. A request that arrives in
the middle of a step is queued once the step is over. With asynchronous scheduling step n+1 is
scheduled while step n runs, so that such a request first runs in step n+2.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.cache import build_once, cache_folder
from batchpilot.env.engine import EngineRequest, EngineStep
from batchpilot.env.models import TINY_CONFIG
from batchpilot.env.process import prepare_process
from batchpilot.env.profiles import GpuProfile, load_profile
from batchpilot.env.scheduler_core import SchedulerCore, SchedulerCoreConfig
from batchpilot.env.steered_engine import SteeredEngine, refuse_hook_settings

#: Token ids of prompts run from 0 to this, exclusive; no model reads them, only the prefix cache.
VOCAB_SIZE = 128_000
_MOST_DRAIN_STEPS = 16
#: Empty steps in a row after which there is nothing to run: one in the queue, one just scheduled.
_MOST_EMPTY_STEPS = 3
_LONGEST_MODEL_LEN = 2**24
_GARBAGE_THRESHOLD = 50_000  # objects made until the youngest are searched; Python's own is 700


@dataclass(frozen=True)
class VirtualEngineConfig(Parameters):
    """How the engine is set up; names and meanings are vLLM's unless said.

    Attributes:
        profile: The GPU and model: a profile's name or file, or a `GpuProfile` itself.

    Raises:
        ConfigError: A value of the wrong type or out of range, or two that do not go together.
    """

    profile: str | GpuProfile
    max_num_seqs: int = parameter(256, minimum=1, help="start-up limit of running sequences")
    max_num_batched_tokens: int = parameter(2048, minimum=1, help="start-up limit of a step")
    kv_blocks: int | None = parameter(
        None, minimum=2, help="KV blocks, one of which vLLM keeps; None takes the profile's"
    )
    max_model_len: int | None = parameter(
        None, minimum=2, help="longest prompt and output together; None takes what fits"
    )
    enable_prefix_caching: bool = parameter(True, help="reuse KV blocks of equal prefixes")
    enable_chunked_prefill: bool = parameter(True, help="let a prompt span several steps")
    async_scheduling: bool = parameter(True, help="schedule a step ahead, as vLLM on a GPU does")
    scheduling_policy: str = parameter(
        "fcfs", choices=("fcfs", "priority"), help="which waiting request goes first"
    )
    noise: float | None = parameter(
        None,
        minimum=0,
        maximum=1,
        help="relative standard deviation of a step's time; the profile's when left out",
    )
    seed: int = parameter(0, minimum=0, help="of the noise")
    slow_factor: float = parameter(
        1.0, above=0, help="multiplies every step's time from slow_at_s on, as a hot GPU does"
    )
    slow_at_s: float = parameter(0.0, minimum=0, help="virtual second from which on it is slow")

    def __post_init__(self) -> None:
        """Checks each value, then what must hold between them."""
        super().__post_init__()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: each running sequence takes a token of a step"
            )


class _Step(NamedTuple):
    """A step on the GPU: vLLM's output for it, and how long it takes."""

    output: Any
    scheduled_at: float
    seconds: float


class VirtualEngine(SteeredEngine):
    """A simulated vLLM on a virtual clock; implements `batchpilot.env.engine.Engine`.

    Each `step` completes one engine step and moves the clock to its end. Any number of engines can
    live in one process.

    Args:
        config: How it is set up.

    Raises:
        ConfigError: An unknown profile, or a configuration that vLLM refuses.
    """

    def __init__(self, config: VirtualEngineConfig) -> None:
        """Builds vLLM's scheduler: a second, and milliseconds for a configuration seen before."""
        refuse_hook_settings()
        prepare_process()
        self.config = config
        self.profile = (
            load_profile(config.profile) if isinstance(config.profile, str) else config.profile
        )
        core_config = _core_config(config, self.profile)
        self._core = SchedulerCore(core_config, _model_folder())
        _relieve_garbage_collector()
        self._seconds = self.profile.step_time.seconds
        self._noise = self.profile.noise if config.noise is None else config.noise
        self._in_flight: deque[_Step] = deque()
        self._clock = self._gpu_free_at = 0.0
        self._chance = random.Random(config.seed)
        super().__init__(self._core.scheduler, core_config.max_model_len, lambda: self._clock)

    @property
    def clock_seconds(self) -> float:
        """Virtual seconds since the last reset."""
        return self._clock

    def add_request(self, request: EngineRequest) -> None:
        """Queues a request now; it generates exactly `output_tokens` tokens.

        Raises:
            ValueError: The engine can never serve it: empty, too long, or an id in use.
        """
        self._check_open()
        self._check_request(request)
        self._open_core().add_request(request)
        self._unfinished[request.request_id] = request

    def abort_request(self, request_id: str) -> None:
        """Ends a request early; unknown ids are ignored."""
        self._open_core().abort_request(request_id)
        self._unfinished.pop(request_id, None)

    def abort_all(self) -> int:
        """Ends every unfinished request, as at the end of an episode.

        Returns:
            How many there were.
        """
        request_ids = list(self._unfinished)
        for request_id in request_ids:
            self.abort_request(request_id)
        return len(request_ids)

    def step(self) -> EngineStep:
        """Runs one step to its end and moves the clock there.

        Raises:
            RuntimeError: The policy failed and vLLM now runs by itself: what was measured from
                here on would not be the policy.
        """
        self._open_core()
        self._record = None
        outputs = self._run_step()
        if self._policy is not None:
            self._check_steered()
        finished = tuple(o.request_id for o in outputs if o.finish_reason is not None)
        for request_id in finished:
            self._unfinished.pop(request_id, None)
        return EngineStep(
            clock_seconds=self._clock,
            new_tokens={o.request_id: len(o.new_token_ids) for o in outputs if o.new_token_ids},
            finished=finished,
            record=self._record,
        )

    def wait_until(self, clock_seconds: float) -> None:
        """Moves the clock on to that time; does nothing when it is past."""
        self._open_core()
        self._clock = max(self._clock, clock_seconds)

    def reset(self, seed: int | None = None) -> None:
        """Makes the next run independent of the last: clock, noise, prefix cache and records.

        The policy stays, with what it has learned; set a fresh one where that matters.

        Args:
            seed: Of the noise from here on; None takes the configuration's again.

        Raises:
            RuntimeError: Requests are still unfinished, or vLLM still holds their blocks.
        """
        self._check_open()
        self._check_idle()
        self._drain()
        self._drop_prefix_cache()
        self._rewind(self.config.seed if seed is None else seed)
        self._hook.set_policy(self._policy)

    def close(self) -> None:
        """Frees the scheduler; a second call does nothing."""
        if self._scheduler is None:
            return
        super().close()
        self._core.scheduler.shutdown()

    def _rewind(self, seed: int) -> None:
        self._clock = 0.0
        self._gpu_free_at = 0.0
        self._chance = random.Random(seed)

    def _schedule_ahead(self) -> None:
        """Fills vLLM's batch queue: one step, or two with asynchronous scheduling."""
        core = self._core
        depth = 2 if self.config.async_scheduling else 1
        while len(self._in_flight) < depth and core.scheduler.has_requests():
            output = core.schedule()
            # A step without tokens never reaches the GPU, but keeps its place in the queue.
            empty = not output.total_num_scheduled_tokens
            seconds = 0.0 if empty else self._step_seconds()
            self._in_flight.append(_Step(output, self._clock, seconds))
            if empty:
                return

    def _run_step(self) -> Sequence[Any]:
        """Ends the oldest step, once it is clear what runs behind it; returns what it gave."""
        for _ in range(_MOST_EMPTY_STEPS):
            self._schedule_ahead()
            if not self._in_flight:
                break
            has_tokens = self._in_flight[0].output.total_num_scheduled_tokens > 0
            outputs = self._complete()
            if has_tokens or outputs:
                return outputs
        return ()

    def _complete(self) -> Sequence[Any]:
        """Lets the oldest step end, and moves the clock there."""
        step = self._in_flight.popleft()
        if not step.seconds:
            return self._core.complete(step.output)
        started_at = max(step.scheduled_at, self._gpu_free_at)
        self._gpu_free_at = started_at + step.seconds
        self._clock = max(self._clock, self._gpu_free_at)
        return self._core.complete(step.output)

    def _step_seconds(self) -> float:
        """How long the step just scheduled takes."""
        seconds = self._seconds(*self._core.load)
        config = self.config
        if self._clock >= config.slow_at_s:
            seconds *= config.slow_factor
        noise = self._noise
        if noise:
            # Lognormal with mean 1: never negative, and the mean step time stays.
            sigma = math.sqrt(math.log1p(noise * noise))
            seconds *= math.exp(self._chance.gauss(-0.5 * sigma * sigma, sigma))
        return seconds

    def _drain(self) -> None:
        """Lets vLLM forget every request that ended, also one scheduled ahead."""
        for _ in range(_MOST_DRAIN_STEPS):
            if not (self._in_flight or self._core.scheduler.has_requests()):
                return
            self._run_step()
        raise RuntimeError(f"vLLM still holds requests {_MOST_DRAIN_STEPS} steps after the last")

    def _open_core(self) -> SchedulerCore:
        self._check_open()
        return self._core


def _core_config(config: VirtualEngineConfig, profile: GpuProfile) -> SchedulerCoreConfig:
    """The scheduler's settings: the profile's where the configuration leaves them open."""
    kv_blocks = config.kv_blocks or profile.num_blocks
    fits = min(profile.max_model_len, (kv_blocks - 1) * profile.block_size)  # one is vLLM's own
    if config.max_model_len is not None and config.max_model_len > profile.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len} must be at most {profile.max_model_len}, "
            f"what profile {profile.name!r} allows"
        )
    return SchedulerCoreConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_blocks=kv_blocks,
        block_size=profile.block_size,
        max_model_len=config.max_model_len or max(2, fits),
        async_scheduling=config.async_scheduling,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        scheduling_policy=config.scheduling_policy,
    )


def _model_folder() -> Path:
    """A model's config.json that allows any context length: all that vLLM asks for here."""
    text = json.dumps({**TINY_CONFIG, "max_position_embeddings": _LONGEST_MODEL_LEN}, indent=2)
    version = hashlib.sha256(text.encode()).hexdigest()[:8]

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    target = cache_folder() / f"no-model-{version}"
    return build_once(target, write, needed_bytes=len(text))


@lru_cache(maxsize=1)
def _relieve_garbage_collector() -> None:
    """Spares steps a tenth of their time, once and for the whole process.

    What is loaded is taken out of the collector's sight, as vLLM's engine core does: else millions
    of objects of torch and vLLM are searched again and again. And it looks less often: a step makes
    hundreds of objects, all of which go by themselves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD, *gc.get_threshold()[1:])
