"""Promotions as they are asked for: checked, made, and kept in the state file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import grpc

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.groups import Groups, Promotion
from batchpilot.service.refusals import RefusalError
from batchpilot.service.sessions import SessionTable
from batchpilot.service.state import read_promotions, write_promotions

logger = logging.getLogger("batchpilot.service")


class Promotions:
    """Changes the groups of one service.

    Args:
        groups: Those changed.
        sessions: Engines may bear groups that no settings name.
        path: The state file; None forgets promotions when the service stops.
    """

    def __init__(self, groups: Groups, sessions: SessionTable, path: Path | None) -> None:
        """Reads nothing yet."""
        self._groups = groups
        self._sessions = sessions
        self._path = path

    def load(self) -> None:
        """Takes up what the state file says.

        Raises:
            ConfigError: It cannot be read; the promotions in force stay.
        """
        if self._path is not None:
            self._groups.set_promotions(read_promotions(self._path))

    def check_group(self, group: str) -> str:
        """The group, if it exists: settings, promotions or engines here name it.

        Raises:
            RefusalError: NOT_FOUND.
        """
        known = {*self._groups.names, *(session.key.group for session in self._sessions)}
        if group not in known:
            listing = ", ".join(sorted(known)) or "none"
            raise RefusalError(
                grpc.StatusCode.NOT_FOUND, "group", f"no group {group[:40]!r}; there are: {listing}"
            )
        return group

    def in_force(self) -> Mapping[str, Promotion]:
        """What promotions have made of the groups."""
        return self._groups.promotions

    def policy(self, group: str) -> str:
        """A group's policy; that of the default settings for a group nobody knows."""
        return self._groups.promotion(group).policy

    def describe(self, group: str) -> pb.GroupPolicy:
        """A group's policy and history.

        Raises:
            RefusalError: NOT_FOUND.
        """
        promotion = self._groups.promotion(self.check_group(group))
        return pb.GroupPolicy(
            group=group,
            policy=promotion.policy,
            canary_policy=promotion.canary_policy,
            canary_share=promotion.canary_share,
            history=promotion.history,
        )

    def promote(self, group: str, policy: str, share: float) -> None:
        """Gives a group another policy, for a share of its engines below 1 as a canary.

        Raises:
            RefusalError: UNAVAILABLE: it could not be kept, and has not been made.
        """
        now = self._groups.promotion(group)
        self._put(group, now.promoted(policy) if share == 1 else now.with_canary(policy, share))

    def roll_back(self, group: str) -> None:
        """Ends a group's canary, or gives it the policy before.

        Raises:
            RefusalError: FAILED_PRECONDITION: it had none. UNAVAILABLE: as `promote`.
        """
        before = self._groups.promotion(group).rolled_back()
        if before is None:
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "no_history",
                f"group {group} has had no other policy since its settings were last changed",
            )
        self._put(group, before)

    def _put(self, group: str, promotion: Promotion) -> None:
        promotions = {**self._groups.promotions, group: promotion}
        if self._path is not None:
            try:
                # Another replica may have promoted for another group meanwhile.
                promotions = {**read_promotions(self._path), group: promotion}
                write_promotions(self._path, promotions)
            except (OSError, ConfigError) as error:
                logger.error("promotions cannot be kept in %s: %s", self._path, error)
                raise RefusalError(
                    grpc.StatusCode.UNAVAILABLE,
                    "state",
                    "the promotion could not be kept, so it was not made; see the service's log",
                ) from None
        self._groups.set_promotions(promotions)
