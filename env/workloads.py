"""What an engine is asked to do: requests with arrival times and lengths, synthetic or recorded.

A workload is the same under every policy: lengths, arrival times and prompts depend on the seed
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.arrivals import ARRIVALS, ArrivalProcess
from batchpilot.env.engine import EngineRequest
from batchpilot.env.lengths import LENGTHS, LengthDistribution
from batchpilot.env.specs import build_from_text
from batchpilot.env.traces import read_trace

DEFAULT_NUM_REQUESTS = 300
TRACE_ARRIVALS = "trace"
TRACE_SUFFIX = ".csv"


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request, before its prompt is made.

    Attributes:
        arrival_seconds: When it arrives, from the start of the run.
        prompt_tokens: Length of its prompt.
        output_tokens: Tokens it generates.
        line: Where its trace file has it; None where it comes from no file.
    """

    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int
    line: int | None = field(default=None, compare=False)

    @property
    def total_tokens(self) -> int:
        """Prompt and output together: what the model's length limit is about."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival.

    Attributes:
        name: What it was built from, without folders.
        requests: At least one.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(request.output_tokens for request in self.requests)

    def check_fits(self, max_model_len: int) -> None:
        """Makes sure that a model can serve every request.

        Args:
            max_model_len: Most tokens, prompt and output together.

        Raises:
            ConfigError: A request is longer; the first such is named.
        """
        for index, request in enumerate(self.requests):
            if request.total_tokens > max_model_len:
                where = f"request {index}" if request.line is None else f"line {request.line}"
                raise ConfigError(
                    f"workload {self.name!r} {where}: {request.prompt_tokens} prompt + "
                    f"{request.output_tokens} output tokens are more than the {max_model_len} "
                    "that the model allows (max_model_len)"
                )


def build_workload(
    text_or_path: str | Path,
    *,
    num_requests: int | None = None,
    arrivals: str | None = None,
    rate_scale: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Builds a workload from its text form or from a CSV file.

    Args:
        text_or_path: `chat`, `fixed:prompt_tokens=128:output_tokens=64`, another of `LENGTHS`, or
            a CSV file (see `batchpilot.env.traces`).
        num_requests: How many; None takes `DEFAULT_NUM_REQUESTS`, or all of a file. A file that
            has fewer gives what it has.
        arrivals: `saturated`, `poisson:RATE`, another of `ARRIVALS`, or `trace` for the file's own
            times. None takes `trace` for a file and `saturated` otherwise.
        rate_scale: Multiplies the arrival rate: 2 halves every arrival time.
        seed: Decides every random choice; lengths stay the same when only arrivals change.

    Raises:
        ConfigError: Anything here that cannot be used.
    """
    _check_numbers(num_requests, rate_scale, seed)
    if _is_file(text_or_path):
        return _from_trace(Path(text_or_path), num_requests, arrivals, rate_scale, seed)
    lengths = build_from_text(str(text_or_path), LENGTHS, what="workload", besides="a .csv file")
    process = _arrival_process(arrivals or "saturated")
    count = num_requests or DEFAULT_NUM_REQUESTS
    times = _arrival_times(process, count, rate_scale, seed)
    return Workload(str(text_or_path), _draw_requests(lengths, times, seed))


def engine_requests(workload: Workload, *, vocab_size: int, seed: int = 0) -> list[EngineRequest]:
    """Makes a random prompt for each request, in the workload's order.

    Ids come from the middle of the vocabulary, since models keep their special tokens at its ends.
    Prompts of more than a few tokens are distinct for all practical purposes, so that a prefix
    cache finds nothing in common.

    Args:
        workload: Its requests.
        vocab_size: Of the model.
        seed: Decides the prompts.

    Raises:
        ConfigError: A vocabulary of fewer than 8 tokens.
    """
    if vocab_size < 8:
        raise ConfigError(f"vocab_size={vocab_size} must be at least 8")
    rng = np.random.default_rng([seed, _PROMPTS])
    low, high = vocab_size // 8, vocab_size * 3 // 4
    return [
        EngineRequest(
            request_id=f"request-{index}",
            prompt_token_ids=tuple(rng.integers(low, high, request.prompt_tokens).tolist()),
            output_tokens=request.output_tokens,
        )
        for index, request in enumerate(workload.requests)
    ]


# Each kind of choice has its own stream of chance, so that changing one leaves the others alone.
_LENGTHS, _ARRIVALS, _PROMPTS = range(3)


def _check_numbers(num_requests: int | None, rate_scale: float, seed: int) -> None:
    if num_requests is not None and num_requests < 1:
        raise ConfigError(f"num_requests={num_requests} must be at least 1")
    if not (math.isfinite(rate_scale) and rate_scale > 0):
        raise ConfigError(f"rate_scale={rate_scale} must be a number greater than 0")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be at least 0")


def _is_file(text_or_path: str | Path) -> bool:
    """Whether a CSV file is meant; one that is not there is still meant."""
    if isinstance(text_or_path, Path) or text_or_path.lower().endswith(TRACE_SUFFIX):
        return True
    return text_or_path.partition(":")[0] not in LENGTHS and Path(text_or_path).is_file()


def _arrival_process(text: str) -> ArrivalProcess:
    if text == TRACE_ARRIVALS:
        raise ConfigError(f"arrivals {TRACE_ARRIVALS!r} needs a workload from a CSV file")
    return build_from_text(text, ARRIVALS, what="arrivals", besides=TRACE_ARRIVALS)


def _arrival_times(
    process: ArrivalProcess, count: int, rate_scale: float, seed: int
) -> npt.NDArray[np.float64]:
    return process.draw(np.random.default_rng([seed, _ARRIVALS]), count) / rate_scale


def _draw_requests(
    lengths: LengthDistribution, times: npt.NDArray[np.float64], seed: int
) -> tuple[WorkloadRequest, ...]:
    drawn = lengths.draw(np.random.default_rng([seed, _LENGTHS]), times)
    pairs = zip(times.tolist(), drawn, strict=True)
    return tuple(WorkloadRequest(time, *pair) for time, pair in pairs)


def _from_trace(
    path: Path, num_requests: int | None, arrivals: str | None, rate_scale: float, seed: int
) -> Workload:
    lines = read_trace(path, num_requests=num_requests)
    times: Sequence[float] = [line.row.arrival_s / rate_scale for line in lines]
    if arrivals not in (None, TRACE_ARRIVALS):
        process = _arrival_process(arrivals)
        times = _arrival_times(process, len(lines), rate_scale, seed).tolist()
    requests = (
        WorkloadRequest(time, line.row.input_tokens, line.row.output_tokens, line.number)
        for time, line in zip(times, lines, strict=True)
    )
    return Workload(path.name, tuple(requests))
