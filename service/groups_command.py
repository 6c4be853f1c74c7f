"""What decides for each group of a running service: look at it and change it, without a restart.

`promote` gives a group another policy, until the next change or edit of the settings, or tries it
on a share of its engines first, where the service compares it with the rest and takes it back or
on by itself. `hold` is for an incident: the whole group runs a policy for a while, then goes back
by itself. Every change is checked by the service before it is made, no stream is dropped, and
engines follow with their next lease. A restart forgets changes unless `storage.state` is set, and
so does a replica that does not share that file. Reading needs the role viewer, changing admin.
Exit status: 0 done, 1 refused or no answer, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1.tuner_pb2_grpc import PolicyServiceStub
from batchpilot.service.connection import (
    ANSWER_SECONDS,
    add_connection_arguments,
    connection,
    said,
)
from batchpilot.service.groups import LONGEST_HOLD_SECONDS

EXIT_REFUSED = 1
#: What a pipe is as wide as: a line for each group, with nothing cut off.
PIPE_WIDTH = 1000
#: Former policies shown of a group.
SHOWN_HISTORY = 3
EXAMPLES = """\
examples:
  batchpilot groups show
  batchpilot groups policies chat                     # what a group can be given
  batchpilot groups promote chat memory+sla:alpha=8 --canary-share 0.25
  batchpilot groups hold chat static:max_num_seqs=64 --seconds 600
  batchpilot groups release chat
  batchpilot groups rollback chat                     # ends a hold, else a trial, else goes back
  batchpilot groups show --target tuner.internal:50061 --ca-file ca.pem --token-file viewer.token"""

Call = Callable[..., Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand each."""
    parser.epilog = EXAMPLES
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in _ACTIONS.items():
        command = commands.add_parser(name, help=action.help, description=action.help)
        action.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print what it says as JSON")
        add_connection_arguments(command)


def run(args: argparse.Namespace) -> int:
    """Makes the call that it takes and prints what came of it.

    Raises:
        ConfigError: A value or a file that cannot be used.
    """
    _check(args)
    action = _ACTIONS[args.action]
    try:
        with connection(args) as (channel, metadata):

            def call(method: Call, request: Any) -> Any:
                return method(request, metadata=metadata, timeout=ANSWER_SECONDS)

            found = action.ask(PolicyServiceStub(channel), call, args)
    except grpc.RpcError as error:
        print(f"batchpilot groups: {args.target}: {said(error, args)}", file=sys.stderr)
        if action.changes and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            look = f"see `batchpilot groups show {args.group}`"
            print(f"batchpilot groups: the change may have been made: {look}", file=sys.stderr)
        return EXIT_REFUSED
    if args.json:
        print(json.dumps([_as_dict(item) for item in found], indent=2))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
        console.print(_policy_table(found) if args.action == "policies" else _group_table(found))
    return 0


