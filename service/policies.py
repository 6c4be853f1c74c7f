"""PolicyService: who decides for each group, and how that is changed without dropping a stream."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1 import tuner_pb2_grpc
from batchpilot.service.access import Role
from batchpilot.service.canaries import Canaries
from batchpilot.service.gate import Gate
from batchpilot.service.groups import LONGEST_HOLD_SECONDS
from batchpilot.service.meters import Meters
from batchpilot.service.policy_source import PolicySource
from batchpilot.service.promotions import Promotions
from batchpilot.service.refusals import RefusalError, answering

logger = logging.getLogger("batchpilot.service")

_READERS = (Role.VIEWER, Role.ADMIN)


class PolicyServicer(tuner_pb2_grpc.PolicyServiceServicer):
    """Answers those who look after policies."""

    def __init__(
        self,
        gate: Gate,
        source: PolicySource,
        promotions: Promotions,
        meters: Meters,
        canaries: Canaries,
    ) -> None:
        """Serves the groups of one service."""
        self._gate = gate
        self._source = source
        self._promotions = promotions
        self._meters = meters
        self._canaries = canaries

    async def ListPolicies(
        self, request: pb.ListPoliciesRequest, context: Any
    ) -> pb.ListPoliciesResponse:
        """Everything a group can be given."""
        async with answering("ListPolicies", context, self._meters):
            self._gate.admit(context, *_READERS)
            group = request.group
            used = await asyncio.to_thread(self._used, group) if group else set()
            policies = await asyncio.to_thread(self._source.list)
            for info in policies:
                info.in_use = info.policy in used
            return pb.ListPoliciesResponse(policies=policies)

    def _used(self, group: str) -> set[str]:
        """What decides for a group's engines, and what some try, as policies are listed.

        Raises:
            RefusalError: NOT_FOUND.
        """
        described = self._promotions.describe(group)
        texts = (described.held_policy or described.policy, described.canary_policy)
        return {self._source.listed_as(text, group) for text in texts if text}

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        """A group's policy."""
        async with answering("GetPolicy", context, self._meters):
            self._gate.admit(context, *_READERS)
            return pb.GetPolicyResponse(group_policy=self._describe(request.group))

    async def ListGroups(
        self, request: pb.ListGroupsRequest, context: Any
    ) -> pb.ListGroupsResponse:
        """Every group's policy."""
        async with answering("ListGroups", context, self._meters):
            self._gate.admit(context, *_READERS)
            groups = map(self._with_trial, self._promotions.describe_all())
            return pb.ListGroupsResponse(groups=groups)

    async def PromotePolicy(
        self, request: pb.PromotePolicyRequest, context: Any
    ) -> pb.PromotePolicyResponse:
        """Gives a group another policy."""
        async with answering("PromotePolicy", context, self._meters):
            caller = self._gate.admit(context, Role.ADMIN)
            share = request.canary_share if request.HasField("canary_share") else 1.0
            if not 0 < share <= 1:  # false for NaN too
                raise RefusalError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "invalid_message",
                    f"canary_share={share} must be above 0 and at most 1",
                )
            group = self._promotions.check_group(request.group)
            if request.HasField("hold_seconds"):
                await self._hold(request, group, share, caller.name)
                return pb.PromotePolicyResponse(group_policy=self._describe(group))
            policy = request.policy.strip()
            await self._verify(policy, group)
            self._promotions.promote(group, policy, share)
            logger.info(
                "%s gives group %s policy %s for a share of %s", caller.name, group, policy, share
            )
            return pb.PromotePolicyResponse(group_policy=self._describe(group))

    async def _verify(self, policy: str, group: str) -> None:
        """Tries a policy with the targets that the group's engines have.

        Raises:
            RefusalError: As `PolicySource.verify`.
        """
        await self._source.verify(policy, group, self._promotions.targets(group))

    async def _hold(
        self, request: pb.PromotePolicyRequest, group: str, share: float, caller: str
    ) -> None:
        """Holds a group at a policy for a while; the log tells who began it.

        Raises:
            RefusalError: INVALID_ARGUMENT: a time out of bounds, or a share. As `PromotePolicy`.
        """
        seconds = request.hold_seconds
        if not 0 <= seconds <= LONGEST_HOLD_SECONDS:
            raise RefusalError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "invalid_message",
                f"hold_seconds={seconds} must be 0 to {LONGEST_HOLD_SECONDS:g}",
            )
        if share != 1:
            raise RefusalError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "invalid_message",
                f"hold_seconds={seconds} goes with no canary_share: a group is held as a whole",
            )
        policy = request.policy.strip()
        if seconds:
            await self._verify(policy, group)
        before = self._promotions.describe(group).held_policy
        self._promotions.hold(group, policy, seconds)
        if seconds and policy != before:  # whoever steers asks again every few seconds
            logger.info("%s holds group %s at %s for %g s", caller, group, policy, seconds)
        elif before and not seconds:
            logger.info("%s lets go of group %s, held at %s", caller, group, before)

    async def RollBackPolicy(
        self, request: pb.RollBackPolicyRequest, context: Any
    ) -> pb.RollBackPolicyResponse:
        """Takes a group back to what it had."""
        async with answering("RollBackPolicy", context, self._meters):
            caller = self._gate.admit(context, Role.ADMIN)
            group = self._promotions.check_group(request.group)
            ended = self._promotions.roll_back(group)
            logger.info("%s takes group %s back from %s", caller.name, group, ended)
            return pb.RollBackPolicyResponse(group_policy=self._describe(group))

    def _describe(self, group: str) -> pb.GroupPolicy:
        """A group's policy, and how its trial stands.

        Raises:
            RefusalError: NOT_FOUND.
        """
        return self._with_trial(self._promotions.describe(group))

    def _with_trial(self, described: pb.GroupPolicy) -> pb.GroupPolicy:
        """A group's policy, with how its trial stands."""
        trial = self._canaries.of_promotion(described.group)
        if trial is not None:
            described.canary_state = trial.canary.reason
            described.canary_problem = trial.problem
        return described
