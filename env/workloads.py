"""What an engine is asked to do: requests with arrival times and lengths, synthetic or recorded.

A workload is the same under every policy: lengths, arrival times and prompts depend on the seed
alone.

The description of one, `WorkloadSpec`, has two spellings. On a command line:

    --workload chat:output_max=400,lognormal:1000:50@60 --arrivals poisson:4,poisson:16@60

and as a file, `--workload workload.yaml`:

    workload:
      - chat: {output_max: 400}
      - lognormal: {prompt_mean: 1000, output_mean: 50}
        at_s: 60
    arrivals: poisson:4,poisson:16@60
    num_requests: 500
    rate_scale: 1.5
    seed: 3
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.arrivals import ARRIVALS, ArrivalProcess, ShiftedArrivals
from batchpilot.env.engine import EngineRequest
from batchpilot.env.lengths import (
    LENGTHS,
    EmpiricalParameters,
    LengthDistribution,
    ShiftedLengths,
)
from batchpilot.env.replay import Lines, ReplayParameters, replay_names, replayed_lines
from batchpilot.env.specs import Kind, build_from_text, split_phases

DEFAULT_NUM_REQUESTS = 300
SATURATED = "saturated"
TRACE_ARRIVALS = "trace"
TRACE_SUFFIXES = (".csv", ".csv.gz")
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request, before its prompt is made.

    Attributes:
        arrival_seconds: When it arrives, from the start of the run.
        prompt_tokens: Length of its prompt.
        output_tokens: Tokens it generates.
        line: Where its trace file has it; None where it comes from no file.
        shared_prefix_tokens: How much of its prompt, from the start, an earlier request had too.
    """

    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int
    line: int | None = field(default=None, compare=False)
    shared_prefix_tokens: int = 0

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
                    "that the model (max_model_len) and its KV cache allow"
                )


@dataclass(frozen=True)
class WorkloadSpec(Parameters):
    """A workload's whole description; equal descriptions give equal workloads.

    Attributes:
        workload: One of `LENGTHS` with its parameters, or phases of them (see
            `batchpilot.env.specs`); a trace: its name, `trace:NAME_OR_FILE:start_s=60:...` (see
            `ReplayParameters`) or just a CSV file.
        arrivals: One of `ARRIVALS`, or phases of them, or `trace` for a trace's own times. None
            takes `trace` for a trace and `saturated` otherwise.
        num_requests: None takes `DEFAULT_NUM_REQUESTS`, or all of a trace. A trace that has fewer
            gives what it has.
        rate_scale: Multiplies the arrival rate by running the workload's time so much faster,
            shifts and ramps included: the requests stay the same, their times are divided.
        seed: Decides every random choice; lengths stay the same when only arrivals change.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    workload: str = parameter("chat", help="lengths, a trace, or a .csv or .yaml file")
    arrivals: str | None = parameter(None, help="when requests arrive")
    num_requests: int | None = parameter(None, minimum=1, help="how many")
    rate_scale: float = parameter(1.0, above=0, help="multiplies the arrival rate")
    seed: int = parameter(0, minimum=0, help="decides every random choice")

    @property
    def replay(self) -> ReplayParameters | None:
        """The stretch of a trace that is replayed; None for a synthetic workload.

        Raises:
            ConfigError: A trace with a key or value that does not fit.
        """
        return _replay_parameters(self.workload)

    @property
    def files(self) -> list[Path]:
        """The trace that is replayed, or what lengths are drawn from; names of ours among them.

        Raises:
            ConfigError: One of them with a key or value that does not fit.
        """
        replay = self.replay
        if replay is not None:
            return [Path(replay.path)]
        texts = [phase.text for phase in split_phases(self.workload, what="workload")]
        recorded = [text for text in texts if text.strip().partition(":")[0] in _RECORDED]
        return [build_from_text(text, _RECORDED, what="workload") for text in recorded]

    def build(self, replay: ReplayParameters | None = None) -> Workload:
        """Draws the requests.

        Args:
            replay: Another stretch of a trace than the description's own.

        Raises:
            ConfigError: Anything in it that cannot be used.
        """
        replay = replay or self.replay
        if replay is not None:
            return self._from_trace(replay)
        lengths = _length_distribution(self.workload)
        process = _arrival_process(self.arrivals or SATURATED)
        times = process.draw(self._chance(_ARRIVALS), self.num_requests or DEFAULT_NUM_REQUESTS)
        drawn = lengths.draw(self._chance(_LENGTHS), times)
        timed = zip((times / self.rate_scale).tolist(), drawn, strict=True)
        requests = tuple(
            WorkloadRequest(
                time, prompt_tokens, output_tokens, shared_prefix_tokens=shared_prefix_tokens
            )
            for time, (prompt_tokens, output_tokens, shared_prefix_tokens) in timed
        )
        return Workload(self.workload, requests)

    def _chance(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])

    def _from_trace(self, replay: ReplayParameters) -> Workload:
        lines = replayed_lines(replay, self._chance(_JITTER), num_requests=self.num_requests)
        times: Sequence[float] = [line.row.arrival_s / self.rate_scale for line in lines]
        if self.arrivals not in (None, TRACE_ARRIVALS):
            process = _arrival_process(self.arrivals or SATURATED)
            drawn = process.draw(self._chance(_ARRIVALS), len(lines))
            times = (drawn / self.rate_scale).tolist()
        name = Path(replay.path).name if _is_file(self.workload) else self.workload
        return Workload(name, _trace_requests(lines, times))


def build_workload(
    text_or_path: str | Path,
    *,
    num_requests: int | None = None,
    arrivals: str | None = None,
    rate_scale: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Builds a workload from its text form, from a CSV file or from a YAML file.

    Args:
        text_or_path: `WorkloadSpec.workload`, or a YAML file with the keys of `WorkloadSpec`.
        num_requests: As in `WorkloadSpec`; None leaves a YAML file's own.
        arrivals: As in `WorkloadSpec`; None leaves a YAML file's own.
        rate_scale: As in `WorkloadSpec`; multiplies a YAML file's own.
        seed: As in `WorkloadSpec`; added to a YAML file's own.

    Raises:
        ConfigError: Anything here that cannot be used.
    """
    given = WorkloadSpec(str(text_or_path), arrivals, num_requests, rate_scale, seed)
    return read_spec(given).build()


