"""Which policy decides for which engine: the groups, from the settings and from promotions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from batchpilot.service.settings import GroupSettings
from batchpilot.service.wire import EngineKey


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


class Groups:
    """The policy of every group; a group that the settings do not name is steered as `default`.

    Attributes:
        generation: Changes whenever any choice may have; sessions compare it.
    """

    def __init__(self, default: GroupSettings, groups: Mapping[str, GroupSettings]) -> None:
        """Takes the settings as they are."""
        self.generation = 0
        self._default = default
        self._groups = dict(groups)

    def configure(self, default: GroupSettings, groups: Mapping[str, GroupSettings]) -> None:
        """Replaces the settings of all groups."""
        self._default, self._groups = default, dict(groups)
        self.generation += 1

    def choose(self, key: EngineKey) -> PolicyChoice:
        """Who decides for an engine."""
        settings = self._groups.get(key.group, self._default)
        return PolicyChoice(settings.policy, False, settings)
