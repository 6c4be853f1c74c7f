"""The settings of the contest: every option of its command line, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.bench.contestants import Contestant
from batchpilot.env.contest.lineup import DEFAULT, SMALL_KV_TOKENS, static_grid
from batchpilot.env.contest.scenario import (
    HORIZON_SECONDS,
    LENGTHS,
    TURNOVERS,
    Scenario,
    Shift,
    saturated_scenario,
    shifts,
    slo_scenario,
)
from batchpilot.env.profiles import load_profile

SECTIONS = ("capacity", "target", "overload", "saturation", "shifts")
PROFILES = (
    "llama-3.1-8b-rtx4090",
    "llama-3.1-8b-h100",
    "qwen3-8b-h200",
    "llama-3.1-70b-h100-tp4",
)
#: Lengths, factor on the unloaded step, milliseconds to the first token. On a small device, such as
#: an RTX 4090, both go with the longer targets: three long prompts at once take it more than a
#: second, and bursts come at any rate. `--full` takes every combination.
PAIRED = (("ShareGPT", 3.0, 2000.0), ("Azure", 2.0, 1000.0))
PAIRED_SMALL = (("ShareGPT", 3.0, 2000.0), ("Azure", 3.0, 2000.0))
_ITL_FACTORS, _TTFT_SLO_MS = (2.0, 3.0), (2000.0, 1000.0)
#: Profiles of the shifts.
SHIFT_PROFILES = ("llama-3.1-8b-h100", "llama-3.1-70b-h100-tp4")
PHASE_SECONDS = 20.0
#: Arrivals at the estimated capacity go on for so long: bursts come and go.
OVERLOAD_SECONDS = 60.0
#: KV blocks that make memory scarce on a large device, and whose lengths are served then.
CUT_BLOCKS, CUT_LENGTHS = 4000, "Azure"

#: Stands for the scenario's static pairs in a list of contestants.
GRID = "grid"

_QUICK_PROFILES = ("llama-3.1-8b-h100", "llama-3.1-70b-h100-tp4")
_QUICK_POLICIES = (
    "static,static:max_num_seqs=128:max_num_batched_tokens=512,watermark:0.05,memory+sla,predictive"
)
_QUICK_SHARE = 0.25


@dataclass(frozen=True)
class ContestSettings(Parameters):
    """One field per option.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    section: str = parameter("all", choices=("all", *SECTIONS), help="which tables to make")
    seeds: int | None = parameter(None, minimum=1, help="seeds of each; 5, or 2 with --quick")
    attainment: float = parameter(
        0.99, above=0, below=1, help="share of requests inside the targets that keeps a rate"
    )
    quick: bool = parameter(
        False, help="two profiles, two seeds, few contestants, a quarter of the requests"
    )
    length: float = parameter(
        1.0, above=0, help="multiplies the requests of each run: of 200 two may miss, of 800 eight"
    )
    full: bool = parameter(False, help="every combination of lengths and targets, not two of eight")
    policies: str | None = parameter(
        None,
        help="comma-separated contestants beside static, in place of all; grid: the static pairs",
    )
    profiles: str | None = parameter(None, help="comma-separated profiles, in place of four")
    workers: int | None = parameter(None, minimum=1, help="processes; every core by default")
    work_dir: str | None = parameter(
        None, help="folder of finished runs, so that a contest can be taken up again"
    )
    json: str = parameter("results/predictive.json", help="where the numbers go")
    html: str = parameter("results/predictive.html", help="where the report goes")
    markdown: str | None = parameter(None, help="where the tables go as Markdown; nowhere if unset")

    def __post_init__(self) -> None:
        """Checks each value, the profiles' and the contestants' names included."""
        super().__post_init__()
        for name in self.profile_names:
            load_profile(name)
        if len(set(self.output_files)) < len(self.output_files):
            raise ConfigError(
                f"json={self.json!r}, html={self.html!r} and markdown={self.markdown!r} must be "
                "different files"
            )
        for label in self._asked_for or ():
            if label != GRID:
                Contestant.parse(label).build({"itl_slo_ms": 1.0, "ttft_slo_ms": 1.0})

    def lineup(self, scenario: Scenario, everybody: tuple[str, ...]) -> tuple[str, ...]:
        """Who takes part in a scenario, vLLM's default first.

        Args:
            scenario: Its static pairs stand in for `grid`.
            everybody: Who does where nobody was asked for.
        """
        asked = self._asked_for
        if asked is None:
            return everybody
        grid = static_grid(scenario)
        expanded = (label for part in asked for label in (grid if part == GRID else (part,)))
        return tuple(dict.fromkeys(expanded))

    @property
    def _asked_for(self) -> tuple[str, ...] | None:
        text = self.policies or (_QUICK_POLICIES if self.quick else None)
        if text is None:
            return None
        return tuple(dict.fromkeys((DEFAULT, *(part.strip() for part in text.split(",")))))

    @property
    def profile_names(self) -> tuple[str, ...]:
        """The profiles that take part."""
        if self.profiles is not None:
            return tuple(name.strip() for name in self.profiles.split(","))
        return _QUICK_PROFILES if self.quick else PROFILES

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.seeds or (2 if self.quick else 5))

    @property
    def sections(self) -> tuple[str, ...]:
        """What is made."""
        return SECTIONS if self.section == "all" else (self.section,)

    @property
    def output_files(self) -> tuple[Path, ...]:
        """The files it writes."""
        names = (self.json, self.html, self.markdown)
        return tuple(Path(name) for name in names if name is not None)

    @property
    def _share(self) -> float:
        return self.length * (_QUICK_SHARE if self.quick else 1.0)

    def slo_scenarios(self) -> list[Scenario]:
        """Where capacity is compared."""
        every = list(product(LENGTHS, _ITL_FACTORS, _TTFT_SLO_MS))
        return [
            slo_scenario(
                profile,
                lengths,
                itl_factor=factor,
                ttft_slo_ms=ttft,
                horizon_s=HORIZON_SECONDS * self._share,
            )
            for profile in self.profile_names
            for lengths, factor, ttft in (every if self.full else _paired(profile))
        ]

    def overloaded_scenarios(self) -> list[Scenario]:
        """Where as much comes as smooth traffic would just allow."""
        seconds = OVERLOAD_SECONDS * self._share
        return [
            replace(scenario, num_requests=max(1, round(scenario.rate_per_s * seconds)))
            for scenario in self.slo_scenarios()
        ]

    def saturated_scenarios(self) -> list[Scenario]:
        """Where throughput is compared: the whole KV cache, and a small part of a large one."""
        turnovers = TURNOVERS * self._share
        found = []
        for name in self.profile_names:
            found.append(saturated_scenario(name, "ShareGPT", turnovers=turnovers))
            if load_profile(name).num_blocks > CUT_BLOCKS:
                found.append(saturated_scenario(name, CUT_LENGTHS, CUT_BLOCKS, turnovers))
        return found

    def shift_scenarios(self) -> list[Shift]:
        """Where something changes half-way."""
        asked = set(self.profile_names)
        names = [name for name in SHIFT_PROFILES if name in asked] or self.profile_names
        return [found for name in names for found in shifts(name, PHASE_SECONDS * self._share)]


def _paired(profile: str) -> tuple[tuple[str, float, float], ...]:
    """Lengths and targets that go together on a device."""
    small = load_profile(profile).kv_capacity_tokens <= SMALL_KV_TOKENS
    return PAIRED_SMALL if small else PAIRED
