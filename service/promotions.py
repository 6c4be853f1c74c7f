"""Promotions as they are asked for: checked, made, and kept in the state file."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import grpc

from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.groups import Groups, Promotion
from batchpilot.service.policy_source import trial_targets
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
            if not self._path.parent.is_dir():
                raise ConfigError(f"{self._path}: its folder is not there")
            self._groups.set_promotions(_current(read_promotions(self._path)))

    def check_group(self, group: str) -> str:
        """The group, if it exists: settings, promotions or engines here name it.

        Raises:
            RefusalError: NOT_FOUND.
        """
        known = {*self._groups.names, *self._engines()}
        if group not in known:
            listing = ", ".join(map(repr, sorted(known))) or "none"
            raise RefusalError(
                grpc.StatusCode.NOT_FOUND, "group", f"no group {group[:40]!r}; there are: {listing}"
            )
        return group

    def _engines(self) -> Counter[str]:
        """The engines here, each rank counted, by group."""
        return Counter(session.key.group for session in self._sessions)

    def targets(self, group: str) -> list[Mapping[str, float | None]]:
        """The targets that a policy of the group must do with: one entry for all alike.

        Those of its engines; with none here, what it sets itself and stand-ins for the rest.
        """
        shared = trial_targets(self._groups.settings(group))
        engines = {session.targets for session in self._sessions if session.key.group == group}
        return [{**shared, **asdict(targets)} for targets in engines] or [shared]

    def in_force(self) -> Mapping[str, Promotion]:
        """What promotions have made of the groups."""
        return self._groups.promotions

    def policy(self, group: str) -> str:
        """A group's policy; that of the default settings for a group nobody knows."""
        return self._groups.promotion(group).in_force

    def describe(self, group: str) -> pb.GroupPolicy:
        """A group's policy and history.

        Raises:
            RefusalError: NOT_FOUND.
        """
        return self._described(self.check_group(group), self._engines()[group])

    def describe_all(self) -> list[pb.GroupPolicy]:
        """The same of every group that settings, promotions or engines here name, by name."""
        engines = self._engines()
        names = sorted({*self._groups.names, *engines})
        return [self._described(name, engines[name]) for name in names]

    def _described(self, group: str, engines: int) -> pb.GroupPolicy:
        promotion = self._groups.promotion(group)
        return pb.GroupPolicy(
            group=group,
            policy=promotion.policy,
            canary_policy=promotion.canary_policy,
            canary_share=promotion.canary_share,
            history=promotion.history,
            held_policy=promotion.held_policy,
            held_seconds_left=max(0.0, promotion.held_until - time.time()),
            engines=engines,
        )

    def promote(self, group: str, policy: str, share: float) -> None:
        """Gives a group another policy, for a share of its engines below 1 as a canary.

        Raises:
            RefusalError: UNAVAILABLE: it could not be kept, and has not been made.
        """
        now = self._groups.promotion(group)
        self._put(group, now.promoted(policy) if share == 1 else now.with_canary(policy, share))
        if now.held_policy:
            logger.info("group %s is no longer held at %s: a promotion", group, now.held_policy)

    def hold(self, group: str, policy: str, seconds: float) -> None:
        """Holds a group at a policy for a while, or ends that with 0 seconds.

        Raises:
            RefusalError: UNAVAILABLE: as `promote`.
        """
        now = self._groups.promotion(group)
        if seconds > 0:
            self._put(group, now.held(policy, time.time() + seconds))
        elif now.held_policy:
            self._put(group, now.released())

    def end_holds(self) -> None:
        """Ends what has been held for its time; call it every second or so.

        The state file keeps what is over until it is next written: nobody takes it up again.
        """
        held = {group: p for group, p in self._groups.promotions.items() if p.held_policy}
        if not any(map(_is_over, held.values())):
            return
        self._groups.set_promotions(_current(self._groups.promotions))
        for group, promotion in held.items():
            if _is_over(promotion):
                logger.info("group %s is no longer held at %s", group, promotion.held_policy)

    def roll_back(self, group: str) -> str:
        """Ends what holds a group, else its canary, else gives it the policy before.

        Returns:
            The policy that ends.

        Raises:
            RefusalError: FAILED_PRECONDITION: it had none. UNAVAILABLE: as `promote`.
        """
        now = self._groups.promotion(group)
        before = now.rolled_back()
        if before is None:
            raise RefusalError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "no_history",
                f"group {group} has had no other policy since its settings were last changed",
            )
        self._put(group, before)
        return now.held_policy or now.canary_policy or now.policy

    def _put(self, group: str, promotion: Promotion) -> None:
        promotions = {**self._groups.promotions, group: promotion}
        if self._path is not None:
            try:
                # Another replica may have promoted for another group meanwhile.
                promotions = {**_current(read_promotions(self._path)), group: promotion}
                write_promotions(self._path, promotions)
            except (OSError, ConfigError) as error:
                logger.error("promotions cannot be kept in %s: %s", self._path, error)
                raise RefusalError(
                    grpc.StatusCode.UNAVAILABLE,
                    "state",
                    "the promotion could not be kept, so it was not made; see the service's log",
                ) from None
        self._groups.set_promotions(promotions)


def _current(promotions: Mapping[str, Promotion]) -> dict[str, Promotion]:
    """Without what has been held for its time."""
    return {
        group: promotion.released() if _is_over(promotion) else promotion
        for group, promotion in promotions.items()
    }


def _is_over(promotion: Promotion) -> bool:
    """Whether it has been held for its time."""
    return bool(promotion.held_policy) and promotion.held_until <= time.time()
