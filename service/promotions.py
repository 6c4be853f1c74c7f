"""Promotions as they are asked for: checked, made, and kept in the state file.

Replicas that share the file change it one at a time, each from what it says by then. A hold lasts
by the monotonic clock of each replica, from when it was asked for there or first seen in the file.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

import grpc

from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.registry import DEFAULT_GROUP
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.groups import LONGEST_HOLD_SECONDS, Groups, Promotion
from batchpilot.service.policy_source import trial_targets
from batchpilot.service.refusals import RefusalError
from batchpilot.service.sessions import SessionTable
from batchpilot.service.state import read_promotions, write_promotions

logger = logging.getLogger("batchpilot.service")

#: A change takes milliseconds, and no engine is answered while one waits for a replica that hangs.
LOCK_SECONDS = 0.5

Hold = tuple[str, str, float]


class Promotions:
    """Changes the groups of one service.

    Args:
        groups: Those changed.
        sessions: Engines may bear groups that no settings name.
        path: The state file; None forgets promotions when the service stops.

    Raises:
        ConfigError: No change could be kept in the state file.
    """

    def __init__(self, groups: Groups, sessions: SessionTable, path: Path | None) -> None:
        """Reads nothing yet."""
        if path is not None:
            _check_writable(path)
        self._groups = groups
        self._sessions = sessions
        self._path = path
        # When each hold that the file has ends here, in monotonic seconds.
        self._hold_ends: dict[Hold, float] = {}
        # The settings' policies before their edit, by group, whose promotions the file still has.
        self._overruled: dict[str, str] = {}
        groups.when_overruled = self._overrule

    def load(self) -> None:
        """Takes up what the state file says.

        Raises:
            ConfigError: It cannot be read; the promotions in force stay.
        """
        if self._path is not None:
            _check_folder(self._path)
            self._groups.set_promotions(self._current(self._read()))

    def check_group(self, group: str) -> str:
        """The group, if it exists: `default`, or settings, promotions or engines here name it.

        Raises:
            RefusalError: NOT_FOUND.
        """
        known = self._known()
        if group not in known:
            listing = ", ".join(map(repr, known))
            raise RefusalError(
                grpc.StatusCode.NOT_FOUND, "group", f"no group {group[:40]!r}; there are: {listing}"
            )
        return group

    def _known(self) -> list[str]:
        return sorted({DEFAULT_GROUP, *self._groups.names, *self._engines()})

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
        """The same of every group that exists, by name."""
        engines = self._engines()
        return [self._described(name, engines[name]) for name in self._known()]

    def _described(self, group: str, engines: int) -> pb.GroupPolicy:
        promotion = self._groups.promotion(group)
        return pb.GroupPolicy(
            group=group,
            policy=promotion.policy,
            canary_policy=promotion.canary_policy,
            canary_share=promotion.canary_share,
            history=promotion.history,
            held_policy=promotion.held_policy,
            held_seconds_left=max(0.0, self._seconds_left(group, promotion)),
            engines=engines,
        )

    def promote(self, group: str, policy: str, share: float) -> None:
        """Gives a group another policy, for a share of its engines below 1 as a canary.

        Raises:
            RefusalError: UNAVAILABLE: it could not be kept, and has not been made.
        """
        before = self._change(
            group,
            lambda now: now.promoted(policy) if share == 1 else now.with_canary(policy, share),
        )
        if before.held_policy:
            logger.info("group %s is no longer held at %s: a promotion", group, before.held_policy)

    def hold(self, group: str, policy: str, seconds: float) -> None:
        """Holds a group at a policy for a while, or ends that with 0 seconds.

        Raises:
            RefusalError: UNAVAILABLE: as `promote`.
        """

        def changed(now: Promotion) -> Promotion | None:
            if seconds > 0:
                until = time.time() + seconds
                self._hold_ends[group, policy, until] = time.monotonic() + seconds
                return now.held(policy, until)
            return now.released() if now.held_policy else None

        self._change(group, changed)

    def end_holds(self) -> None:
        """Ends what has been held for its time; call it every second or so.

        Tries again to take out of the state file what could not be taken out when it was overruled.
        The state file keeps what is over until the group is next changed: nobody takes it up again.
        """
        self._write_off()
        promotions = self._groups.promotions
        over = {group: p for group, p in promotions.items() if self._is_over(group, p)}
        if not over:
            return
        self._groups.set_promotions(self._current(promotions))
        for group, promotion in over.items():
            logger.info("group %s is no longer held at %s", group, promotion.held_policy)

    def roll_back(self, group: str) -> str:
        """Ends what holds a group, else its canary, else gives it the policy before.

        Returns:
            The policy that ends.

        Raises:
            RefusalError: FAILED_PRECONDITION: it had none. UNAVAILABLE: as `promote`.
        """
        seen = self._groups.promotion(group)
        before = self._change(group, lambda now: _rolled_back(group, now, seen))
        ended = seen.held_policy or seen.canary_policy
        return ended or before.held_policy or before.canary_policy or before.policy

    def _change(self, group: str, change: Callable[[Promotion], Promotion | None]) -> Promotion:
        """Changes what the state file says of a group by now; None leaves it.

        Returns:
            What was changed.

        Raises:
            RefusalError: UNAVAILABLE: it could not be kept, and has not been made.
        """
        try:
            with _locked(self._path):
                promotions = self._read()
                self._groups.set_promotions(self._current(promotions))
                now = self._groups.promotion(group)
                changed = change(now)
                if changed is not None:
                    promotions[group] = changed
                    self._write(promotions)
                    self._groups.set_promotions(self._current(promotions))
                return now
        except (OSError, ConfigError) as error:
            logger.error("promotions cannot be kept in %s: %s", self._path, error)
            raise RefusalError(
                grpc.StatusCode.UNAVAILABLE,
                "state",
                "the promotion could not be kept, so it was not made; see the service's log",
            ) from None

    def _read(self) -> dict[str, Promotion]:
        """What the state file says, or what is in force without one, but for what is overruled.

        Also of groups that have other settings here: those of another replica may be newer.
        """
        found = self._groups.promotions if self._path is None else read_promotions(self._path)
        holds = {(g, p.held_policy, p.held_until) for g, p in found.items()}
        self._hold_ends = {hold: end for hold, end in self._hold_ends.items() if hold in holds}
        return {g: p for g, p in found.items() if self._overruled.get(g) != p.configured}

    def _write(self, promotions: Mapping[str, Promotion]) -> None:
        if self._path is not None:
            write_promotions(self._path, promotions)
        self._overruled.clear()

    def _overrule(self, promotions: Mapping[str, Promotion]) -> None:
        """Takes what an edit of the settings has overruled out of the state file too."""
        if self._path is None:
            return
        self._overruled |= {group: p.configured for group, p in promotions.items()}
        problem = self._write_off()
        if problem:
            logger.error("what is forgotten is still in %s: %s", self._path, problem)

    def _write_off(self) -> str:
        """Rewrites the state file without what is overruled; returns why it cannot be done."""
        if not self._overruled:
            return ""
        try:
            with _locked(self._path):
                kept = self._read()
                if kept.keys() != read_promotions(self._path).keys():  # else another replica has
                    self._write(kept)
                self._overruled.clear()
        except (OSError, ConfigError) as error:
            return str(error)
        return ""

    def _current(self, promotions: Mapping[str, Promotion]) -> dict[str, Promotion]:
        """Without what has been held for its time."""
        return {
            group: promotion.released() if self._is_over(group, promotion) else promotion
            for group, promotion in promotions.items()
        }

    def _is_over(self, group: str, promotion: Promotion) -> bool:
        """Whether it has been held for its time."""
        return bool(promotion.held_policy) and self._seconds_left(group, promotion) <= 0

    def _seconds_left(self, group: str, promotion: Promotion) -> float:
        """How long it is still held; the wall clock counts only where a hold is first seen."""
        if not promotion.held_policy:
            return 0.0
        now = time.monotonic()
        at_most = min(promotion.held_until - time.time(), LONGEST_HOLD_SECONDS)
        hold = (group, promotion.held_policy, promotion.held_until)
        return self._hold_ends.setdefault(hold, now + at_most) - now


def _rolled_back(group: str, now: Promotion, seen: Promotion) -> Promotion | None:
    """What a group becomes; None where the hold or canary that was seen here has ended meanwhile.

    Raises:
        RefusalError: FAILED_PRECONDITION: it has had no other policy.
    """
    if seen.held_policy:
        has_ended = not now.held_policy
    else:
        there = now.held_policy or now.canary_policy
        has_ended = bool(seen.canary_policy) and there != seen.canary_policy
    if has_ended:
        return None
    before = now.rolled_back()
    if before is None:
        raise RefusalError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "no_history",
            f"group {group} has had no other policy since its settings were last changed",
        )
    return before


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: its folder is not there")


def _check_writable(path: Path) -> None:
    """Tries what a change does beside the state file, and leaves nothing behind.

    Raises:
        ConfigError: It cannot be done.
    """
    _check_folder(path)
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-"):
            pass
        lock = _lock_path(path)
        if lock.exists():
            lock.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"{path}: it or its lock file cannot be written ({error.strerror})"
        ) from None


def _lock_path(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


@contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """Holds the state file against other replicas.

    Raises:
        OSError: It cannot be locked, or another replica does not let go of it.
    """
    if path is None:
        yield
        return
    with _lock_path(path).open("a") as file:
        _lock(file)
        yield


def _lock(file: IO[str]) -> None:
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                raise TimeoutError(f"locked by another replica for {LOCK_SECONDS:g} s") from None
        time.sleep(0.005)
