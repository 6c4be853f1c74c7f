"""Shows trained policies and what the gate found, as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchpilot.agents.artefact import Artefact
from batchpilot.agents.manifest import ArtefactError
from batchpilot.agents.registry import PolicyRegistry
from batchpilot.env.gate.verdict import Verdict

_LEGEND = (
    "Requests a second inside their targets, means over the seeds. Gain: the candidate's over the "
    "policy in force, as a share of the larger of both. Late: share of the requests outside their "
    "targets. Below, the mean gain over each policy with its interval of confidence."
)


def print_list(registry: PolicyRegistry, console: Console) -> None:
    """Prints a row for each version; damaged ones are named too."""
    table = _table("policy", "in force for", "algorithm", "base", "actions", "created")
    for name in registry.names():
        for version in registry.versions(name):
            table.add_row(*_row(registry, name, version))
    if not table.rows:
        console.print(f"no policies in {registry.folder}", markup=False, highlight=False)
        return
    console.print(table)


def print_policy(registry: PolicyRegistry, artefact: Artefact, console: Console) -> None:
    """Prints a manifest, and the history of every group that runs the policy."""
    manifest = artefact.manifest
    lines = [f"{artefact.label}: {artefact.parameters:,} parameters, {artefact.path}"]
    lines.append(manifest.to_text().rstrip())
    for group in registry.groups(manifest.name):
        pointer = registry.pointer(manifest.name, group)
        lines.append(f"group {group}: {manifest.name}@{pointer.version} is in force")
        lines += [f"  {e.at} {e.what} {e.version} {e.note}".rstrip() for e in pointer.events]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Prints goodput cell by cell, and every rule."""
    others = [text for text in verdict.gains if text != verdict.reference]
    shown = [text for text in others if not _is_static_pair(text) or text == verdict.best_static]
    columns = [verdict.candidate, verdict.reference, *shown]
    headings = ["candidate", f"in force:\n{_short(verdict.reference)}"]
    headings += [("best fixed:\n" if text == verdict.best_static else "") + text for text in shown]
    table = _table("cell", *headings, "gain", "late", "late in\nforce")
    for cell in verdict.cells:
        table.add_row(
            Text(cell.cell),
            *[f"{cell.goodput[text]:.3f}" for text in columns],
            f"{100 * cell.gain:+.1f} %",
            f"{cell.violations[verdict.candidate]:.1%}",
            f"{cell.violations[verdict.reference]:.1%}",
        )
    console.print(table)
    console.print(_LEGEND, style="dim", highlight=False)
    for text in columns[1:]:
        gain = verdict.gains[text]
        console.print(
            f"  over {_short(text)}: {100 * gain.mean:+.1f} % "
            f"({100 * gain.low:+.1f} to {100 * gain.high:+.1f})",
            markup=False,
            highlight=False,
        )
    rules = _table("", "rule", "found")
    for check in verdict.checks:
        mark = Text("yes", style="green") if check.passed else Text("NO", style="bold red")
        rules.add_row(mark, Text(check.rule), Text(check.found))
    console.print(rules)


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as JSON values."""
    return {"passed": verdict.passed, "summary": verdict.summary, **asdict(verdict)}


def _row(registry: PolicyRegistry, name: str, version: str) -> list[Text | str]:
    groups = [g for g in registry.groups(name) if registry.pointer(name, g).version == version]
    label = Text(f"{name}@{version}")
    try:
        manifest = registry.load(name, version).manifest
    except ArtefactError as error:
        return [label, ", ".join(groups), Text(f"damaged: {error}", style="red"), "", "", ""]
    return [
        label,
        ", ".join(groups),
        manifest.algorithm,
        manifest.base_policy,
        manifest.action.design,
        manifest.created_at,
    ]


def _is_static_pair(text: str) -> bool:
    return text.startswith("static:")


def _short(text: str) -> str:
    """`learned:FOLDER/NAME/VERSION` as NAME@VERSION; other texts as they are."""
    if not text.startswith("learned:"):
        return text
    *_, name, version = text.split("/")
    return f"{name}@{version}"


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(Text(heading), overflow="fold")
    return table