def read_spec(given: WorkloadSpec) -> WorkloadSpec:
    """Where a description names a YAML file, what the file and the description say together.

    Args:
        given: Its arrivals and number of requests win over the file's, its rate scale multiplies
            the file's, its seed is added to it. Without a YAML file it comes back as it is.

    Raises:
        ConfigError: The file cannot be used; the text names file and key.
    """
    if not given.workload.lower().endswith(YAML_SUFFIXES):
        return given
    # Only who has such a file needs the library.
    from batchpilot.env.workload_files import read_workload_file

    values = read_workload_file(Path(given.workload))
    spec = WorkloadSpec.from_mapping(values, where=given.workload)
    return replace(
        spec,
        arrivals=given.arrivals or spec.arrivals,
        num_requests=given.num_requests or spec.num_requests,
        rate_scale=given.rate_scale * spec.rate_scale,
        seed=given.seed + spec.seed,
    )


def engine_requests(workload: Workload, *, vocab_size: int, seed: int = 0) -> list[EngineRequest]:
    """Makes a random prompt for each request, in the workload's order.

    Args:
        workload: Its requests.
        vocab_size: Of the model.
        seed: Decides the prompts.

    Raises:
        ConfigError: A vocabulary of fewer than 8 tokens.
    """
    return list(iter_engine_requests(workload, vocab_size=vocab_size, seed=seed))


def iter_engine_requests(
    workload: Workload, *, vocab_size: int, seed: int = 0
) -> Iterator[EngineRequest]:
    """Makes the prompts one at a time; a long workload's take much memory.

    Ids come from the middle of the vocabulary, since models keep their special tokens at its ends.
    Prompts of more than a few tokens are distinct for all practical purposes, so that a prefix
    cache finds nothing in common, but for what is said to be shared: that is copied from the
    newest earlier prompt that is long enough. A trace says how much was shared, not with whom; the
    newest makes sharing as recent as it can be.

    Args:
        workload: Its requests.
        vocab_size: Of the model.
        seed: Decides the prompts.

    Raises:
        ConfigError: A vocabulary of fewer than 8 tokens.
    """
    if vocab_size < 8:
        raise ConfigError(f"vocab_size={vocab_size} must be at least 8")
    return _prompts(workload, vocab_size, seed)


