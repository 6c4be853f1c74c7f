"""Which policy decides for which engine: the groups, from the settings and from promotions.

A promotion holds until the settings themselves give the group another policy: then whoever changed
the file has the last word, and the promotion is forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from batchpilot.agents.canary import is_canary as is_on_trial
from batchpilot.service.settings import GroupSettings
from batchpilot.service.wire import EngineKey

logger = logging.getLogger("batchpilot.service")

#: Former policies remembered for each group.
LONGEST_HISTORY = 20
#: Whoever holds a group for longer promotes: an agent that steers it asks again every few seconds.
LONGEST_HOLD_SECONDS = 3600.0


class PolicyChoice(NamedTuple):
    """How one engine is steered.

    Attributes:
        policy: The policy's text.
        canary: Whether the engine is one of its group's canaries.
        settings: The group's.
    """

    policy: str
    canary: bool
    settings: GroupSettings


@dataclass(frozen=True)
class Promotion:
    """What promotions have made of a group.

    Attributes:
        configured: The policy of the settings when the first of them was made.
        policy: What decides now.
        canary_policy: What is tried on some engines; empty without a canary.
        canary_share: The share of engines that try it.
        history: The policies before, newest last.
        held_policy: What decides for all engines until `held_until`; empty where nothing does.
        held_until: Unix time in seconds, by the clock of the replica that was asked.
    """

    configured: str
    policy: str
    canary_policy: str = ""
    canary_share: float = 0.0
    history: tuple[str, ...] = ()
    held_policy: str = ""
    held_until: float = 0.0

    @property
    def text(self) -> str:
        """All of it, for logs."""
        parts = [self.policy]
        if self.held_policy:
            parts.append(f"held at {self.held_policy}")
        if self.canary_policy:
            parts.append(f"trying {self.canary_policy} on a share of {self.canary_share}")
        if self.history:
            parts.append(f"after {', '.join(self.history)}")
        return ", ".join(parts)

    @property
    def in_force(self) -> str:
        """What decides for those that try no canary."""
        return self.held_policy or self.policy

    def held(self, policy: str, until: float) -> Promotion:
        """With another policy for all for a while; nothing else is changed or remembered."""
        return replace(self, held_policy=policy, held_until=until)

    def released(self) -> Promotion:
        """Without what it is held at."""
        return replace(self, held_policy="", held_until=0.0)

    def promoted(self, policy: str) -> Promotion:
        """With another policy for all, the present one remembered."""
        if policy == self.policy:
            return replace(self.released(), canary_policy="", canary_share=0.0)
        history = (*self.history, self.policy)[-LONGEST_HISTORY:]
        return Promotion(self.configured, policy, history=history)

    def with_canary(self, policy: str, share: float) -> Promotion:
        """With another policy for a share of the engines."""
        return replace(self.released(), canary_policy=policy, canary_share=share)

    def rolled_back(self) -> Promotion | None:
        """No longer held, or else without the canary, or else with the policy before.

        Returns:
            What it becomes; None if there is none of them.
        """
        if self.held_policy:
            return self.released()
        if self.canary_policy:
            return replace(self, canary_policy="", canary_share=0.0)
        if not self.history:
            return None
        return replace(self, policy=self.history[-1], history=self.history[:-1])


class Groups:
    """The policy of every group; a group that the settings do not name is steered as `default`.

    Attributes:
        generation: Changes whenever any choice may have; sessions compare it.
        when_overruled: Told of the promotions that newer settings have overruled, by group.
    """

    def __init__(self, default: GroupSettings, groups: Mapping[str, GroupSettings]) -> None:
        """Takes the settings as they are."""
        self.generation = 0
        self.when_overruled: Callable[[Mapping[str, Promotion]], None] = lambda overruled: None
        self._default = default
        self._groups = dict(groups)
        self._promotions: dict[str, Promotion] = {}

    @property
    def promotions(self) -> Mapping[str, Promotion]:
        """Those in force, by group."""
        return self._promotions

    @property
    def names(self) -> tuple[str, ...]:
        """The groups that settings or promotions name."""
        return tuple(sorted({*self._groups, *self._promotions}))

    def configure(self, default: GroupSettings, groups: Mapping[str, GroupSettings]) -> None:
        """Replaces the settings of all groups."""
        self._default, self._groups = default, dict(groups)
        before = self._promotions
        self.set_promotions(before)
        overruled = {g: p for g, p in before.items() if g not in self._promotions}
        for group, promotion in overruled.items():
            logger.warning(
                "group %s has policy %s of the settings; forgotten is %s",
                group,
                self.settings(group).policy,
                promotion.text,
            )
        if overruled:
            self.when_overruled(overruled)

    def set_promotions(self, promotions: Mapping[str, Promotion]) -> None:
        """Replaces all promotions, but for those made under other settings than these."""
        self._promotions = {
            group: promotion
            for group, promotion in promotions.items()
            if promotion.configured == self.settings(group).policy
        }
        self.generation += 1

    def settings(self, group: str) -> GroupSettings:
        """A group's settings."""
        return self._groups.get(group, self._default)

    def promotion(self, group: str) -> Promotion:
        """What promotions have made of a group; nothing yet: the settings' own policy."""
        configured = self.settings(group).policy
        return self._promotions.get(group) or Promotion(configured, configured)

    def choose(self, key: EngineKey) -> PolicyChoice:
        """Who decides for an engine."""
        settings, promotion = self.settings(key.group), self._promotions.get(key.group)
        if promotion is None:
            return PolicyChoice(settings.policy, False, settings)
        tries_canary = promotion.canary_policy and not promotion.held_policy
        if tries_canary and is_canary(key, promotion):
            return PolicyChoice(promotion.canary_policy, True, settings)
        return PolicyChoice(promotion.in_force, False, settings)


def is_canary(key: EngineKey, promotion: Promotion) -> bool:
    """Whether an engine is among those that try the canary policy; all ranks of a server are.

    The same engines are, at every replica and after every reconnection, and a greater share keeps
    those of a smaller one.
    """
    salt = trial_salt(key.group, promotion)
    return is_on_trial(key.engine, share=promotion.canary_share, salt=salt)


def trial_salt(group: str, promotion: Promotion) -> str:
    """Names a trial, so that other engines go first in another."""
    return f"{promotion.canary_policy}\0{group}"
