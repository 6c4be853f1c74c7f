"""The Prometheus page: what `Meters` has counted, and the state of every engine here.

Everything is read when the page is asked for; nothing is done for it while reports come in. Engines
beyond `max_engines` count in their group's totals only, so that the page stays bounded whatever
engines call themselves; the series of an engine end with its session.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from batchpilot import __version__
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service.meters import LATENCY_BUCKETS, Histogram, Meters
from batchpilot.service.recorder import Recorder
from batchpilot.service.sessions import Session, SessionTable
from batchpilot.service.wire import BINDINGS

ENGINE_LABELS = ("group", "engine", "rank")
PREFIX = "batchpilot_service_"


class EngineGauge(NamedTuple):
    """A gauge with one series for each engine.

    Attributes:
        help: What it says.
        read: The value; None where there is none now.
    """

    help: str
    read: Callable[[Session], float | None]


def _lease_limit(name: str) -> Callable[[Session], float | None]:
    return lambda session: None if session.lease is None else getattr(session.lease.limits, name)


def _desired_limit(name: str) -> Callable[[Session], float | None]:
    return lambda session: None if session.desired is None else getattr(session.desired, name)


def _applied_limit(name: str) -> Callable[[Session], float | None]:
    return lambda session: (
        None if session.report is None else getattr(session.report.window.limits, name)
    )


def _window(name: str) -> Callable[[Session], float | None]:
    return lambda session: None if session.report is None else getattr(session.report.window, name)


def _usage(session: Session) -> float | None:
    if session.report is None:
        return None
    return session.report.window.used_blocks / session.facts.total_blocks


def _mean_itl(session: Session) -> float | None:
    window = None if session.report is None else session.report.window
    if window is None or not window.decode_tokens:
        return None
    return window.decode_seconds / window.decode_tokens


def _itl_target(session: Session) -> float | None:
    return session.targets.itl_slo_seconds


_SEQS, _TOKENS = "max_num_seqs", "max_num_batched_tokens"
ENGINE_GAUGES: dict[str, EngineGauge] = {
    "desired_max_num_seqs": EngineGauge("what the policy wants", _desired_limit(_SEQS)),
    "desired_max_num_batched_tokens": EngineGauge("what the policy wants", _desired_limit(_TOKENS)),
    "leased_max_num_seqs": EngineGauge("what the newest lease says", _lease_limit(_SEQS)),
    "leased_max_num_batched_tokens": EngineGauge(
        "what the newest lease says", _lease_limit(_TOKENS)
    ),
    "applied_max_num_seqs": EngineGauge("what the engine says it applies", _applied_limit(_SEQS)),
    "applied_max_num_batched_tokens": EngineGauge(
        "what the engine says it applies", _applied_limit(_TOKENS)
    ),
    "running": EngineGauge("sequences in RUNNING", _window("running")),
    "waiting": EngineGauge("requests waiting", _window("waiting")),
    "kv_cache_usage": EngineGauge("share of the KV blocks in use, 0 to 1", _usage),
    "itl_seconds": EngineGauge("mean inter-token latency of the newest report", _mean_itl),
    "itl_target_seconds": EngineGauge(
        "the target for it: the engine's own, or else its group's", _itl_target
    ),
    "canary": EngineGauge(
        "1 while the engine tries its group's canary policy",
        lambda session: float(session.choice is not None and session.choice.canary),
    ),
}


class ServiceCollector(Collector):
    """Makes the page.

    Args:
        meters: The totals.
        sessions: The engines.
        max_engines: Engines with series of their own.
        recorder: Of the experience log, if there is one.
    """

    def __init__(
        self,
        meters: Meters,
        sessions: SessionTable,
        max_engines: int,
        recorder: Recorder | None = None,
    ) -> None:
        """Reads nothing yet."""
        self._meters = meters
        self._sessions = sessions
        self._max_engines = max_engines
        self._recorder = recorder

    def describe(self) -> Iterator[Any]:
        """No metric is described without its values."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """Every metric now."""
        sessions = sorted(self._sessions, key=lambda session: session.started_at)
        yield from _totals(self._meters)
        rows = {} if self._recorder is None else self._recorder.rows
        yield _counter("experience_rows", "rows of the experience log", ("result",), rows)
        yield self._groups(sessions)
        shown = sessions[: self._max_engines]
        left_out = len(sessions) - len(shown)
        yield _gauge("engines_without_series", "engines beyond max_engines", left_out)
        yield from _engines(shown, self._sessions.clock())

    def _groups(self, sessions: list[Session]) -> Any:
        streams = GaugeMetricFamily(f"{PREFIX}sessions", "engines here", labels=("group",))
        counts = Counter(self._meters.label(session.key.group) for session in sessions)
        for group, count in counts.items():
            streams.add_metric((group,), count)
        return streams


def _totals(meters: Meters) -> Iterator[Any]:
    yield _gauge("start_time_seconds", "when the service started, since 1970", meters.started_at)
    info = GaugeMetricFamily(f"{PREFIX}info", "always 1", labels=("version",))
    info.add_metric((__version__,), 1)
    yield info
    yield _counter("leases", "leases sent", ("group",), meters.leases)
    yield _counter(
        "clamps", "decisions that the shield changed", ("group", "reason"), meters.clamps
    )
    yield _counter(
        "policy_failures",
        "policies taken out of use for one engine; alert on any",
        ("group",),
        meters.policy_failures,
    )
    yield _counter("errors", "calls that ended with an error", ("method", "code"), meters.errors)
    yield _counter("refusals", "calls refused, by reason", ("reason",), meters.refusals)
    yield _counter(
        "canary_verdicts",
        "trials that ended by themselves: promote or roll_back",
        ("group", "verdict"),
        meters.verdicts,
    )
    problems = GaugeMetricFamily(
        f"{PREFIX}canary_problem",
        "1 while a trial has servers on one side only, and cannot be judged",
        labels=("group",),
    )
    for group, has_problem in meters.canary_problems.items():
        problems.add_metric((group,), has_problem)
    yield problems
    yield _counter("reloads", "files read again", ("result",), meters.reloads)
    yield _histogram(
        "decision_seconds", "from a report that was read to its decision", meters.latency
    )


def _engines(sessions: list[Session], now: float) -> Iterator[Any]:
    labels = [(s.key.group, s.key.engine, str(s.key.rank)) for s in sessions]
    for name, gauge in ENGINE_GAUGES.items():
        family = GaugeMetricFamily(f"{PREFIX}{name}", gauge.help, labels=ENGINE_LABELS)
        for label, session in zip(labels, sessions, strict=True):
            value = gauge.read(session)
            if value is not None:
                family.add_metric(label, value)
        yield family
    age = GaugeMetricFamily(
        f"{PREFIX}report_age_seconds", "since the newest report", labels=ENGINE_LABELS
    )
    has_lease = GaugeMetricFamily(
        f"{PREFIX}has_lease",
        "1 while a lease runs, 0 where the policy has failed; absent for an idle engine",
        labels=ENGINE_LABELS,
    )
    bound = GaugeMetricFamily(
        f"{PREFIX}bound",
        "1 for what kept the next request out of the newest step",
        labels=(*ENGINE_LABELS, "binding"),
    )
    for label, session in zip(labels, sessions, strict=True):
        age.add_metric(label, now - session.reported_at)
        if session.problem or session.has_lease(now):
            has_lease.add_metric(label, not session.problem)
        binding = pb.BINDING_NONE if session.report is None else session.report.binding
        bound.add_metric((*label, BINDINGS[binding].value), 1)
    yield age
    yield has_lease
    yield bound


def _gauge(name: str, text: str, value: float) -> Any:
    return GaugeMetricFamily(f"{PREFIX}{name}", text, value=value)


def _counter(name: str, text: str, labels: tuple[str, ...], totals: Any) -> Any:
    family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=labels)
    for key, total in list(totals.items()):
        family.add_metric((key,) if isinstance(key, str) else key, total)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Any:
    counts, buckets, total = list(histogram.counts), [], 0
    for end, count in zip((*map(str, LATENCY_BUCKETS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((end, total))
    return HistogramMetricFamily(
        f"{PREFIX}{name}", text, buckets=buckets, sum_value=histogram.total
    )
