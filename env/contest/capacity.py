"""Capacity under targets, and latency at one load that is common to all.

Capacity of a contestant on a seed is the highest rung of the scenario's ladder at which the share
of requests inside the targets is at least the attainment asked for; of a contestant, the median
over seeds. The common load is the median rung of the best static pair, so that at least one setting
that an operator could have chosen holds the targets there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from batchpilot.env.contest.crew import Crew
from batchpilot.env.contest.ladder import LOWEST, highest_kept, rate_scale
from batchpilot.env.contest.lineup import DEFAULT, OURS, contestant, is_static, slo_lineup
from batchpilot.env.contest.results import Result, Row, run_all
from batchpilot.env.contest.scenario import Scenario
from batchpilot.env.contest.settings import ContestSettings
from batchpilot.env.contest.summary import Spread, spread
from batchpilot.env.contest.trial import OutcomeStore, Trial, run_stored

#: Where the search for vLLM's default begins; the others begin at what is known by then.
_DEFAULT_START = -4
#: Where a search begins whose default kept nothing.
_LOST_START = -24


@dataclass(frozen=True)
class CapacityRow(Row):
    """A contestant in a scenario; its outcomes are those at the common load.

    Attributes:
        rates_per_s: Capacity on each seed, 0 where it kept no rate.
    """

    rates_per_s: tuple[float, ...]

    @property
    def capacity(self) -> Spread:
        """Median, least and greatest over the seeds."""
        return spread(self.rates_per_s)


@dataclass(frozen=True)
class CapacityResult(Result[CapacityRow]):
    """A scenario's contestants.

    Attributes:
        common_rate_per_s: The common load.
    """

    common_rate_per_s: float

    @property
    def best_static(self) -> CapacityRow:
        """The static pair with the highest median; of several, the one that held more latency."""
        return max(self.static_rows, key=lambda row: (row.capacity.median, sum(row.rates_per_s)))

    def holding(self) -> CapacityRow | None:
        """The static pair with the least ITL p99 at the common load; None where none has one."""
        measured = [row for row in self.static_rows if row.itl_p99_ms]
        return min(measured, key=lambda row: row.itl_p99_ms or 0.0, default=None)


def find_rung(trial: Trial, start: int, folder: Path) -> int | None:
    """A contestant's highest rung on a seed; runs in a process of the crew.

    Args:
        trial: At a rate scale of 1.
        start: Where the rung is expected.
        folder: Of the outcomes.
    """
    store = OutcomeStore(folder)
    asked = trial.gives_up_below
    assert asked is not None

    def keeps(rung: int) -> bool:
        outcome = run_stored(replace(trial, rate_scale=rate_scale(rung)), store)
        return not outcome.given_up and outcome.attainment >= asked

    return highest_kept(keeps, start)


def compare_capacity(
    settings: ContestSettings, crew: Crew, folder: Path, *, only_target: bool = False
) -> list[CapacityResult]:
    """Searches every scenario, then runs everybody at the common load.

    Args:
        settings: Of the contest.
        crew: Does the work.
        folder: Of the outcomes.
        only_target: Leaves out whoever is neither static nor ours.
    """
    scenarios = settings.slo_scenarios()
    lineups = [_lineup(settings, scenario, only_target) for scenario in scenarios]
    seeds = settings.all_seeds
    searches = [
        (place, label, seed)
        for place, lineup in enumerate(lineups)
        for label in lineup
        for seed in seeds
    ]

    def search(chosen: list[tuple[int, str, int]], starts: list[int], what: str) -> list[int]:
        tasks = [
            (_trial(scenarios[place], label, seed, settings.attainment), start, folder)
            for (place, label, seed), start in zip(chosen, starts, strict=True)
        ]
        return [LOWEST - 1 if r is None else r for r in crew.map(what, find_rung, tasks)]

    # A search is short where it begins near its end, and those that cap prefill end far from those
    # that do not: the default goes first, then one that does, and the others begin at either's.
    rungs: dict[tuple[int, str, int], int] = {}
    pilots = [next((label for label in lineup if _caps_prefill(label)), None) for lineup in lineups]

    def search_from(chosen: list[tuple[int, str, int]], pilot: bool, what: str) -> None:
        starts = [_DEFAULT_START] * len(chosen)
        if rungs:
            near = [(pilots[place] if pilot else None) or DEFAULT for place, *_ in chosen]
            found = [
                rungs[place, label, seed]
                for (place, _, seed), label in zip(chosen, near, strict=True)
            ]
            starts = [_LOST_START if rung < LOWEST else rung for rung in found]
        rungs.update(zip(chosen, search(chosen, starts, what), strict=True))

    search_from([item for item in searches if item[1] == DEFAULT], False, "default")
    first = [item for item in searches if item[1] == pilots[item[0]]]
    search_from(first, False, "one that caps prefill")
    others = [item for item in searches if item not in rungs]
    search_from([item for item in others if _caps_prefill(item[1])], True, "prefill capped")
    search_from([item for item in others if not _caps_prefill(item[1])], False, "all others")

    results = []
    for place, (scenario, lineup) in enumerate(zip(scenarios, lineups, strict=True)):
        by_label = {label: [rungs[place, label, seed] for seed in seeds] for label in lineup}
        results.append(_at_common_load(scenario, by_label, seeds, crew, folder))
    return results


def _caps_prefill(label: str) -> bool:
    """Whether a contestant keeps prompts from filling a step, as far as one can say beforehand."""
    return label == OURS or (is_static(label) and label != DEFAULT)


def _lineup(settings: ContestSettings, scenario: Scenario, only_target: bool) -> tuple[str, ...]:
    lineup = settings.lineup(scenario, slo_lineup(scenario))
    if only_target:
        return tuple(label for label in lineup if is_static(label) or label == OURS)
    return lineup


def _trial(scenario: Scenario, label: str, seed: int, gives_up_below: float | None) -> Trial:
    return Trial(scenario, contestant(label), seed=seed, gives_up_below=gives_up_below)


def _at_common_load(
    scenario: Scenario,
    rungs: dict[str, list[int]],
    seeds: Sequence[int],
    crew: Crew,
    folder: Path,
) -> CapacityResult:
    best = max(median(found) for label, found in rungs.items() if is_static(label))
    common = max(round(best), LOWEST)
    trials = {
        label: [
            replace(_trial(scenario, label, seed, None), rate_scale=rate_scale(common))
            for seed in seeds
        ]
        for label in rungs
    }
    outcomes = run_all(f"common load, {scenario.label}", trials, crew, folder)
    rows = [
        CapacityRow(label, outcomes[label], tuple(_rate(scenario, rung) for rung in found))
        for label, found in rungs.items()
    ]
    return CapacityResult(scenario, tuple(rows), _rate(scenario, common))


def _rate(scenario: Scenario, rung: int) -> float:
    return scenario.rate_per_s * rate_scale(rung) if rung >= LOWEST else 0.0
