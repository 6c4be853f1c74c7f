"""The `batchpilot` command: finds the subcommand and hands it the rest of the command line.

A subcommand lives with what it drives (`bench` in batchpilot.env) and is imported only when it is
named, so that `batchpilot --help` needs nothing but the base install.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from batchpilot import __version__
from batchpilot.agents.parameters import ConfigError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_BAD_INPUT = 2


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives: a module with `add_arguments(parser)` and `run(args) -> int`."""

    module: str
    extra: str
    summary: str


COMMANDS = {
    "bench": Command(
        "batchpilot.env.bench.cli",
        "env",
        "run one workload under several policies and compare them",
    ),
    "policies": Command(
        "batchpilot.env.gate.cli",
        "env",
        "explain every policy; list, verify, promote and roll back trained ones",
    ),
    "calibrate": Command(
        "batchpilot.env.calibrate.cli",
        "env",
        "measure an engine's step times and write a GPU profile",
    ),
    "serve": Command(
        "batchpilot.service.cli",
        "service",
        "serve limits to a fleet of engines over gRPC",
    ),
    "top": Command(
        "batchpilot.service.top",
        "service",
        "watch the engines of a tuning service live",
    ),
    "groups": Command(
        "batchpilot.service.groups_command",
        "service",
        "show and change what decides for the groups of a running service",
    ),
    "train": Command(
        "batchpilot.agents.training.cli",
        "train",
        "train an agent that steers both limits, and export it",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status (2 for bad input, 130 for Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        overview().parse_args(arguments)
        overview().print_help()
        return EXIT_BAD_INPUT
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("batchpilot"):
            raise
        print(
            f"batchpilot {name}: {error.name} is not installed; "
            f"try: pip install 'batchpilot[{command.extra}]'",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    parser = argparse.ArgumentParser(
        prog=f"batchpilot {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no name ends a command that prints it
            stream.reconfigure(errors="backslashreplace")
    try:
        status = int(module.run(parser.parse_args(arguments[1:])))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except ConfigError as error:
        print(f"batchpilot {name}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"batchpilot {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def overview() -> argparse.ArgumentParser:
    """The parser that lists the subcommands."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="batchpilot",
        description="Steers the batch limits of LLM servers while they run.",
        epilog=f"commands:\n{listing}\n\n`batchpilot COMMAND --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"batchpilot {__version__}")
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND", help="see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
