"""What the runs say: may this policy take the place of the one in force?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchpilot.env.gate.evaluate import GateRun
from batchpilot.env.gate.settings import Rules
from batchpilot.env.gate.statistics import (
    FEWEST_CELLS,
    Floats,
    Gain,
    bootstrap_gain,
    relative_gains,
)


@dataclass(frozen=True)
class CellResult:
    """One cell's row.

    Attributes:
        cell: Its name.
        goodput: Mean over seeds, requests a second, by policy.
        violations: Mean share of late requests, by policy.
        gain: Mean over seeds of the candidate's gain over the policy in force.
    """

    cell: str
    goodput: dict[str, float]
    violations: dict[str, float]
    gain: float


@dataclass(frozen=True)
class Check:
    """One rule, and whether it is kept.

    Attributes:
        rule: What is asked for.
        found: What was found.
        passed: Whether that is enough.
    """

    rule: str
    found: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """The gate's answer.

    Attributes:
        candidate: The policy's text.
        reference: The text of the policy in force.
        cells: A row each.
        gain: Of goodput over the reference.
        gains: Of goodput over every other policy.
        checks: The rules, one by one.
        best_static: The fixed limits with the most goodput over all cells; None where none was
            tried.
    """

    candidate: str
    reference: str
    cells: tuple[CellResult, ...]
    gain: Gain
    gains: dict[str, Gain]
    checks: tuple[Check, ...]
    best_static: str | None

    @property
    def passed(self) -> bool:
        """Whether every rule is kept."""
        return all(check.passed for check in self.checks)

    @property
    def summary(self) -> str:
        """One line, for the registry's history."""
        gain = f"goodput {_percent(self.gain.mean)} over {self.reference}, {_interval(self.gain)}"
        failed = [f"{check.rule}: {check.found}" for check in self.checks if not check.passed]
        return "; ".join([gain, *failed])


def judge(
    runs: Sequence[GateRun],
    *,
    candidate: str,
    reference: str,
    analytic: Sequence[str],
    static: Sequence[str],
    rules: Rules,
) -> Verdict:
    """Compares the candidate with the policy in force, seed by seed, and applies the rules.

    Args:
        runs: Every policy on every cell under the same seeds.
        candidate: The policy that asks to be promoted.
        reference: The one in force.
        analytic: Policies it must be no worse than on average.
        static: Fixed limits, the best of which is shown.
        rules: What it must show.
    """
    goodput = {text: _matrix(runs, text, "goodput_per_s") for text in _policies(runs)}
    late = {text: _matrix(runs, text, "violations") for text in _policies(runs)}
    gains = {
        text: bootstrap_gain(
            relative_gains(goodput[candidate], goodput[text]),
            confidence=rules.confidence,
            resamples=rules.resamples,
        )
        for text in goodput
        if text != candidate
    }
    cells = _cell_results(runs, goodput, late, candidate, reference)
    shield_share = float(_matrix(runs, candidate, "shield_share").mean())
    growth = float(late[candidate].mean() - late[reference].mean())
    checks = (
        _better(gains[reference], len(cells), rules),
        _no_more_violations(growth, rules),
        _no_cell_loses(cells, rules),
        _shield_rests(shield_share, rules),
        *(_no_worse_than(text, gains[text]) for text in analytic if text != reference),
    )
    best = max(static, key=lambda text: float(goodput[text].mean())) if static else None
    return Verdict(candidate, reference, cells, gains[reference], gains, checks, best)


def _policies(runs: Sequence[GateRun]) -> list[str]:
    return list(dict.fromkeys(run.policy for run in runs))


def _matrix(runs: Sequence[GateRun], policy: str, name: str) -> Floats:
    """One figure of one policy: a row a cell, a column a seed."""
    cells = list(dict.fromkeys(run.cell for run in runs))
    seeds = sorted({run.seed for run in runs})
    found = {(run.cell, run.seed): getattr(run, name) for run in runs if run.policy == policy}
    return np.array([[found[cell, seed] for seed in seeds] for cell in cells], dtype=np.float64)


def _cell_results(
    runs: Sequence[GateRun],
    goodput: dict[str, Floats],
    late: dict[str, Floats],
    candidate: str,
    reference: str,
) -> tuple[CellResult, ...]:
    gains = relative_gains(goodput[candidate], goodput[reference]).mean(axis=1)
    return tuple(
        CellResult(
            cell,
            {text: float(matrix[at].mean()) for text, matrix in goodput.items()},
            {text: float(matrix[at].mean()) for text, matrix in late.items()},
            float(gains[at]),
        )
        for at, cell in enumerate(dict.fromkeys(run.cell for run in runs))
    )


def _better(gain: Gain, cells: int, rules: Rules) -> Check:
    rule = f"more goodput than the policy in force, with {rules.confidence:.0%} confidence"
    found = f"{_percent(gain.mean)}, {_interval(gain)}"
    if cells < FEWEST_CELLS:
        found += f", but {cells} of the {FEWEST_CELLS} cells it takes to tell of others"
    return Check(rule, found, gain.low > 0 and cells >= FEWEST_CELLS)


def _no_more_violations(growth: float, rules: Rules) -> Check:
    allowed = rules.most_violation_increase
    rule = f"late requests grow by at most {100 * allowed:.1f} points"
    # A billionth: means of the same numbers in another order.
    return Check(rule, f"{100 * growth:+.2f} points", growth <= allowed + 1e-9)


def _no_cell_loses(cells: Sequence[CellResult], rules: Rules) -> Check:
    worst = min(cells, key=lambda cell: cell.gain)
    rule = f"no cell loses more than {rules.most_cell_loss:.0%} of its goodput"
    found = f"{worst.cell} {_percent(worst.gain)}"
    return Check(rule, found, worst.gain >= -rules.most_cell_loss)


def _shield_rests(share: float, rules: Rules) -> Check:
    rule = f"the shield changes at most {rules.most_shield_share:.0%} of its decisions"
    return Check(rule, f"{share:.1%}", share <= rules.most_shield_share)


def _no_worse_than(policy: str, gain: Gain) -> Check:
    rule = f"on average no less goodput than {policy}"
    return Check(rule, f"{_percent(gain.mean)}, {_interval(gain)}", gain.mean >= 0)


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _interval(gain: Gain) -> str:
    return f"from {_percent(gain.low)} to {_percent(gain.high)}"
