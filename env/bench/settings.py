"""The settings of a bench: every option of its command line, typed and checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.bench.measure import Slo
from batchpilot.env.cache import CACHE_VARIABLE
from batchpilot.env.workloads import DEFAULT_NUM_REQUESTS

ENGINES = ("live", "virtual")
_ALWAYS_NAMED = ("engine", "policies", "workload")
#: What an engine takes where nothing is said. A virtual one has its cache from the profile.
_USUAL: dict[str, dict[str, Any]] = {
    "live": {"model": "smollm2-135m", "max_num_seqs": 128, "kv_blocks": 300, "block_size": 32},
    "virtual": {"max_num_seqs": 256},
}
#: What is about files and processes, or shown elsewhere.
_NOT_SHOWN = (
    *("engine", "model", "profile", "workload"),
    *("json", "html", "plot", "workers", "work_dir", "fresh"),
)
#: Settings that only one engine has.
_ONLY = {
    "live": ("model", "block_size"),
    "virtual": ("profile", "noise", "workers", "work_dir", "fresh"),
}


@dataclass(frozen=True)
class BenchSettings(Parameters):
    """One field per option; `kv_blocks` is `--kv-blocks`, and so on.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    engine: str = parameter(
        "live",
        choices=ENGINES,
        help="live: vLLM in this process, real time; virtual: vLLM's scheduler on a simulated GPU",
    )
    model: str | None = parameter(
        None, help="live only: smollm2-135m (the default), tiny, or a model folder"
    )
    profile: str | None = parameter(
        None,
        help="virtual only: the GPU and model, a profile's name or its .json file ('?' lists)",
    )
    policies: str = parameter(
        "static,watermark:0.05,memory",
        help="comma-separated, the first is the reference; listed by `batchpilot policies explain`",
    )
    shadow: str | None = parameter(
        None,
        help="a policy that decides beside each of ours and is only watched; its limits are drawn "
        "dashed",
    )
    workload: str = parameter(
        "chat",
        help="chat, a bundled trace or length distribution ('?' lists them), fixed:KEY=VALUE:..., "
        "lognormal:prompt_mean=N:output_mean=N:..., a CSV file with the columns "
        "arrival_s,input_tokens,output_tokens and, if prompts begin alike, shared_prefix_tokens, "
        "or a YAML file as below; "
        "lengths take system_prompt=N, tokens that all prompts begin with",
    )
    num_requests: int | None = parameter(
        None,
        minimum=1,
        help=f"requests a run; {DEFAULT_NUM_REQUESTS}, or all of a file, when left out",
    )
    arrivals: str | None = parameter(
        None,
        help="saturated (all at once), poisson:RATE (requests per second), gamma:RATE:CV (in "
        "bursts, if CV is above 1) or trace (the file's own times); trace for a file, else "
        "saturated, when left out",
    )
    rate_scale: float = parameter(1.0, above=0, help="multiplies the arrival rate")
    itl_slo_ms: float | None = parameter(
        None, above=0, help="target between tokens in ms; policies that steer by it take it too"
    )
    ttft_slo_ms: float | None = parameter(
        None, above=0, help="target for the first token in ms, queueing included"
    )
    max_num_seqs: int | None = parameter(
        None, minimum=1, help="start-up limit of running sequences (default: live 128, virtual 256)"
    )
    max_num_batched_tokens: int = parameter(
        2048, minimum=1, help="start-up limit of tokens per step"
    )
    kv_blocks: int | None = parameter(
        None,
        minimum=0,
        help="KV blocks; default: live 300, few on purpose so that memory is scarce, and 0 fills "
        "the engine's memory; virtual the profile's",
    )
    block_size: int | None = parameter(
        None, minimum=1, help="live only: tokens per KV block (default: 32)"
    )
    noise: float | None = parameter(
        None,
        minimum=0,
        maximum=1,
        help="virtual only: relative deviation of a step's time (default: the profile's)",
    )
    find_capacity: bool = parameter(
        False,
        help="search each policy's highest arrival rate at which the targets are kept; "
        "poisson:1, or the trace's own rate, is scaled",
    )
    attainment: float = parameter(
        0.99, above=0, maximum=1, help="share of requests inside the targets that keeps them"
    )
    rounds: int = parameter(3, minimum=1, help="times each policy runs, interleaved")
    seed: int = parameter(0, minimum=0, help="of round 1; each round adds one")
    json: str = parameter("results.json", help="where the numbers go")
    html: str = parameter("report.html", help="where the report goes")
    plot: str | None = parameter(
        None, help="also draw limit, running and KV usage over time to this .svg or .png"
    )

    workers: int | None = parameter(
        None, minimum=1, help="virtual only: processes that share the runs; every core by default"
    )
    work_dir: str | None = parameter(
        None,
        help="virtual only: folder that keeps finished runs, and that they are taken from unless "
        "--fresh is given, so that a bench can be taken up again (default: bench in "
        f"${CACHE_VARIABLE}, or in ~/.cache/batchpilot where that is not set)",
    )
    fresh: bool | None = parameter(
        None, help="virtual only: run everything again, also what --work-dir has"
    )

    def __post_init__(self) -> None:
        """Checks each value, fills in the engine's defaults, then what must hold between them."""
        super().__post_init__()
        self._check_engine()
        for name, value in _USUAL[self.engine].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        assert self.max_num_seqs is not None
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: each running sequence takes a token of a step"
            )
        if self.plot is not None and self.plot_kind not in ("svg", "png"):
            raise ConfigError(f"plot={self.plot!r} must end in .svg or .png")
        self._check_files_differ()

    def _check_engine(self) -> None:
        """Raises for what the engine does not have, and for a search that lacks its target."""
        other = "live" if self.engine == "virtual" else "virtual"
        for name in _ONLY[other]:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is a setting of engine {other!r}; "
                    f"this is {self.engine!r}"
                )
        if self.find_capacity and not self.slo.is_set:
            raise ConfigError("find_capacity needs a target: set itl_slo_ms, ttft_slo_ms or both")
        if self.find_capacity and self.arrivals == "saturated":
            raise ConfigError("find_capacity scales a rate, and arrivals='saturated' has none")

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
        for name in ("json", "html"):
            if getattr(self, name) == "-":
                raise ConfigError(
                    f"{name}='-' would be a file of that name: a bench prints its tables, and "
                    "writes everything else to files"
                )
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
            if value is True:
                words.append(option(item.name))
            elif item.name in _ALWAYS_NAMED or self._is_chosen(item.name, item.default):
                words += [option(item.name), str(value)]
        return shlex.join(words)

    def _is_chosen(self, name: str, default: object) -> bool:
        """Whether a setting must be written out; what is served always is."""
        value = getattr(self, name)
        if name == "model":
            return value is not None
        return bool(value != _USUAL[self.engine].get(name, default))

    def to_json(self) -> dict[str, Any]:
        """The settings that are about the bench itself and not about its files."""
        other = _ONLY["live" if self.engine == "virtual" else "virtual"]
        elsewhere = {*_NOT_SHOWN, *other}
        if not self.find_capacity:
            elsewhere |= {"find_capacity", "attainment"}
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in elsewhere}
        return {**shown, "policies": [part.strip() for part in self.policies.split(",")]}


def option(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")
