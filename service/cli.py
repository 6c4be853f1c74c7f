"""Serve limits to a fleet of engines over gRPC.

Engines open a stream, report a few times a second and get limits back, each with a lease. An
engine that loses the service goes on with its own local policy, so the service may be restarted,
upgraded or lost at any time. SIGTERM and SIGINT stop it gracefully, SIGHUP reads the file again.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchpilot.agents.catalog import PolicySpec, policy_kind
from batchpilot.agents.parameters import ConfigError
from batchpilot.service.logs import set_up_logs
from batchpilot.service.server import Service
from batchpilot.service.settings import ServiceSettings, read_settings
from batchpilot.service.settings_text import settings_text

EXAMPLES = """\
examples:
  batchpilot serve
  batchpilot serve --policy memory-peak --metrics 127.0.0.1:9464
  batchpilot serve --print-settings > service.yaml    # every key, its default and what it does
  batchpilot serve --config service.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; each of them wins over the same key of the file."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings, in YAML")
    parser.add_argument("--bind", metavar="HOST:PORT", help="(server.bind)")
    parser.add_argument("--policy", metavar="TEXT", help="(default.policy)")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="(metrics.bind)")
    parser.add_argument(
        "--insecure-bind", action="store_true", default=None, help="(server.insecure_bind)"
    )
    parser.add_argument(
        "--reflection", action="store_true", default=None, help="(server.reflection)"
    )
    parser.add_argument("--json-logs", action="store_true", default=None, help="(server.json_logs)")
    parser.add_argument(
        "--print-settings",
        action="store_true",
        help="print a file of all defaults and end",
    )
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop.

    Raises:
        ConfigError: A setting that cannot be used; nothing has been opened.
    """
    if args.print_settings:
        if any(value for name, value in vars(args).items() if name != "print_settings"):
            raise ConfigError("--print-settings goes alone: it prints the defaults")
        print(settings_text(), end="")
        return 0
    settings = with_options(read_settings(args.config), args)
    set_up_logs(as_json=settings.server.json_logs)
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(serve(settings, args))
    return 0


async def serve(settings: ServiceSettings, args: argparse.Namespace) -> None:
    """Runs a service until SIGTERM or SIGINT.

    Raises:
        ConfigError: As `Service`.
    """
    service = Service(settings, args.config, lambda: with_options(read_settings(args.config), args))
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, service.reloader.now)
    await service.start()
    # What exists now stays: no later collection walks through it while reports wait.
    gc.collect()
    gc.freeze()
    await stopping.wait()
    await service.stop()


def fast_loop() -> Any:
    """Uvloop's event loop where it is installed; asyncio's own otherwise."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def with_options(settings: ServiceSettings, args: argparse.Namespace) -> ServiceSettings:
    """The settings with those of the command line over them."""
    server = {
        name: value
        for name in ("bind", "insecure_bind", "reflection", "json_logs")
        if (value := getattr(args, name)) is not None
    }
    changed = replace(settings, server=replace(settings.server, **server))
    if args.policy is not None:
        _check_policy(args.policy)
        changed = replace(changed, default=replace(changed.default, policy=args.policy))
    if args.metrics is not None:
        changed = replace(changed, metrics=replace(changed.metrics, bind=args.metrics))
    return changed


def _check_policy(text: str) -> None:
    """Says of a policy that there is none of that it was the option's, not the file's.

    Raises:
        ConfigError: Malformed or unknown.
    """
    try:
        policy_kind(PolicySpec.parse(text).name)
    except ConfigError as error:
        raise ConfigError(f"--policy: {error}") from None
