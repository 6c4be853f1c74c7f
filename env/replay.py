"""Replays recorded traffic: a stretch of a trace, at its own times or a little off them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.traces import TraceLine, TraceRow, bundled_traces, read_trace

Lines = tuple[TraceLine[TraceRow], ...]

#: A whole trace may begin so many seconds late, or by so large a share of its length; what begins
#: later counts from something else, such as 1970.
LATE_SECONDS, LATE_SHARE = 10.0, 0.1


@dataclass(frozen=True)
class ReplayParameters(Parameters):
    """Which stretch of which trace."""

    path: str = parameter(help="a .csv or .csv.gz file, or a trace that comes with batchpilot")
    start_s: float = parameter(0.0, minimum=0, help="second of the trace to begin at")
    end_s: float | None = parameter(
        None, above=0, help="second to end before; None goes to its end"
    )
    jitter_s: float | None = parameter(
        None, minimum=0, help="spread each arrival over so many seconds; None takes the trace's own"
    )
    prompt_max: int | None = parameter(None, minimum=1, help="longer prompts are cut to this")
    output_max: int | None = parameter(None, minimum=1, help="longer outputs are cut to this")

    def __post_init__(self) -> None:
        """Checks each value, then what must hold between them."""
        super().__post_init__()
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ConfigError(f"end_s={self.end_s:g} must be more than start_s={self.start_s:g}")


def replay_names() -> tuple[str, ...]:
    """The traces that come with batchpilot and have arrival times."""
    return tuple(name for name, trace in bundled_traces().items() if trace.has_arrivals)


def trace_end_seconds(params: ReplayParameters) -> float:
    """Where the stretch ends: its `end_s`, or the trace's last arrival.

    Raises:
        ConfigError: The file cannot be used.
    """
    if params.end_s is not None:
        return params.end_s
    return _lines(params, None)[-1].row.arrival_s


def arrival_seconds(params: ReplayParameters) -> npt.NDArray[np.float64]:
    """When the requests of a stretch arrive, in seconds of the trace, without jitter.

    Raises:
        ConfigError: The file cannot be used.
    """
    times = np.array([line.row.arrival_s for line in _lines(params, None)])
    return times[(params.start_s <= times) & (times < _end_seconds(params))]


def replayed_lines(
    params: ReplayParameters, rng: np.random.Generator, *, num_requests: int | None
) -> Lines:
    """The requests of a stretch, in order of arrival, times counted from its start.

    Args:
        params: Which stretch of which trace.
        rng: Decides the jitter: each arrival moves by a uniform part of `jitter_s`.
        num_requests: At most so many, from the start of the stretch.

    Raises:
        ConfigError: The file cannot be used, the stretch holds no request, or the whole trace is
            asked for and its times do not count from its start.
    """
    lines = _lines(params, num_requests)
    end_s = _end_seconds(params)
    inside = [line for line in lines if params.start_s <= line.row.arrival_s < end_s]
    if not inside:
        raise ConfigError(
            f"trace {params.path!r}: no request from start_s={params.start_s:g} to "
            f"end_s={end_s:g}; its last is at {lines[-1].row.arrival_s:g}"
        )
    if params.start_s == 0:
        _check_beginning(inside, params)
    moved = _moved(inside, params, rng, _jitter_seconds(params))
    return tuple(moved[:num_requests])


def _check_beginning(lines: list[TraceLine[TraceRow]], params: ReplayParameters) -> None:
    first, last = lines[0].row.arrival_s, lines[-1].row.arrival_s
    if first > max(LATE_SECONDS, LATE_SHARE * (last - first)):
        raise ConfigError(
            f"trace {params.path!r}: nothing comes before arrival_s={first:.17g}, and these are "
            f"seconds since the trace began; begin there: trace:{params.path}:start_s={first:.17g}"
        )


def _lines(params: ReplayParameters, num_requests: int | None) -> Lines:
    """The whole trace, or so much of a file as is needed."""
    bundled = bundled_traces().get(params.path)
    if bundled is None:
        # Read each time: a file of the user's may change between two uses; ours do not.
        return _file_lines(params, num_requests)
    if not bundled.has_arrivals:
        raise ConfigError(f"{params.path} has no arrival times; use empirical:{params.path}")
    return _bundled_lines(params.path)


def _end_seconds(params: ReplayParameters) -> float:
    return np.inf if params.end_s is None else params.end_s


def _jitter_seconds(params: ReplayParameters) -> float:
    if params.jitter_s is not None:
        return params.jitter_s
    bundled = bundled_traces().get(params.path)
    return bundled.jitter_s if bundled else 0.0


@lru_cache(maxsize=8)
def _bundled_lines(name: str) -> Lines:
    return tuple(read_trace(bundled_traces()[name].path))


def _file_lines(params: ReplayParameters, num_requests: int | None) -> Lines:
    """Reads no further than needed: a long file that is broken further down may still be used."""
    whole = params.start_s == 0 and not params.jitter_s
    return tuple(read_trace(Path(params.path), num_requests=num_requests if whole else None))


def _moved(
    lines: list[TraceLine[TraceRow]],
    params: ReplayParameters,
    rng: np.random.Generator,
    jitter_s: float,
) -> list[TraceLine[TraceRow]]:
    """The lines with their times moved and their lengths cut, in order."""
    shifts = rng.uniform(0.0, jitter_s, len(lines)) if jitter_s else np.zeros(len(lines))
    moved = [
        line._replace(row=_cut(line.row, params, line.row.arrival_s - params.start_s + shift))
        for line, shift in zip(lines, shifts.tolist(), strict=True)
    ]
    return sorted(moved, key=lambda line: line.row.arrival_s)


def _cut(row: TraceRow, params: ReplayParameters, arrival_s: float) -> TraceRow:
    cut = row.input_tokens, row.output_tokens
    if params.prompt_max is not None:
        cut = min(cut[0], params.prompt_max), cut[1]
    if params.output_max is not None:
        cut = cut[0], min(cut[1], params.output_max)
    if (arrival_s, *cut) == (row.arrival_s, row.input_tokens, row.output_tokens):
        return row
    shared = min(row.shared_prefix_tokens, cut[0])
    return replace(
        row,
        arrival_s=arrival_s,
        input_tokens=cut[0],
        output_tokens=cut[1],
        shared_prefix_tokens=shared,
    )
