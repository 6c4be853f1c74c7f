"""Policies: what each takes; trained ones listed, verified, promoted and rolled back.

Trained ones live in a registry, a folder of versions that never change ($BATCHPILOT_POLICIES, or
~/.local/share/batchpilot/policies). `promote` runs the new version beside the one in force and the
analytic policies, on engines, traffic and seeds that nothing was trained on; it takes over only if
the table says that it is better. Exit status: 0 done, 1 refused by the gate or found damaged by
`verify`, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from batchpilot.agents.artefact import Artefact, load_artefact
from batchpilot.agents.learned_model import OnnxModel
from batchpilot.agents.manifest import ArtefactError
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.registry import DEFAULT_GROUP, PolicyRegistry
from batchpilot.env.bench.results import check_writable, write_whole
from batchpilot.env.gate.evaluate import GateRun, gate_tasks, run_gate
from batchpilot.env.gate.explain import explain, explain_all
from batchpilot.env.gate.settings import GateSettings, load_gate_settings
from batchpilot.env.gate.table import (
    print_list,
    print_policy,
    print_verdict,
    verdict_to_json,
)
from batchpilot.env.gate.verdict import Verdict, judge

EXIT_REFUSED = 1
PLAIN_WIDTH = 100

EXAMPLES = """\
examples:
  batchpilot policies explain                      # every policy, with its parameters
  batchpilot policies explain memory-peak          # its formula, regimes and limitations
  batchpilot policies add runs/ppo-1/policy        # under the name and version of its manifest
  batchpilot policies list
  batchpilot policies show chat@2
  batchpilot policies verify                       # every version: hash, shapes, fixed inputs
  batchpilot policies promote chat@2 --group a100
  batchpilot policies rollback chat --group a100

use one: policy "learned:chat" (in force), "learned:chat@2" or "learned:FOLDER", in bench, hook,
service and environment alike"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand each."""
    parser.epilog = EXAMPLES
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (text, _) in ACTIONS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--folder", type=Path, help="the registry, if not the usual one")
        _ARGUMENTS.get(name, _no_arguments)(command)


def run(args: argparse.Namespace) -> int:
    """Runs one subcommand; returns its exit status.

    Raises:
        ConfigError: Something that is not there, or cannot be used.
    """
    _, action = ACTIONS[args.action]
    return action(PolicyRegistry(args.folder), args, _console())


def list_policies(registry: PolicyRegistry, args: argparse.Namespace, console: Console) -> int:
    """A row for each version."""
    del args
    print_list(registry, console)
    return 0


