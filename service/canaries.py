"""Trials of new policies: compared with the old one as reports come, and ended by themselves.

A trial exists while its group has a canary. Only windows whose limits came from the service count:
while an engine goes by its local policy it says nothing of either side.

The hash of a server's name says which side it is on, so that in a small group one side may have
nobody. That is a problem once it has lasted: where all servers try the policy, it is taken back.

While a group is held at a policy its trial rests: nothing is counted, and nothing is judged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from batchpilot.agents.canary import Canary, CanaryVerdict
from batchpilot.agents.limits import Source
from batchpilot.agents.parameters import ConfigError
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.groups import Promotion, trial_salt
from batchpilot.service.meters import Meters
from batchpilot.service.promotions import Promotions
from batchpilot.service.refusals import RefusalError
from batchpilot.service.sessions import Session, SessionTable
from batchpilot.service.settings import CanarySettings
from batchpilot.service.wire import telemetry_window

logger = logging.getLogger("batchpilot.service")


@dataclass(slots=True)
class Trial:
    """One group's canary.

    Attributes:
        promotion: What the group was given when it began, without what it has been held at since.
        canary: Compares.
        all_try: Whether all servers here try the policy, or none; None while there are both.
        since: When that began, in monotonic seconds.
        problem: Why nothing can be compared; empty while it can.
    """

    promotion: Promotion
    canary: Canary
    all_try: bool | None = None
    since: float = 0.0
    problem: str = ""

    def look_at_sides(self, servers: Set[str], now: float, patience_seconds: float) -> None:
        """Notes which sides have servers, and what is wrong once one has lacked them for long."""
        sides = set(map(self.canary.is_canary, servers))
        all_try = sides.pop() if len(sides) == 1 else None
        if all_try != self.all_try:
            self.all_try, self.since = all_try, now
        lasts = all_try is not None and now - self.since >= patience_seconds
        self.problem = self._one_sided(len(servers)) if lasts else ""

    def verdict(self) -> tuple[CanaryVerdict, str]:
        """What is to be done now, and why."""
        verdict = self.canary.verdict()
        if verdict is CanaryVerdict.WAIT and self.problem and self.all_try:
            return CanaryVerdict.ROLL_BACK, self.problem
        return verdict, self.canary.reason

    def _one_sided(self, servers: int) -> str:
        """What is wrong, and how to mend it."""
        if servers == 1:
            return (
                "there is only one server here, and nothing to compare it with: promote the policy "
                "without a share, or start more servers"
            )
        share = f"with a share of {self.promotion.canary_share:g}"
        if self.all_try:
            return (
                f"{share} all {servers} servers here try it, and there is nothing to compare them "
                "with: promote it with a smaller share"
            )
        return (
            f"{share} none of the {servers} servers here tries it: promote it with a greater share"
        )


class Canaries:
    """The trials of one service.

    Args:
        promotions: Says which groups have a canary; ends it.
        sessions: The engines here.
        settings: How trials are judged.
        meters: Counts the verdicts.
    """

    def __init__(
        self,
        promotions: Promotions,
        sessions: SessionTable,
        settings: CanarySettings,
        meters: Meters,
    ) -> None:
        """Starts without a trial."""
        self._promotions = promotions
        self._sessions = sessions
        self._settings = settings
        self._meters = meters
        self._trials: dict[str, Trial] = {}

    @property
    def trials(self) -> Mapping[str, Trial]:
        """Those under way, by group."""
        return self._trials

    def observe(self, session: Session, report: pb.Report) -> None:
        """Takes in a report of an engine whose group tries a policy; does nothing for others."""
        trial = self._running(session.key.group)
        if trial is None or session.choice is None or report.source != Source.REMOTE:
            return
        engine = session.key.engine
        if session.choice.canary == trial.canary.is_canary(engine):
            trial.canary.observe(engine, telemetry_window(report.window), session.key.rank)

    def failed(self, session: Session) -> None:
        """A policy has failed for an engine."""
        trial = self._running(session.key.group)
        if trial is not None:
            trial.canary.failed(session.key.engine)

    def of_promotion(self, group: str) -> Trial | None:
        """The trial of the canary that a group has now; None before it has begun."""
        trial, promotion = self._trials.get(group), self._promotions.in_force().get(group)
        if trial is None or promotion is None or trial.promotion != promotion.released():
            return None
        return trial

    def _running(self, group: str) -> Trial | None:
        """A group's trial; None while the group is held at a policy, which says nothing of it."""
        trial = self._trials.get(group)
        if trial is None:
            return None
        promotion = self._promotions.in_force().get(group)
        return None if promotion is None or promotion.held_policy else trial

    def judge(self) -> None:
        """Begins and ends trials as the groups have changed, and acts on what each has shown."""
        if not self._settings.judged:
            return
        self._follow(self._promotions.in_force())
        here = self._here()
        running = {group: trial for group in self._trials if (trial := self._running(group))}
        for group, trial in running.items():
            trial.canary.forget_all_but(here[group])
            self._look_at_sides(group, trial, {engine for engine, _ in here[group]})
            verdict, reason = trial.verdict()
            if verdict is not CanaryVerdict.WAIT:
                self._act(group, trial, verdict, reason)
        self._meters.canary_problems = {
            group: bool(trial.problem) for group, trial in self._trials.items()
        }

    def _look_at_sides(self, group: str, trial: Trial, servers: Set[str]) -> None:
        before = trial.problem
        patience_seconds = self._settings.one_sided_seconds
        trial.look_at_sides(servers, self._sessions.clock(), patience_seconds)
        if trial.problem and not before and not trial.all_try:  # else the rollback says it
            policy = trial.promotion.canary_policy
            logger.warning("group %s: canary %s: %s", group, policy, trial.problem)

    def _follow(self, promotions: Mapping[str, Promotion]) -> None:
        tried = {group: p.released() for group, p in promotions.items() if p.canary_policy}
        for group in set(self._trials) - set(tried):
            del self._trials[group]
        for group, promotion in tried.items():
            trial = self._trials.get(group)
            if trial is None or trial.promotion != promotion:
                params = replace(self._settings, share=promotion.canary_share)
                canary = Canary(params, trial_salt(group, promotion))
                self._trials[group] = Trial(promotion, canary)

    def _here(self) -> Mapping[str, set[tuple[str, int]]]:
        """The engines and ranks of every group with a trial that have a session now."""
        here: dict[str, set[tuple[str, int]]] = {group: set() for group in self._trials}
        for group, engine, rank in (session.key for session in self._sessions):
            if group in here:
                here[group].add((engine, rank))
        return here

    def _act(self, group: str, trial: Trial, verdict: CanaryVerdict, reason: str) -> None:
        policy = trial.promotion.canary_policy
        try:
            if verdict is CanaryVerdict.PROMOTE:
                self._promotions.promote(group, policy, 1.0)
            else:
                self._promotions.roll_back(group)
        except (RefusalError, ConfigError) as error:
            logger.error("group %s: the canary %s goes on: %s", group, policy, error)
            return
        del self._trials[group]
        self._meters.verdicts[group, verdict.value] += 1
        logger.warning("group %s: %s of canary %s: %s", group, verdict.value, policy, reason)
