"""What decides for each group of a running service: look at it and change it, without a restart.

`promote` gives a group another policy for good, or tries it on a share of its engines first, where
the service compares it with the rest and takes it back or on by itself. `hold` is for an incident:
the whole group runs a policy for a while, then goes back by itself. Every change is checked by the
service before it is made, no stream is dropped, and engines follow with their next lease. Reading
needs the role viewer, changing admin. Exit status: 0 done, 1 refused or no service, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1.tuner_pb2_grpc import PolicyServiceStub, TunerServiceStub
from batchpilot.service.connection import (
    ANSWER_SECONDS,
    add_connection_arguments,
    connection,
    said,
)

EXIT_REFUSED = 1
EXAMPLES = """\
examples:
  batchpilot groups show
  batchpilot groups policies chat                     # what a group can be given
  batchpilot groups promote chat memory+sla:alpha=8 --canary-share 0.25
  batchpilot groups rollback chat                     # ends the trial, or goes back a policy
  batchpilot groups hold chat static:max_num_seqs=64 --seconds 600
  batchpilot groups release chat
  batchpilot groups show --target tuner.internal:50061 --ca-file ca.pem --token-file viewer.token"""

Call = Callable[..., Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand each."""
    parser.epilog = EXAMPLES
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (text, add, _) in _ACTIONS.items():
        command = commands.add_parser(name, help=text, description=text)
        add(command)
        command.add_argument("--json", action="store_true", help="print what it says as JSON")
        add_connection_arguments(command)


def run(args: argparse.Namespace) -> int:
    """Makes the calls that it takes and prints what came of them.

    Raises:
        ConfigError: A value or a file that cannot be used.
    """
    _check(args)
    try:
        with connection(args) as (channel, metadata):

            def call(method: Call, request: Any) -> Any:
                return method(request, metadata=metadata, timeout=ANSWER_SECONDS)

            found = _ACTIONS[args.action][2](channel, call, args)
    except grpc.RpcError as error:
        print(f"batchpilot groups: {args.target}: {said(error)}", file=sys.stderr)
        return EXIT_REFUSED
    if args.json:
        listing = [MessageToDict(item, preserving_proto_field_name=True) for item in found]
        print(json.dumps(listing, indent=2))
    else:
        # A pipe has no width of its own; cutting policies off there would help nobody.
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(_policy_table(found) if args.action == "policies" else _group_table(found))
    return 0


def _check(args: argparse.Namespace) -> None:
    share, seconds = getattr(args, "canary_share", None), getattr(args, "seconds", None)
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"--canary-share={share:g} must be above 0 and below 1")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"--seconds={seconds:g} must be above 0; `release` ends it")


def _show(channel: Any, call: Call, args: argparse.Namespace) -> list[pb.GroupPolicy]:
    """One group, or each that has an engine at this service."""
    names = [args.group]
    if args.group is None:
        listed = call(TunerServiceStub(channel).ListEngines, pb.ListEnginesRequest())
        names = sorted({engine.id.group for engine in listed.engines})
    get = PolicyServiceStub(channel).GetPolicy
    return [call(get, pb.GetPolicyRequest(group=name)).group_policy for name in names]


def _policies(channel: Any, call: Call, args: argparse.Namespace) -> list[pb.PolicyInfo]:
    request = pb.ListPoliciesRequest(group=args.group or "")
    return list(call(PolicyServiceStub(channel).ListPolicies, request).policies)


def _promote(channel: Any, call: Call, args: argparse.Namespace) -> list[pb.GroupPolicy]:
    request = pb.PromotePolicyRequest(
        group=args.group, policy=args.policy, canary_share=args.canary_share
    )
    return _promoted(channel, call, request)


def _hold(channel: Any, call: Call, args: argparse.Namespace) -> list[pb.GroupPolicy]:
    request = pb.PromotePolicyRequest(
        group=args.group, policy=args.policy, hold_seconds=args.seconds
    )
    return _promoted(channel, call, request)


def _release(channel: Any, call: Call, args: argparse.Namespace) -> list[pb.GroupPolicy]:
    return _promoted(channel, call, pb.PromotePolicyRequest(group=args.group, hold_seconds=0))


def _promoted(channel: Any, call: Call, request: pb.PromotePolicyRequest) -> list[pb.GroupPolicy]:
    return [call(PolicyServiceStub(channel).PromotePolicy, request).group_policy]


def _roll_back(channel: Any, call: Call, args: argparse.Namespace) -> list[pb.GroupPolicy]:
    request = pb.RollBackPolicyRequest(group=args.group)
    return [call(PolicyServiceStub(channel).RollBackPolicy, request).group_policy]


def _group_table(groups: list[pb.GroupPolicy]) -> Table | Text:
    if not groups:
        return Text("no engine has a session here; name a group to see one without engines")
    table = Table(
        "GROUP", "POLICY", "HOLD OR TRIAL", "BEFORE, NEWEST FIRST", box=None, pad_edge=False
    )
    for group in groups:
        row = (group.group, group.policy, _hold_or_trial(group), ", ".join(reversed(group.history)))
        table.add_row(*map(Text, row))
    return table


def _hold_or_trial(group: pb.GroupPolicy) -> str:
    """What a group is held at, what it tries, and how that stands."""
    parts = []
    if group.held_policy:
        parts.append(f"held at {group.held_policy} for {group.held_seconds_left:.0f} s more")
    if group.canary_policy:
        parts.append(f"tries {group.canary_policy} on a share of {group.canary_share:g}")
    parts += [text for text in (group.canary_state, group.canary_problem) if text]
    return "; ".join(parts)


def _policy_table(policies: list[pb.PolicyInfo]) -> Table:
    table = Table("POLICY", "USED", "WHAT IT DOES, OR WHY IT CANNOT BE USED", box=None)
    for policy in policies:
        row = (policy.policy, "yes" if policy.in_use else "", policy.problem or policy.summary)
        table.add_row(*map(Text, row))
    return table


def _optional_group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", metavar="GROUP", help="one group")


def _one_group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", metavar="GROUP")


def _group_and_policy(parser: argparse.ArgumentParser) -> None:
    _one_group(parser)
    parser.add_argument("policy", metavar="POLICY", help="as NAME or NAME:KEY=VALUE:KEY=VALUE")


def _promotion(parser: argparse.ArgumentParser) -> None:
    _group_and_policy(parser)
    parser.add_argument(
        "--canary-share", type=float, metavar="SHARE", help="try it on this share of them first"
    )


def _holding(parser: argparse.ArgumentParser) -> None:
    _group_and_policy(parser)
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="for how long (default: %(default)g)"
    )


_ACTIONS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Call]] = {
    "show": ("what decides for a group, or for each that has engines", _optional_group, _show),
    "policies": ("the policies that the service can give", _optional_group, _policies),
    "promote": ("give a group another policy, or try it on a share", _promotion, _promote),
    "rollback": ("end a hold or a trial, or go back to the policy before", _one_group, _roll_back),
    "hold": ("hold a whole group at a policy for a while", _holding, _hold),
    "release": ("end that hold now", _one_group, _release),
}