def explain_policies(registry: PolicyRegistry, args: argparse.Namespace, console: Console) -> int:
    """What a policy decides by, and its parameters."""
    del registry
    text = explain_all() if args.policy is None else explain(args.policy)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def add_policy(registry: PolicyRegistry, args: argparse.Namespace, console: Console) -> int:
    """Verifies a folder and copies it in."""
    artefact = load_artefact(args.path)
    OnnxModel(artefact)
    added = registry.add(args.path)
    where = "" if args.folder is None else f" --folder {args.folder}"
    console.print(
        f"added {added.label}; promote it: batchpilot policies promote {added.label}{where}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def show_policy(registry: PolicyRegistry, args: argparse.Namespace, console: Console) -> int:
    """Everything that a manifest says, and where the version is in force."""
    print_policy(registry, registry.resolve(args.policy, args.group), console)
    return 0


def verify_policies(registry: PolicyRegistry, args: argparse.Namespace, console: Console) -> int:
    """Reads, hashes, examines and tries policies; all of them where none is named."""
    texts = [args.policy] if args.policy else _all_versions(registry)
    damaged = 0
    for text in texts:
        try:
            artefact = registry.resolve(text, args.group)
            OnnxModel(artefact)
        except ArtefactError as error:
            damaged += 1
            console.print(f"REFUSED {text}: {error}", markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(f"sound   {text}", markup=False, highlight=False)
    if not texts:
        console.print(f"no policies in {registry.folder}", markup=False, highlight=False)
    return EXIT_REFUSED if damaged else 0


def promote_policy(registry: PolicyRegistry, args: argparse.Namespace, console: Console) -> int:
    """Runs the gate, and promotes what passes it."""
    settings = load_gate_settings(args.config)
    if args.json is not None:
        check_writable(args.json)
    artefact = _candidate(registry, args.policy)
    verdict = _try(registry, artefact, settings, args)
    if args.json is not None:
        write_whole(args.json, json.dumps(verdict_to_json(verdict), indent=1) + "\n")
    name, version = artefact.manifest.name, artefact.manifest.version
    if verdict.passed:
        registry.promote(name, version, args.group, note=verdict.summary)
    # Last, since who reads the table may have gone.
    print_verdict(verdict, console)
    if not verdict.passed:
        console.print(f"refused: {artefact.label} is not promoted", highlight=False)
        return EXIT_REFUSED
    console.print(f"promoted: {artefact.label} is in force for {args.group!r}", highlight=False)
    return 0


def roll_back_policy(registry: PolicyRegistry, args: argparse.Namespace, console: Console) -> int:
    """Puts the version before back in force."""
    pointer = registry.rollback(args.name, args.group, note=args.note)
    console.print(
        f"rolled back: {args.name}@{pointer.version} is in force for {args.group!r}",
        highlight=False,
    )
    return 0


Action = Callable[[PolicyRegistry, argparse.Namespace, Console], int]
ACTIONS: dict[str, tuple[str, Action]] = {
    "explain": ("what a policy decides by, and the parameters it takes", explain_policies),
    "list": ("every version, and where it is in force", list_policies),
    "add": ("verify a policy's folder and copy it into the registry", add_policy),
    "show": ("everything about one version, with the history of its groups", show_policy),
    "verify": ("check hashes, shapes and outputs of one version, or of all", verify_policies),
    "promote": (
        "try a version against the one in force, for minutes; it takes over if better",
        promote_policy,
    ),
    "rollback": ("put the version before back in force", roll_back_policy),
}


def _try(
    registry: PolicyRegistry, artefact: Artefact, settings: GateSettings, args: argparse.Namespace
) -> Verdict:
    candidate = f"learned:{artefact.path}"
    reference = _in_force(registry, artefact, settings, args.group)
    static = [f"static:max_num_seqs={seqs}" for seqs in settings.static_max_num_seqs]
    policies = list(dict.fromkeys((candidate, reference, *settings.analytic, *static)))
    tasks = gate_tasks(settings, policies)
    progress = _Progress(Console(stderr=True), len(tasks))
    runs = run_gate(tasks, progress.finished, workers=args.workers, work_dir=args.work_dir)
    return judge(
        runs,
        candidate=candidate,
        reference=reference,
        analytic=settings.analytic,
        static=static,
        rules=settings.rules,
    )


def _candidate(registry: PolicyRegistry, text: str) -> Artefact:
    """The version that asks to be promoted, tried on fixed inputs before anything runs."""
    if "/" in text or text.startswith((".", "~")):
        raise ConfigError(f"{text!r} is a folder: first batchpilot policies add {text}")
    name, at, version = text.partition("@")
    if not at:
        there = ", ".join(registry.versions(name)) or "none"
        raise ConfigError(f"which version of {name!r}? name it: {name}@VERSION; there: {there}")
    artefact = registry.load(name, version)
    OnnxModel(artefact)
    return artefact


def _in_force(
    registry: PolicyRegistry, artefact: Artefact, settings: GateSettings, group: str
) -> str:
    """The text of the policy that a candidate must beat."""
    name, version = artefact.manifest.name, registry.pointer(artefact.manifest.name, group).version
    if version is None:
        return settings.default_policy
    if version == artefact.manifest.version:
        raise ConfigError(f"{artefact.label} is in force already for group {group!r}")
    return f"learned:{registry.load(name, version).path}"


def _all_versions(registry: PolicyRegistry) -> list[str]:
    return [f"{name}@{version}" for name in registry.names() for version in registry.versions(name)]


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", metavar="NAME[@VERSION]|FOLDER", help="NAME: the one in force")
    _group_argument(parser)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", nargs="?", metavar="NAME[@VERSION]|FOLDER", help="all if not")
    _group_argument(parser)


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FOLDER", help="policy.onnx and manifest.json")


def _promote_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", metavar="NAME@VERSION", help="a version in the registry")
    _group_argument(parser)
    parser.add_argument("--config", type=Path, metavar="YAML", help="cells and rules of your own")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; every core by default")
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="FOLDER",
        help="keep finished runs here, so that an interrupted trial goes on",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the verdict here")


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    _group_argument(parser)
    parser.add_argument("--note", default="", help="why; kept in the history")


def _group_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group",
        default=DEFAULT_GROUP,
        help="engines that share what is in force (default: %(default)s)",
    )


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", nargs="?", metavar="NAME", help="at length; all in brief if not")


_ARGUMENTS = {
    "explain": _explain_arguments,
    "add": _add_path,
    "show": _policy_arguments,
    "verify": _verify_arguments,
    "promote": _promote_arguments,
    "rollback": _rollback_arguments,
}


class _Progress:
    """A line a run."""

    def __init__(self, console: Console, total: int) -> None:
        """Counts runs."""
        self._console = console
        self._total = total
        self._done = 0

    def finished(self, run: GateRun) -> None:
        """Says how far it is."""
        self._done += 1
        self._console.print(
            f"[{self._done}/{self._total}] {run.cell} seed {run.seed} {run.policy}: "
            f"{run.goodput_per_s:.3g} good requests/s, {run.violations:.1%} late",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
