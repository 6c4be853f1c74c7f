"""Every touch of vLLM's scheduler, in one file; `kv_groups` reads what its KV cache consists of.

vLLM declares its scheduler interface non-public. What this file relies on is listed in `PARTS` and
`ERAS`, checked when the scheduler is built, and proved release by release by `make compat`. Where
something is missing, the hook becomes a passthrough: the engine runs as stock vLLM.

Three eras of the sequence limit (both limits are read inside `schedule()`, the token budget always
from `max_num_scheduled_tokens`):

| vLLM         | attribute              | admission stops when                          |
|--------------|------------------------|-----------------------------------------------|
| 0.16 to 0.24 | `max_num_running_reqs` | `len(running) ==` it: below N it would never  |
| 0.25 to 0.30 | `max_num_running_reqs` | `len(running) + paused sessions >=` it        |
| 0.31 to 0.33 | `max_num_active_reqs`  | the same, and it only limits admission        |

In all three a limit of at least `max(1, N)` and at most the start-up value is safe.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from vllm import __version__ as vllm_version
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler

from batchpilot.agents.limits import (
    BatchLimits,
    Binding,
    EngineFacts,
    EngineSnapshot,
    FinishedRequest,
    SequenceState,
)
from batchpilot.scheduler_hook.kv_groups import block_tokens, kv_growth

__all__ = [
    "AsyncScheduler",
    "StepContent",
    "SyncScheduler",
    "UnsupportedEngineError",
    "VllmAdapter",
    "adapt",
    "is_diffusion",
    "stock_scheduler",
    "vllm_version",
]

OLDEST, NEWEST = (0, 16), (0, 33)


@dataclass(frozen=True)
class Era:
    """Releases that share one way of limiting sequences.

    Attributes:
        oldest: First release, (major, minor).
        newest: Last release.
        limit: The scheduler's attribute that limits admission.
        comparison: The operator `schedule()` compares with: stop admitting when `count OP limit`.
    """

    oldest: tuple[int, int]
    newest: tuple[int, int]
    limit: str
    comparison: str

    @property
    def counts_paused(self) -> bool:
        """Whether paused streaming sessions count beside RUNNING."""
        return self.comparison == ">="


ERAS = (
    Era((0, 16), (0, 24), "max_num_running_reqs", "=="),
    Era((0, 25), (0, 30), "max_num_running_reqs", ">="),
    Era((0, 31), (0, 33), "max_num_active_reqs", ">="),
)

#: What the adapter reads of a scheduler, as paths from it.
PARTS = (
    "running",
    "waiting",
    "requests",
    "block_size",
    "max_num_scheduled_tokens",
    "num_waiting_for_streaming_input",
    "get_request_counts",
    "kv_cache_manager.block_pool.num_gpu_blocks",
    "kv_cache_manager.block_pool.get_num_free_blocks",
    "kv_cache_config.kv_cache_groups",
    "scheduler_config.async_scheduling",
    "scheduler_config.enable_chunked_prefill",
    "scheduler_config.long_prefill_token_threshold",
    "vllm_config.additional_config",
    "vllm_config.model_config.runner_type",
    "vllm_config.model_config.max_model_len",
    "vllm_config.model_config.served_model_name",
    "vllm_config.parallel_config.data_parallel_index",
    "num_spec_tokens",
)

#: What it reads of a `Request` and of a `SchedulerOutput`, and the methods it wraps.
REQUEST_PARTS = (
    "request_id",
    "status",
    "num_prompt_tokens",
    "num_computed_tokens",
    "num_tokens",
    "num_output_tokens",
    "is_prefill_chunk",
)
OUTPUT_PARTS = ("num_scheduled_tokens", "total_num_scheduled_tokens", "finished_req_ids")
WRAPPED_METHODS = (
    "add_request",
    "schedule",
    "update_from_output",
    "_preempt_request",
    "shutdown",
)

#: Final statuses of requests whose output would have gone on.
CUT_SHORT = ("FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED")
_NO_PREFILL = (0, 0, 0)
#: Steps from one look at who holds KV blocks outside RUNNING to the next.
LOOK_OUTSIDE_STEPS = 16
#: What remains, a step later, of the most tokens a decoding sequence took: drafts come and go.
DRAFTS_KEPT = 0.9


def era_of(version: str) -> Era | None:
    """The era of a vLLM release such as `0.32.0+cpu`; None when batchpilot does not know it."""
    match = re.match(r"(\d+)\.(\d+)\.\d+", version)
    if match is None:
        return None
    release = (int(match[1]), int(match[2]))
    return next((era for era in ERAS if era.oldest <= release <= era.newest), None)


def stock_scheduler(vllm_config: Any) -> Any:
    """The class that vLLM itself would take for a configuration, were no other one named."""
    is_async = vllm_config.scheduler_config.async_scheduling
    if is_diffusion(vllm_config):
        module = importlib.import_module("vllm.v1.core.sched.diffusion_scheduler")
        return module.DiffusionAsyncScheduler if is_async else module.DiffusionScheduler
    return AsyncScheduler if is_async else SyncScheduler


def is_diffusion(vllm_config: Any) -> bool:
    """Whether a configuration is of a diffusion model; releases before 0.32 know none."""
    return getattr(vllm_config, "diffusion_config", None) is not None


class UnsupportedEngineError(Exception):
    """This engine cannot be steered; the text says why."""


def adapt(scheduler: Any, *, allow_untested: bool = False, has_target: bool = False) -> VllmAdapter:
    """The adapter of a scheduler that has just been built.

    Args:
        scheduler: vLLM's scheduler.
        allow_untested: Accept releases that batchpilot does not know, if their parts look right.
        has_target: Whether a latency target is to be kept between tokens.

    Raises:
        UnsupportedEngineError: It cannot be steered.
    """
    reason = _why_unsupported(scheduler, allow_untested, has_target)
    if reason is not None:
        raise UnsupportedEngineError(reason)
    return VllmAdapter(scheduler)


def _why_unsupported(scheduler: Any, allow_untested: bool, has_target: bool) -> str | None:
    era = era_of(vllm_version)
    if era is None and not allow_untested:
        return (
            f"vLLM {vllm_version} is not one of the releases it knows "
            f"({OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}); "
            "set allow_untested_vllm to try"
        )
    needed = (*PARTS, (era or ERAS[-1]).limit)
    missing = [path for path in needed if not _has_path(scheduler, path)]
    if missing:
        return f"vLLM {vllm_version}'s scheduler has no {missing[0]}"
    model = scheduler.vllm_config.model_config
    if model.runner_type != "generate":
        return f"a {model.runner_type} model has no decode batch to limit"
    if getattr(model, "is_diffusion", False):
        return "a diffusion model does not decode token by token"
    if not scheduler.kv_cache_config.kv_cache_groups:
        return "the model has no KV cache"
    stages = getattr(scheduler.vllm_config.parallel_config, "pipeline_parallel_size", 1)
    if has_target and stages > 1:
        return (
            f"with pipeline_parallel_size={stages} a token takes as many steps, and itl_slo_ms "
            "would be kept for one of them; without itl_slo_ms it steers such an engine"
        )
    return None


def _has_path(root: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(root, name):
            return False
        root = getattr(root, name)
    return True


class StepContent(NamedTuple):
    """What one call of `schedule()` put into a step.

    Attributes:
        running: Sequences in RUNNING afterwards.
        waiting: Requests still waiting afterwards.
        decode_seqs: Sequences that decode in it.
        prefill_tokens: Prompt tokens in it.
        prefill_squares: As in `StepRecord`.
        cached_tokens: As in `StepRecord`.
        scheduled_tokens: All tokens in it.
        used_blocks: KV blocks held once it was scheduled.
        finished: Requests that ended since the previous call.
        reserved_seqs: Places that vLLM holds outside RUNNING, for paused streaming sessions.
    """

    running: int
    waiting: int
    decode_seqs: int
    prefill_tokens: int
    prefill_squares: int
    cached_tokens: int
    scheduled_tokens: int
    used_blocks: int
    finished: tuple[FinishedRequest, ...]
    reserved_seqs: int


class VllmAdapter:
    """Reads one scheduler's state in O(1) and sets its limits.

    Args:
        scheduler: A scheduler that `adapt` accepted.
    """

    def __init__(self, scheduler: Any) -> None:
        """Remembers the start-up limits and finds what never moves."""
        self._scheduler = scheduler
        era = era_of(vllm_version) or ERAS[-1]
        self._limit_name = era.limit
        self._counts_paused = era.counts_paused
        self._block_pool = scheduler.kv_cache_manager.block_pool
        # Groups (hybrid attention) share one pool: a block of tokens is one block in each.
        groups = scheduler.kv_cache_config.kv_cache_groups
        self._groups = len(groups)
        parallel = scheduler.vllm_config.parallel_config
        block_size = block_tokens(
            groups,
            scheduler.block_size,
            getattr(parallel, "decode_context_parallel_size", 1),
        )
        self.facts = EngineFacts(
            startup_limits=BatchLimits(
                getattr(scheduler, self._limit_name), scheduler.max_num_scheduled_tokens
            ),
            total_blocks=max(1, self._usable_blocks() // self._groups),
            block_size=block_size,
            tokens_per_decode=1 + scheduler.num_spec_tokens,
            unchunked_prefill_tokens=_unchunked_tokens(scheduler),
            prefill_block_tokens=scheduler.block_size if _splits_at_blocks(scheduler) else 0,
            kv_growth=kv_growth(groups, block_size),
        )
        # Requests admitted and not yet finished, and those of them that still prefill.
        self._admitted: dict[str, Any] = {}
        self._prefilling: dict[str, Any] = {}
        # Lately, where it can be less than the most; None where it cannot.
        self._tokens_per_decode: float | None = None
        if self.facts.tokens_per_decode > 1:
            self._tokens_per_decode = float(self.facts.tokens_per_decode)
        # Tokens of a long prompt that one step takes at most, as vLLM was started; 0 for no such
        # bound, and where whole prompts or images must fit a step, for which it is no matter.
        self._long_prefill_tokens = 0
        if not self.facts.unchunked_prefill_tokens:
            self._long_prefill_tokens = int(scheduler.scheduler_config.long_prefill_token_threshold)
        self._running_before = 0
        self._preempted_since = self._prompts_done = 0
        self._all_blocks = self._usable_blocks()
        self._has_connector = getattr(scheduler, "connector", None) is not None
        self._outside = self._looked_outside = self._paused = 0
        self._whole: dict[Any, bool] = {}
        # Bound once, not in each snapshot.
        self._read_running, self._read_waiting = self.read_running, self.read_waiting

    @property
    def model_name(self) -> str:
        """The first served model name, for metric labels."""
        name = self._scheduler.vllm_config.model_config.served_model_name
        return str(name[0] if isinstance(name, list) else name)

    @property
    def engine_index(self) -> int:
        """The data-parallel rank."""
        return int(self._scheduler.vllm_config.parallel_config.data_parallel_index)

    def apply(self, limits: BatchLimits) -> None:
        """Sets both limits for the next `schedule()`, on top of what vLLM counts beside RUNNING."""
        seqs, startup = limits.max_num_seqs + self._reserved(), self.facts.startup_limits
        if seqs > startup.max_num_seqs:
            seqs = startup.max_num_seqs
        scheduler, tokens = self._scheduler, limits.max_num_batched_tokens
        setattr(scheduler, self._limit_name, seqs)
        scheduler.max_num_scheduled_tokens = tokens
        if self._long_prefill_tokens:
            scheduler.scheduler_config.long_prefill_token_threshold = self._largest_chunk(tokens)

    def restore(self) -> None:
        """Puts the start-up limits back, by itself: `apply` may be what failed."""
        startup = self.facts.startup_limits
        setattr(self._scheduler, self._limit_name, startup.max_num_seqs)
        self._scheduler.max_num_scheduled_tokens = startup.max_num_batched_tokens
        if self._long_prefill_tokens:
            config = self._scheduler.scheduler_config
            config.long_prefill_token_threshold = self._long_prefill_tokens

    def _largest_chunk(self, tokens: int) -> int:
        """`long_prefill_token_threshold` for a token budget: the same share of it as at the start.

        With a threshold others run behind a long prompt, which is to leave them their tokens: vLLM
        gives out the budget in the order of RUNNING.
        """
        facts, own = self.facts, self._long_prefill_tokens
        share = own * tokens // facts.startup_limits.max_num_batched_tokens
        decodes = math.ceil(len(self._scheduler.running) * (self._tokens_per_decode or 1.0))
        return min(own, max(min(share, tokens - decodes), facts.prefill_block_tokens, 1))

    def snapshot(self, clock_seconds: float, binding: Binding) -> EngineSnapshot:
        """Reads the state a policy sees; O(1) and the prefills under way."""
        scheduler = self._scheduler
        running, queued = scheduler.get_request_counts()
        paused = scheduler.num_waiting_for_streaming_input
        computed = left = 0
        if self._prefilling:
            self._forget_aborted_prefills()
            computed, left = self._oldest_prompt()
        return EngineSnapshot(
            self.facts,
            clock_seconds,
            running,
            queued - paused if queued > paused else 0,
            min(len(self._prefilling), running),
            self.used_blocks(),
            binding,
            computed,
            left,
            self._read_running,
            self._read_waiting,
            self._prompts_done,
            self._tokens_per_decode,
            self._outside_blocks(running + queued),
        )

    def _forget_aborted_prefills(self) -> None:
        """An abort takes a request out of RUNNING at once; `schedule()` tells of it only later."""
        known = self._scheduler.requests
        gone = [request_id for request_id in self._prefilling if request_id not in known]
        for request_id in gone:
            del self._prefilling[request_id]

    def _oldest_prompt(self) -> tuple[int, int]:
        """Tokens computed, and still to compute, of the oldest prompt under way."""
        for request in self._prefilling.values():
            computed = request.num_computed_tokens
            return computed, max(0, request.num_tokens - computed)
        return 0, 0

    def used_blocks(self) -> int:
        """KV blocks that requests hold, per group."""
        held: int = self._all_blocks - self._block_pool.get_num_free_blocks()
        return held if self._groups == 1 else held // self._groups

    def _outside_blocks(self, queued_or_running: int) -> int:
        """KV blocks held outside RUNNING, as last looked at: a look costs O(requests).

        It looks when a session pauses or goes on, and now and then.
        """
        scheduler = self._scheduler
        paused = scheduler.num_waiting_for_streaming_input
        if not paused and len(scheduler.requests) <= queued_or_running and not self._has_connector:
            return 0
        self._looked_outside -= 1
        if self._looked_outside < 0 or paused != self._paused:
            self._looked_outside = LOOK_OUTSIDE_STEPS
            self._paused = paused
            self._outside = self._look_outside()
        return min(self._outside, self.used_blocks())

    def _look_outside(self) -> int:
        """KV blocks of requests that are not in RUNNING: paused, loading, or ended and sending."""
        inside = {request.request_id for request in self._scheduler.running}
        block_size = self.facts.block_size
        held = np.array(
            [
                request.num_computed_tokens
                for request_id, request in self._scheduler.requests.items()
                if request_id not in inside
            ],
            dtype=np.float64,
        )
        return int(np.ceil(self.facts.kv_growth.held(held) / block_size).sum())

    def read_running(self) -> Sequence[SequenceState]:
        """Every sequence in RUNNING; O(N)."""
        prefilling = self._prefilling
        return [
            _state(request)
            if request.request_id in prefilling
            else SequenceState(request.num_computed_tokens, request.num_output_tokens, 0)
            for request in self._scheduler.running
        ]

    def read_waiting(self, count: int) -> Sequence[SequenceState]:
        """The next waiting requests; a priority queue shows only its head."""
        queue = self._scheduler.waiting
        if isinstance(queue, deque):
            return [_state(request) for request in islice(queue, count)]
        return [_state(queue.peek_request())] if queue and count else []

    def is_new(self, request: Any) -> bool:
        """Whether a request about to be added is not another part of a streaming session."""
        return request.request_id not in self._scheduler.requests

    def before_schedule(self) -> None:
        """Marks where RUNNING ends, so that the step's admissions can be told apart."""
        self._running_before = len(self._scheduler.running)
        self._preempted_since = 0

    def preempting(self, request: Any) -> int:
        """Notes a preemption about to happen; returns the KV tokens it throws away."""
        self._preempted_since += 1
        self._prefilling.pop(request.request_id, None)
        return int(request.num_computed_tokens)

    def after_schedule(self, output: Any) -> StepContent:
        """Reads what was scheduled; O(1) and the step's admissions, prefills and completions."""
        scheduler = self._scheduler
        running = scheduler.running
        # Admissions are appended to RUNNING, and vLLM admits nobody in a step that preempted.
        first_admitted = self._running_before - self._preempted_since
        finished_ids = output.finished_req_ids
        scheduled = output.num_scheduled_tokens
        cached_tokens = 0
        if len(running) > first_admitted:
            cached_tokens = self._take_admitted(running[first_admitted:], scheduled)
        prefill_seqs, prefill_tokens, prefill_squares = (
            self._count_prefills(scheduled) if self._prefilling else _NO_PREFILL
        )
        decode_seqs = len(scheduled) - prefill_seqs
        if self._tokens_per_decode is not None and decode_seqs:
            decoded = output.total_num_scheduled_tokens - prefill_tokens
            self._note_drafts(self._tokens_per_decode, decoded / decode_seqs)
        return StepContent(
            len(running),
            self._waiting(),
            decode_seqs,
            prefill_tokens,
            prefill_squares,
            cached_tokens,
            output.total_num_scheduled_tokens,
            self.used_blocks(),
            self._take_finished(finished_ids) if finished_ids else (),
            self._reserved(),
        )

    def _note_drafts(self, before: float, now: float) -> None:
        """Follows the tokens of a decoding sequence: up at once, for they come before prompts."""
        self._tokens_per_decode = max(now, DRAFTS_KEPT * before, 1.0)

    def _take_admitted(self, requests: list[Any], scheduled: dict[str, int]) -> int:
        """Notes the step's admissions; returns the prompt tokens that new ones need not compute."""
        admitted, prefilling = self._admitted, self._prefilling
        cached = 0
        for request in requests:
            request_id = request.request_id
            if request_id not in admitted:
                cached += request.num_computed_tokens - scheduled.get(request_id, 0)
            admitted[request_id] = prefilling[request_id] = request
        return cached

    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._scheduler.running and not self._waiting()

    def _waiting(self) -> int:
        """Requests that wait for admission: vLLM queues paused streaming sessions among them."""
        scheduler = self._scheduler
        waiting = scheduler.get_request_counts()[1] - scheduler.num_waiting_for_streaming_input
        return waiting if waiting > 0 else 0

    def _reserved(self) -> int:
        """Places that vLLM holds outside RUNNING: those of paused streaming sessions."""
        if not self._counts_paused:
            return 0
        return int(self._scheduler.num_waiting_for_streaming_input)

    def _usable_blocks(self) -> int:
        return int(self._block_pool.num_gpu_blocks) - 1  # one is vLLM's null block

    def _take_finished(self, request_ids: set[str]) -> tuple[FinishedRequest, ...]:
        taken = []
        prefilling, admitted = self._prefilling, self._admitted
        # A set of texts has another order in every process; runs are to be alike.
        for request_id in request_ids if len(request_ids) == 1 else sorted(request_ids):
            if request_id in prefilling:
                del prefilling[request_id]
            request = admitted.pop(request_id, None)
            if request is not None:
                taken.append(
                    FinishedRequest(
                        request.num_prompt_tokens,
                        request.num_output_tokens,
                        self._is_whole(request.status),
                    )
                )
        return tuple(taken)

    def _is_whole(self, status: Any) -> bool:
        """Whether a request with this final status generated all it would have."""
        whole = self._whole.get(status)
        if whole is None:  # reading an enumeration's name is slow
            whole = self._whole[status] = status.name not in CUT_SHORT
        return whole

    def _count_prefills(self, scheduled: dict[str, int]) -> tuple[int, int, int]:
        """Sequences, tokens and squares of prefill in a step; forgets the prompts it completes."""
        sequences = tokens = squares = 0
        completed = []
        for request_id, request in self._prefilling.items():
            chunk = scheduled.get(request_id, 0)
            if chunk:
                sequences += 1
                tokens += chunk
                squares += chunk * (2 * request.num_computed_tokens - chunk)
            if not request.is_prefill_chunk:
                completed.append(request_id)
        for request_id in completed:
            del self._prefilling[request_id]
        self._prompts_done += len(completed)
        return sequences, tokens, squares


def _unchunked_tokens(scheduler: Any) -> int:
    """Prompt tokens that must fit a step: the longest prompt where prefills are not chunked.

    Where images may not be split, the start-up budget: vLLM has made sure that any fits into it,
    and in a smaller one it would compute the rest of an image in another step.
    """
    config = scheduler.scheduler_config
    if getattr(config, "disable_chunked_mm_input", False):
        return int(scheduler.max_num_scheduled_tokens)
    if config.enable_chunked_prefill:
        return 0
    return int(scheduler.vllm_config.model_config.max_model_len)


def _splits_at_blocks(scheduler: Any) -> bool:
    """Whether prefills must end on a block: hybrid models whose Mamba state is cached.

    Releases that know no such models have no such attribute.
    """
    return bool(getattr(scheduler, "need_mamba_block_aligned_split", False))


def _state(request: Any) -> SequenceState:
    computed = request.num_computed_tokens
    prefills = request.is_prefill_chunk or computed == 0
    left = max(0, request.num_tokens - computed) if prefills else 0
    return SequenceState(computed, request.num_output_tokens, left)
