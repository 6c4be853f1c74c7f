"""`trtllm`: TensorRT-LLM's dynamic tuning of batch size and token budget, from mean lengths."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from batchpilot.agents.limits import (
    BatchLimits,
    Decision,
    EngineFacts,
    EngineSnapshot,
    Source,
    StepRecord,
)
from batchpilot.agents.memory import startup_decision
from batchpilot.agents.parameters import Parameters, parameter

#: Least token budgets by the ratio of prompt to output: above the ratio, at least the tokens.
LEAST_TOKENS_ABOVE_RATIO = ((2.0, 8192), (0.5, 4096), (0.0, 2048))


@dataclass(frozen=True)
class TrtllmParameters(Parameters):
    """Parameters of `trtllm`."""

    window_requests: int = parameter(
        128, minimum=1, help="finished requests over which lengths are averaged"
    )


class TrtllmPolicy:
    """TensorRT-LLM's rule: as many sequences of mean length as the KV cache holds.

    Formula, with l_in and l_out the mean lengths of the last `window_requests` that finished:

        b = floor(total_blocks / ceil((l_in + l_out) / block_size))
        tokens = max(least, next power of two of (b * l_in / l_out + b))

    where `least` is 8192 for l_in / l_out > 2, 4096 above 0.5, else 2048; both are clamped to the
    start-up limits. The second line is the step in which prompts come in exactly as fast as their
    sequences leave. Source: TensorRT-LLM's `DynamicBatchTuner` and
    `KVCacheManager::getMaxCapacityBatchSize`.

    Regimes: the start-up limits until a request has finished; then both limits move only with the
    mean lengths.

    Limitations: it has no latency target, and counts every sequence at full length. TensorRT-LLM
    further rounds b by a table made for its kernels, which never goes below 128 and relies on an
    admission that reserves each sequence's whole length; vLLM has none, so that step is left out.
    Means of finished requests are too low at the start, because short ones finish first.
    """

    def __init__(self, params: TrtllmParameters) -> None:
        """Starts without lengths."""
        self._window: deque[tuple[int, int]] = deque(maxlen=params.window_requests)
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._decision: Decision | None = None

    def observe(self, step: StepRecord) -> None:
        """Takes in the requests that finished."""
        for request in step.finished:
            if request.completed and request.output_tokens > 0:
                self._remember(request.prompt_tokens, request.output_tokens)
                self._decision = None

    def decide(self, snapshot: EngineSnapshot) -> Decision:
        """Both limits from the means, computed anew when a request has finished."""
        if self._decision is None:
            self._decision = self._size(snapshot)
        return self._decision

    def _remember(self, prompt_tokens: int, output_tokens: int) -> None:
        if len(self._window) == self._window.maxlen:
            oldest_prompt, oldest_output = self._window[0]
            self._prompt_tokens -= oldest_prompt
            self._output_tokens -= oldest_output
        self._window.append((prompt_tokens, output_tokens))
        self._prompt_tokens += prompt_tokens
        self._output_tokens += output_tokens

    def _size(self, snapshot: EngineSnapshot) -> Decision:
        if not self._window:
            return startup_decision(snapshot, "no request has finished yet")
        count = len(self._window)
        limits = mean_length_limits(
            self._prompt_tokens / count, self._output_tokens / count, snapshot.engine
        )
        return Decision(limits, Source.MEMORY, "sequences of mean length in the KV cache")


def mean_length_limits(prompt_mean: float, output_mean: float, engine: EngineFacts) -> BatchLimits:
    """The rule itself; `TrtllmPolicy` has the formula.

    Args:
        prompt_mean: l_in, tokens.
        output_mean: l_out, tokens, more than 0.
        engine: Its KV cache and the start-up limits that bound the result.
    """
    startup = engine.startup_limits
    held_tokens = engine.kv_growth.of_one(prompt_mean + output_mean)
    blocks = math.ceil(held_tokens / engine.block_size)
    seqs = min(max(engine.total_blocks // blocks, 1), startup.max_num_seqs)
    ratio = prompt_mean / output_mean
    overlapped = seqs * ratio + seqs
    least = next(tokens for above, tokens in LEAST_TOKENS_ABOVE_RATIO if ratio > above or not above)
    tokens = max(least, 1 << math.ceil(math.log2(max(overlapped, 1.0))))
    return BatchLimits(seqs, min(tokens, startup.max_num_batched_tokens))
