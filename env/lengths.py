"""How long synthetic requests are: prompt and output tokens of each, drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from batchpilot.agents.parameters import Parameters, parameter
from batchpilot.env.specs import Kind
from batchpilot.env.traces import bundled_traces, read_lengths

SHAREGPT = "sharegpt-lengths"
SYSTEM_PROMPT_HELP = "tokens that all prompts begin with, before their own"


class Lengths(NamedTuple):
    """How long one request is, in tokens.

    Attributes:
        prompt_tokens: Its prompt.
        output_tokens: Its output.
        shared_prefix_tokens: How much of the prompt, from its start, all others have too.
    """

    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0

    def after(self, system_prompt: int) -> Lengths:
        """The same behind so many tokens that all share."""
        if not system_prompt:
            return self
        return Lengths(system_prompt + self.prompt_tokens, self.output_tokens, system_prompt)


class LengthDistribution(Protocol):
    """Where lengths come from."""

    def draw(
        self, rng: np.random.Generator, arrival_seconds: npt.NDArray[np.float64]
    ) -> Sequence[Lengths]:
        """Draws one request's lengths for each arrival.

        Args:
            rng: Source of chance.
            arrival_seconds: Shape (requests,); for distributions that change as time goes by.
        """


@dataclass(frozen=True)
class FixedParameters(Parameters):
    """Every request the same."""

    prompt_tokens: int = parameter(minimum=1, help="tokens of every prompt")
    output_tokens: int = parameter(minimum=1, help="tokens of every output")
    system_prompt: int = parameter(0, minimum=0, help=SYSTEM_PROMPT_HELP)


class FixedLengths:
    """Every request has the same lengths."""

    def __init__(self, params: FixedParameters) -> None:
        """Keeps the pair."""
        lengths = Lengths(params.prompt_tokens, params.output_tokens)
        self._lengths = lengths.after(params.system_prompt)

    def draw(
        self, rng: np.random.Generator, arrival_seconds: npt.NDArray[np.float64]
    ) -> Sequence[Lengths]:
        """The same pair for each arrival."""
        return [self._lengths] * len(arrival_seconds)


@dataclass(frozen=True)
class LognormalParameters(Parameters):
    """Two lognormal distributions, independent of each other."""

    prompt_mean: float = parameter(minimum=1, help="mean prompt length in tokens")
    output_mean: float = parameter(minimum=1, help="mean output length in tokens")
    prompt_sigma: float = parameter(0.8, minimum=0, help="spread of the log of prompt lengths")
    output_sigma: float = parameter(0.7, minimum=0, help="spread of the log of output lengths")
    prompt_max: int = parameter(1024, minimum=1, help="longer prompts are cut to this")
    output_max: int = parameter(1024, minimum=1, help="longer outputs are cut to this")
    system_prompt: int = parameter(0, minimum=0, help=SYSTEM_PROMPT_HELP)


@dataclass(frozen=True)
class ChatParameters(LognormalParameters):
    """Short questions and somewhat longer answers; both have a long tail, as real chats do."""

    prompt_mean: float = parameter(100.0, minimum=1, help="mean prompt length in tokens")
    output_mean: float = parameter(150.0, minimum=1, help="mean output length in tokens")


class LognormalLengths:
    """Lognormal prompt and output lengths, rounded to whole tokens, at least 1.

    Formula: exp(mu + sigma z), z standard normal, mu = ln(mean) - sigma^2 / 2, so that `mean` is
    the mean of the lengths themselves.

    Limitations: cutting at the maximum lowers the mean a little.
    """

    def __init__(self, params: LognormalParameters) -> None:
        """Keeps the parameters."""
        self._params = params

    def draw(
        self, rng: np.random.Generator, arrival_seconds: npt.NDArray[np.float64]
    ) -> Sequence[Lengths]:
        """Draws all prompts, then all outputs."""
        p, count = self._params, len(arrival_seconds)
        prompts = _lognormal_tokens(rng, count, p.prompt_mean, p.prompt_sigma, p.prompt_max)
        outputs = _lognormal_tokens(rng, count, p.output_mean, p.output_sigma, p.output_max)
        pairs = zip(prompts, outputs, strict=True)
        return [Lengths(*pair).after(p.system_prompt) for pair in pairs]


def _lognormal_tokens(
    rng: np.random.Generator, count: int, mean: float, sigma: float, most: int
) -> list[int]:
    mu = math.log(mean) - sigma**2 / 2
    # The cut comes first: a wide sigma can overflow what an integer holds.
    tokens = np.clip(rng.lognormal(mu, sigma, count), 1, most)
    return [int(value) for value in np.rint(tokens)]


@dataclass(frozen=True)
class EmpiricalParameters(Parameters):
    """A file of lengths, and the longest that are taken as they are."""

    path: str = parameter(help="a .csv file, or a trace that comes with batchpilot")
    prompt_max: int | None = parameter(None, minimum=1, help="longer prompts are cut to this")
    output_max: int | None = parameter(None, minimum=1, help="longer outputs are cut to this")
    system_prompt: int = parameter(0, minimum=0, help=SYSTEM_PROMPT_HELP)


@dataclass(frozen=True)
class ShareGptParameters(Parameters):
    """The longest that are taken as they are."""

    prompt_max: int | None = parameter(None, minimum=1, help="longer prompts are cut to this")
    output_max: int | None = parameter(None, minimum=1, help="longer outputs are cut to this")
    system_prompt: int = parameter(0, minimum=0, help=SYSTEM_PROMPT_HELP)


class EmpiricalLengths:
    """Pairs of lengths drawn at random from recorded ones, so that both belong together.

    Each request draws a whole row, rows may come again: the order of the file says nothing.
    """

    def __init__(self, params: EmpiricalParameters) -> None:
        """Reads the file.

        Raises:
            ConfigError: It cannot be used; the text names file, line and column.
        """
        bundled = bundled_traces().get(params.path)
        self._params = params
        self._lengths = _recorded_lengths(bundled.path if bundled else Path(params.path))

    @classmethod
    def sharegpt(cls, params: ShareGptParameters) -> EmpiricalLengths:
        """The lengths of 30,731 ShareGPT conversations."""
        return cls(EmpiricalParameters(SHAREGPT, **asdict(params)))

    def draw(
        self, rng: np.random.Generator, arrival_seconds: npt.NDArray[np.float64]
    ) -> Sequence[Lengths]:
        """Draws a row for each arrival."""
        rows = rng.integers(len(self._lengths), size=len(arrival_seconds)).tolist()
        return [self._cut(self._lengths[row]) for row in rows]

    def _cut(self, lengths: Lengths) -> Lengths:
        p = self._params
        prompt = min(lengths.prompt_tokens, p.prompt_max or lengths.prompt_tokens)
        output = min(lengths.output_tokens, p.output_max or lengths.output_tokens)
        return Lengths(prompt, output).after(p.system_prompt)


@lru_cache(maxsize=8)
def _recorded_lengths(path: Path) -> tuple[Lengths, ...]:
    """Reads a file once for all its uses in this process."""
    rows = (line.row for line in read_lengths(path))
    return tuple(Lengths(row.input_tokens, row.output_tokens) for row in rows)


class ShiftedLengths:
    """One distribution after another: each holds for the arrivals from its start on.

    Args:
        starts: Seconds at which each begins, rising, the first 0.
        distributions: One for each start.
    """

    def __init__(
        self, starts: Sequence[float], distributions: Sequence[LengthDistribution]
    ) -> None:
        """Keeps them."""
        self._starts = tuple(starts)
        self._distributions = tuple(distributions)

    def draw(
        self, rng: np.random.Generator, arrival_seconds: npt.NDArray[np.float64]
    ) -> Sequence[Lengths]:
        """Has each distribution draw for the arrivals of its time."""
        borders = np.searchsorted(arrival_seconds, [*self._starts[1:], math.inf])
        drawn: list[Lengths] = []
        for end, distribution in zip(borders.tolist(), self._distributions, strict=True):
            drawn.extend(distribution.draw(rng, arrival_seconds[len(drawn) : end]))
        return drawn


LENGTHS: dict[str, Kind[LengthDistribution]] = {
    "chat": Kind(ChatParameters, LognormalLengths),
    "fixed": Kind(FixedParameters, FixedLengths),
    "lognormal": Kind(LognormalParameters, LognormalLengths),
    "sharegpt": Kind(ShareGptParameters, EmpiricalLengths.sharegpt),
    "empirical": Kind(EmpiricalParameters, EmpiricalLengths),
}
