"""What an operator sees: a log line now and then, and Prometheus metrics.

A thread of its own reads the hook's running totals, so that the hot path does no I/O and takes no
lock. Metrics are served in one of two ways, both off by default:

- vLLM runs with a multi-process metrics directory (`PROMETHEUS_MULTIPROC_DIR`, set by vLLM itself
  with several API servers): ours appear on vLLM's own /metrics page.
- `metrics_port` is set: this process serves them itself.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from batchpilot.agents.latency_limits import OUT_OF_REACH
from batchpilot.agents.parameters import ConfigError
from batchpilot.agents.shadow import Agreement, ShadowedPolicy
from batchpilot.scheduler_hook.hook import Hook, HookStats
from batchpilot.scheduler_hook.settings import HookSettings

if TYPE_CHECKING:
    from batchpilot.scheduler_hook.remote_link import RemoteLink
    from batchpilot.scheduler_hook.tuner_client import ClientStats, TunerClient
    from batchpilot.scheduler_hook.vllm_adapter import VllmAdapter

logger = logging.getLogger("vllm.batchpilot")

PUBLISH_INTERVAL_SECONDS = 1.0
#: A target is called out of reach once so many lines in a row say so: a pause is soon forgotten.
LINES_OUT_OF_REACH = 2

#: name: (help, further label). Every name gets the prefix `batchpilot_`.
GAUGES = {
    "steering": "1 while batchpilot observes or steers this engine, 0 once it has stopped",
    "applied_max_num_seqs": "sequence limit in force",
    "applied_max_num_batched_tokens": "token limit in force",
    "desired_max_num_seqs": "sequence limit the policy wants",
    "desired_max_num_batched_tokens": "token limit the policy wants",
}
COUNTERS = {
    "steps": ("steps scheduled, by what kept the next request out", "binding"),
    "decisions": ("decisions, by who made them", "source"),
    "clamps": ("decisions the shield changed, by reason", "reason"),
    "preemptions": ("sequences preempted", None),
    "recomputed_tokens": ("KV tokens thrown away by preemptions", None),
    "failures": ("exceptions in batchpilot's code; each ends the steering", None),
    "hook_seconds": ("time spent in batchpilot's code inside the scheduler", None),
}
#: The same in mode `remote`, of the session with the tuning service.
REMOTE_GAUGES = {
    "remote_connected": "1 while a stream to the tuning service is open and welcome",
    "remote_lease_age_seconds": "time since the report was sent that the newest lease answers",
    "remote_lease_remaining_seconds": "how much longer the lease in force runs, 0 without one",
}
REMOTE_COUNTERS = {
    "remote_sessions": ("streams to the tuning service that were welcomed", None),
    "remote_failures": ("streams and attempts that ended, by status", "code"),
    "remote_leases": ("answers of the service: accepted, or why they were refused", "result"),
    "remote_reports_sent": ("reports sent to the tuning service", None),
    "remote_reports_dropped": ("reports dropped because the stream was slow or down", None),
}
#: The same of a policy that only watches.
SHADOW_GAUGES = {
    "shadow_active": "1 while the shadow decides beside the policy, 0 once it has failed",
    "shadow_max_num_seqs": "sequence limit the shadow would have applied, 0 without one",
    "shadow_max_num_batched_tokens": "token limit the shadow would have applied, 0 without one",
}
SHADOW_COUNTERS = {
    "shadow_steps": ("steps the shadow decided on, by which of its limits differs", "agreement"),
}


class Metrics:
    """batchpilot's Prometheus metrics of one engine.

    Args:
        model_name: Label `model_name`, as in vLLM's own metrics.
        engine_index: Label `engine`, the data-parallel rank.
        client: The session with the tuning service, in mode `remote`.
        shadow: The policy with another beside it, where one is set.
    """

    def __init__(
        self,
        model_name: str,
        engine_index: int,
        client: TunerClient | None = None,
        shadow: ShadowedPolicy | None = None,
    ) -> None:
        """Creates every metric, in a registry of its own."""
        from prometheus_client import CollectorRegistry, Counter, Gauge

        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": str(engine_index)}
        self._client = client
        self._shadow = shadow
        names = tuple(self._labels)
        gauges = GAUGES if client is None else GAUGES | REMOTE_GAUGES
        counters = COUNTERS if client is None else COUNTERS | REMOTE_COUNTERS
        if shadow is not None:
            gauges, counters = gauges | SHADOW_GAUGES, counters | SHADOW_COUNTERS
        self._gauges = {
            name: Gauge(
                f"batchpilot_{name}",
                text,
                names,
                registry=self.registry,
                multiprocess_mode="mostrecent",
            ).labels(**self._labels)
            for name, text in gauges.items()
        }
        self._counters = {
            name: Counter(
                f"batchpilot_{name}",
                text,
                (*names, label) if label else names,
                registry=self.registry,
            )
            for name, (text, label) in counters.items()
        }
        self._published: dict[tuple[str, str], float] = {}

    def publish(self, hook: Hook) -> None:
        """Brings every metric up to date."""
        applied, decision = hook.applied_limits, hook.decision
        desired = decision.limits if decision else applied
        values = {
            "steering": int(hook.active),
            "applied_max_num_seqs": applied.max_num_seqs,
            "applied_max_num_batched_tokens": applied.max_num_batched_tokens,
            "desired_max_num_seqs": desired.max_num_seqs,
            "desired_max_num_batched_tokens": desired.max_num_batched_tokens,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        for name, (_, label) in COUNTERS.items():
            for key, total in _series(hook.stats, name).items():
                self._advance(name, label, key, total)
        if self._client is not None:
            self._publish_remote(self._client)
        if self._shadow is not None:
            self._publish_shadow(self._shadow)

    def _publish_shadow(self, shadow: ShadowedPolicy) -> None:
        limits = shadow.limits
        values = {
            "shadow_active": int(shadow.failure is None),
            "shadow_max_num_seqs": limits.max_num_seqs if limits else 0,
            "shadow_max_num_batched_tokens": limits.max_num_batched_tokens if limits else 0,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        for kind, total in list(shadow.agreement.items()):
            self._advance("shadow_steps", "agreement", str(kind), total)

    def _publish_remote(self, client: TunerClient) -> None:
        now, lease = client.clock(), client.leases.current
        values = {
            "remote_connected": float(client.stats.connected),
            "remote_lease_age_seconds": now - lease.sent_at if lease else 0.0,
            "remote_lease_remaining_seconds": max(0.0, lease.expires_at - now) if lease else 0.0,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        for name, (_, label) in REMOTE_COUNTERS.items():
            for key, total in _series(client.stats, name.removeprefix("remote_")).items():
                self._advance(name, label, key, total)

    def _advance(self, name: str, label: str | None, key: str, total: float) -> None:
        more = total - self._published.get((name, key), 0.0)
        labels = {**self._labels, label: key} if label else self._labels
        self._counters[name].labels(**labels).inc(more)
        self._published[name, key] = total


def _series(stats: HookStats | ClientStats, name: str) -> Mapping[str, float]:
    """The running totals behind one counter, by label value ("" without a label)."""
    total = getattr(stats, name)
    # A copy in one step: the engine's thread may add a key meanwhile.
    return {str(k): v for k, v in list(total.items())} if isinstance(total, dict) else {"": total}


class Reporter:
    """The thread that publishes metrics and logs a line every `log_interval_seconds`.

    Args:
        hook: What to report on.
        adapter: Names the model and the engine.
        settings: Where and how often.
        link: The session with the tuning service, in mode `remote`.

    Raises:
        ConfigError: `metrics_port` cannot be opened.
    """

    def __init__(
        self,
        hook: Hook,
        adapter: VllmAdapter,
        settings: HookSettings,
        link: RemoteLink | None = None,
    ) -> None:
        """Opens the metrics port, if one is set, and starts the thread."""
        self._hook = hook
        self._settings = settings
        self._metrics: Metrics | None = None
        self._server: Any = None
        self._logged_steps = 0
        self._shadow = hook.policy if isinstance(hook.policy, ShadowedPolicy) else None
        self._told_shadow_failure = False
        self._lines_out_of_reach = 0
        self._stop = threading.Event()
        if settings.metrics_port is not None or "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            client = None if link is None else link.client
            self._metrics = Metrics(adapter.model_name, adapter.engine_index, client, self._shadow)
            self._metrics.publish(hook)
        if settings.metrics_port is not None:
            self._open_port(settings.metrics_port + adapter.engine_index)
        self._thread = threading.Thread(target=self._run, name="batchpilot-report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread, publishes a last time and closes the port."""
        self._stop.set()
        self._thread.join(timeout=2 * PUBLISH_INTERVAL_SECONDS)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _open_port(self, port: int) -> None:
        from prometheus_client import start_http_server

        assert self._metrics is not None
        host = self._settings.metrics_host
        try:
            self._server, _ = start_http_server(port, host, self._metrics.registry)
        except OSError as error:
            raise ConfigError(
                f"batchpilot settings: metrics_port: cannot listen on {host}:{port} "
                f"({error.strerror}); choose a free port"
            ) from None
        logger.info("batchpilot: metrics on http://%s:%d/metrics", host, port)

    def _run(self) -> None:
        waited = 0.0
        while not self._stop.wait(PUBLISH_INTERVAL_SECONDS):
            waited += PUBLISH_INTERVAL_SECONDS
            self._publish()
            if waited >= self._settings.log_interval_seconds:
                waited = 0.0
                self._log()
        self._publish()

    def _publish(self) -> None:
        try:
            if self._metrics is not None:
                self._metrics.publish(self._hook)
        except Exception:
            logger.exception("batchpilot's metrics stop: publishing failed")
            self._metrics = None

    def _log(self) -> None:
        """One line, if anything ran since the last; one that fails takes no metrics with it."""
        try:
            self._log_steps()
        except Exception:
            logger.exception("batchpilot could not write its line of the log")

    def _log_steps(self) -> None:
        hook, content, decision = self._hook, self._hook.last_content, self._hook.decision
        steps = sum(hook.stats.steps.values())
        if steps == self._logged_steps or content is None or decision is None:
            return
        self._logged_steps = steps
        logger.info(
            "batchpilot: running %d, waiting %d, max_num_seqs %d (%s wants %d: %s), "
            "max_num_batched_tokens %d, next request held by %s, %d preemptions so far",
            content.running,
            content.waiting,
            hook.applied_limits.max_num_seqs,
            decision.source,
            decision.limits.max_num_seqs,
            decision.reason,
            hook.applied_limits.max_num_batched_tokens,
            hook.binding,
            hook.stats.preemptions,
        )
        if decision.reason == OUT_OF_REACH:
            self._lines_out_of_reach += 1
            self._warn_out_of_reach(decision.reason)
        elif self._lines_out_of_reach < LINES_OUT_OF_REACH:
            self._lines_out_of_reach = 0
        if self._shadow is not None:
            self._log_shadow(self._shadow)

    def _warn_out_of_reach(self, reason: str) -> None:
        """Once, when so many lines in a row have said it."""
        if self._lines_out_of_reach == LINES_OUT_OF_REACH:
            logger.warning(
                "batchpilot: itl_slo_ms is out of reach here: %s; give one that a batch can keep, "
                "or leave it out",
                reason,
            )

    def _log_shadow(self, shadow: ShadowedPolicy) -> None:
        """What the shadow would have applied; once, why it ended."""
        limits, decision = shadow.limits, shadow.decision
        if shadow.failure is not None:
            if not self._told_shadow_failure:
                self._told_shadow_failure = True
                logger.warning(
                    "batchpilot: the shadow %s has failed and is left out from now on; the "
                    "steering goes on (%s)",
                    self._settings.shadow,
                    shadow.failure,
                )
        elif limits is not None and decision is not None:
            steps = sum(shadow.agreement.values())
            logger.info(
                "batchpilot: the shadow %s would have max_num_seqs %d (%s), "
                "max_num_batched_tokens %d; the same limits in %.0f%% of %d steps",
                self._settings.shadow,
                limits.max_num_seqs,
                decision.reason,
                limits.max_num_batched_tokens,
                100 * shadow.agreement[Agreement.SAME] / steps,
                steps,
            )
