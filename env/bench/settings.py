"""The settings of a bench: every option of its command line, typed and checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.bench.measure import Slo
from batchpilot.env.workloads import DEFAULT_NUM_REQUESTS

ENGINES = ("live",)
_ALWAYS_NAMED = ("engine", "model", "policies", "workload")


@dataclass(frozen=True)
class BenchSettings(Parameters):
    """One field per option; `kv_blocks` is `--kv-blocks`, and so on.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    engine: str = parameter("live", choices=ENGINES, help="live: vLLM in this process, real time")
    model: str = parameter("smollm2-135m", help="smollm2-135m, tiny, or a model folder")
    policies: str = parameter(
        "static,watermark:0.05,memory", help="comma-separated; the first is the reference"
    )
    workload: str = parameter(
        "chat",
        help="chat, fixed:KEY=VALUE:..., lognormal:KEY=VALUE:..., or a CSV file with the columns "
        "arrival_s,input_tokens,output_tokens",
    )
    num_requests: int | None = parameter(
        None,
        minimum=1,
        help=f"requests a run; {DEFAULT_NUM_REQUESTS}, or all of a file, when left out",
    )
    arrivals: str | None = parameter(
        None,
        help="saturated (all at once), poisson:RATE (requests per second) or trace (the file's "
        "own times); trace for a file, else saturated, when left out",
    )
    rate_scale: float = parameter(1.0, above=0, help="multiplies the arrival rate")
    itl_slo_ms: float | None = parameter(
        None, above=0, help="target between tokens in ms; policies that steer by it take it too"
    )
    ttft_slo_ms: float | None = parameter(
        None, above=0, help="target for the first token in ms, queueing included"
    )
    max_num_seqs: int = parameter(128, minimum=1, help="start-up limit of running sequences")
    max_num_batched_tokens: int = parameter(
        2048, minimum=1, help="start-up limit of tokens per step"
    )
    kv_blocks: int = parameter(
        300,
        minimum=0,
        help="KV blocks, few on purpose so that memory is scarce; 0 fills the engine's memory",
    )
    block_size: int = parameter(32, minimum=1, help="tokens per KV block")
    rounds: int = parameter(3, minimum=1, help="times each policy runs, interleaved")
    seed: int = parameter(0, minimum=0, help="of round 1; each round adds one")
    json: str = parameter("results.json", help="where the numbers go")
    html: str = parameter("report.html", help="where the report goes")
    plot: str | None = parameter(
        None, help="also draw limit, running and KV usage over time to this .svg or .png"
    )

    def __post_init__(self) -> None:
        """Checks each value, then what must hold between them."""
        super().__post_init__()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: each running sequence takes a token of a step"
            )
        if self.plot is not None and self.plot_kind not in ("svg", "png"):
            raise ConfigError(f"plot={self.plot!r} must end in .svg or .png")
        self._check_files_differ()

    @property
    def slo(self) -> Slo:
        """The targets."""
        return Slo(self.itl_slo_ms, self.ttft_slo_ms)

    @property
    def plot_kind(self) -> str:
        """The plot's file format, by its ending."""
        return Path(self.plot or "").suffix.lower().removeprefix(".")

    @property
    def output_files(self) -> list[Path]:
        """Every file the bench writes."""
        return [Path(name) for name in (self.json, self.html, self.plot) if name is not None]

    def _check_files_differ(self) -> None:
        seen = {Path(self.workload).resolve()}
        for path in self.output_files:
            if path.resolve() in seen:
                raise ConfigError(f"{path} is named twice: outputs and workload must differ")
            seen.add(path.resolve())

    def command(self) -> str:
        """The command line that asks for these settings.

        What decides the most is spelt out even where it is the default.
        """
        words = ["batchpilot", "bench"]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _ALWAYS_NAMED or value != item.default:
                words += [option(item.name), str(value)]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """The settings that are about the bench itself and not about its files."""
        elsewhere = ("engine", "model", "workload", "json", "html", "plot")
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in elsewhere}
        return {**shown, "policies": [part.strip() for part in self.policies.split(",")]}


def option(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")