def shared_with(requests: Sequence[WorkloadRequest]) -> list[int | None]:
    """For each request, the newest earlier one whose prompt holds all it shares.

    Returns:
        Positions in `requests`; None where nothing is shared, or no earlier prompt is as long: a
        stretch of a trace lacks what came before it.
    """
    # Only a prompt longer than all later ones can be the newest that is long enough, so that a
    # stack of falling lengths holds every candidate.
    candidates: list[int] = []
    sources: list[int | None] = []
    for index, request in enumerate(requests):
        source = None
        if request.shared_prefix_tokens:
            found = bisect.bisect_right(
                candidates,
                -request.shared_prefix_tokens,
                key=lambda candidate: -requests[candidate].prompt_tokens,
            )
            source = candidates[found - 1] if found else None
        sources.append(source)
        while candidates and requests[candidates[-1]].prompt_tokens <= request.prompt_tokens:
            candidates.pop()
        candidates.append(index)
    return sources


# Each kind of choice has its own stream of chance, so that changing one leaves the others alone.
_LENGTHS, _ARRIVALS, _PROMPTS, _JITTER = range(4)


def _prompts(workload: Workload, vocab_size: int, seed: int) -> Iterator[EngineRequest]:
    rng = np.random.default_rng([seed, _PROMPTS])
    low, high = vocab_size // 8, vocab_size * 3 // 4
    sources = shared_with(workload.requests)
    kept: dict[int, npt.NDArray[np.int64]] = {}
    last_use = {source: index for index, source in enumerate(sources) if source is not None}
    for index, (request, source) in enumerate(zip(workload.requests, sources, strict=True)):
        prompt = rng.integers(low, high, request.prompt_tokens)
        if source is not None:
            shared = request.shared_prefix_tokens
            prompt[:shared] = kept[source][:shared]
            if last_use[source] == index:
                del kept[source]
        if index in last_use:
            kept[index] = prompt
        yield EngineRequest(f"request-{index}", tuple(prompt.tolist()), request.output_tokens)


def _replay_parameters(workload: str) -> ReplayParameters | None:
    """How a trace is replayed, where the text names one; a file that is not there is still meant.

    Raises:
        ConfigError: `trace:` with a key or value that does not fit.
    """
    if _is_file(workload):
        return ReplayParameters(workload)
    name, _, rest = workload.partition(":")
    if name in replay_names():
        workload = f"{TRACE_ARRIVALS}:{name}" + (f":{rest}" if rest else "")
    elif name != TRACE_ARRIVALS:
        return None
    replay: ReplayParameters = build_from_text(workload, _REPLAY, what="workload")
    return replay


def _is_file(text: str) -> bool:
    if ":" in text and text.partition(":")[0] in (*LENGTHS, TRACE_ARRIVALS):
        return False
    return text.lower().endswith(TRACE_SUFFIXES) or (text not in LENGTHS and _exists(text))


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except OSError:  # no file has so long a name
        return False


_REPLAY = {TRACE_ARRIVALS: Kind(ReplayParameters, lambda params: params)}
_RECORDED: dict[str, Kind[Path]] = {
    "empirical": Kind(EmpiricalParameters, lambda params: Path(params.path))
}


def _length_distribution(text: str) -> LengthDistribution:
    besides = ", ".join([TRACE_ARRIVALS, *replay_names(), "a .csv or .yaml file"])
    phases = split_phases(text, what="workload")
    distributions = [
        build_from_text(phase.text, LENGTHS, what="workload", besides=besides) for phase in phases
    ]
    if len(distributions) == 1:
        return distributions[0]
    return ShiftedLengths([phase.start_s for phase in phases], distributions)


def _arrival_process(text: str) -> ArrivalProcess:
    if text == TRACE_ARRIVALS:
        raise ConfigError(f"arrivals {TRACE_ARRIVALS!r} needs a workload from a trace")
    phases = split_phases(text, what="arrivals")
    processes = [
        build_from_text(phase.text, ARRIVALS, what="arrivals", besides=TRACE_ARRIVALS)
        for phase in phases
    ]
    if len(processes) == 1:
        return processes[0]
    return ShiftedArrivals([phase.start_s for phase in phases], processes)


def _trace_requests(lines: Lines, times: Sequence[float]) -> tuple[WorkloadRequest, ...]:
    return tuple(
        WorkloadRequest(
            time,
            line.row.input_tokens,
            line.row.output_tokens,
            line.number,
            line.row.shared_prefix_tokens,
        )
        for time, line in zip(times, lines, strict=True)
    )