def _as_dict(message: Any) -> dict[str, Any]:
    """A message with all of its fields, also those that are empty."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def _check(args: argparse.Namespace) -> None:
    for text in (args.group, getattr(args, "policy", None)):
        if text is not None and not text.isprintable():
            raise ConfigError(f"{text!r} holds what cannot be printed")
    share, seconds = getattr(args, "canary_share", None), getattr(args, "seconds", None)
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"--canary-share={share} must be above 0 and below 1")
    if seconds is not None and not 0 < seconds <= LONGEST_HOLD_SECONDS:
        raise ConfigError(
            f"--seconds={seconds:g} must be above 0 and at most {LONGEST_HOLD_SECONDS:g}; "
            "`release` ends a hold, `promote` is for longer"
        )


def _show(stub: PolicyServiceStub, call: Call, args: argparse.Namespace) -> list[Any]:
    if args.group is None:
        return list(call(stub.ListGroups, pb.ListGroupsRequest()).groups)
    return [call(stub.GetPolicy, pb.GetPolicyRequest(group=args.group)).group_policy]


def _policies(stub: PolicyServiceStub, call: Call, args: argparse.Namespace) -> list[Any]:
    request = pb.ListPoliciesRequest(group=args.group or "")
    return list(call(stub.ListPolicies, request).policies)


def _promote(stub: PolicyServiceStub, call: Call, args: argparse.Namespace) -> list[Any]:
    request = pb.PromotePolicyRequest(
        group=args.group, policy=args.policy, canary_share=args.canary_share
    )
    return [call(stub.PromotePolicy, request).group_policy]


def _hold(stub: PolicyServiceStub, call: Call, args: argparse.Namespace) -> list[Any]:
    request = pb.PromotePolicyRequest(
        group=args.group, policy=args.policy, hold_seconds=args.seconds
    )
    return [call(stub.PromotePolicy, request).group_policy]


def _release(stub: PolicyServiceStub, call: Call, args: argparse.Namespace) -> list[Any]:
    request = pb.PromotePolicyRequest(group=args.group, hold_seconds=0)
    return [call(stub.PromotePolicy, request).group_policy]


def _roll_back(stub: PolicyServiceStub, call: Call, args: argparse.Namespace) -> list[Any]:
    request = pb.RollBackPolicyRequest(group=args.group)
    return [call(stub.RollBackPolicy, request).group_policy]


def _group_table(groups: list[pb.GroupPolicy]) -> Table | Text:
    if not groups:
        return Text("no group is named by the settings, a promotion or an engine here")
    table = _table("GROUP", "ENGINES", "POLICY", "HOLD OR TRIAL", "BEFORE")
    for group in groups:
        cells = (group.group, str(group.engines), group.policy, _hold_or_trial(group))
        table.add_row(*map(Text, (*cells, _before(group.history))))
    return table


def _hold_or_trial(group: pb.GroupPolicy) -> str:
    """What a group is held at, what it tries, and how that stands."""
    parts = []
    if group.held_policy:
        parts.append(f"held at {group.held_policy} for {math.ceil(group.held_seconds_left)} s more")
    if group.canary_policy:
        rests = " (rests)" if group.held_policy else ""
        parts.append(f"tries {group.canary_policy} on a share of {group.canary_share}{rests}")
    parts += [text for text in (group.canary_state, group.canary_problem) if text]
    return "; ".join(parts)


def _before(history: Sequence[str]) -> str:
    """The last policies of a group, newest first, and how many more there were."""
    more = len(history) - SHOWN_HISTORY
    shown = [*reversed(history)][:SHOWN_HISTORY]
    return ", ".join([*shown, f"{more} more"] if more > 0 else shown)


def _policy_table(policies: list[pb.PolicyInfo]) -> Table:
    table = _table("POLICY", "USED", "WHAT IT DOES, OR WHY IT CANNOT BE USED")
    for policy in policies:
        row = (policy.policy, "yes" if policy.in_use else "", policy.problem or policy.summary)
        table.add_row(*map(Text, row))
    return table


def _table(*headings: str) -> Table:
    """A table that cuts nothing off, however narrow the terminal."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _optional_group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", metavar="GROUP", help="one group (default: all)")


def _group_asked_about(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", metavar="GROUP", help="marks what this group has")


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
        "--seconds",
        type=float,
        default=600.0,
        help=f"for how long, up to {LONGEST_HOLD_SECONDS:g} (default: %(default)g)",
    )


class _Action(NamedTuple):
    """A subcommand.

    Attributes:
        help: What it does.
        add_arguments: Adds its own.
        ask: Calls the service, and gives the messages to show.
        changes: Whether it changes anything.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    ask: Callable[[PolicyServiceStub, Call, argparse.Namespace], list[Any]]
    changes: bool = True


_ACTIONS = {
    "show": _Action("what decides for a group, or for each", _optional_group, _show, False),
    "policies": _Action("what the service can give a group", _group_asked_about, _policies, False),
    "promote": _Action(
        "give a group another policy, or try it on a share; ends a hold", _promotion, _promote
    ),
    "rollback": _Action(
        "end a hold, else a trial, else go back to the policy before", _one_group, _roll_back
    ),
    "hold": _Action(
        "hold a whole group at a policy for a while; a trial rests meanwhile", _holding, _hold
    ),
    "release": _Action("end a hold now", _one_group, _release),
}
