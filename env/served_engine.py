"""A running vLLM server as an engine: seen, shadowed or steered through its tuning service.

The server's users bring the requests, so that nothing is added or stepped here: time passes by
itself, and each interval brings the telemetry that the server's hook reported meanwhile. Limits go
the way all limits go: the service leases them to the hook, whose shield has the last word.

This file speaks the wire contract as any client does; it imports nothing of the service.
"""

from __future__ import annotations

import functools
import operator
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from batchpilot.agents.features import LatencyTargets
from batchpilot.agents.kv_growth import EVERY_TOKEN, KvGrowth
from batchpilot.agents.limits import BatchLimits, Binding, EngineFacts
from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.agents.telemetry import TelemetryWindow
from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.protos.batchpilot.v1.tuner_pb2_grpc import PolicyServiceStub, TunerServiceStub

#: Least the service allows; below most report intervals, so that no report is missed.
_WATCH_MS = 200
_CALL_SECONDS = 10.0
_BINDINGS = {
    pb.BINDING_KV_CACHE: Binding.KV_CACHE,
    pb.BINDING_MAX_NUM_SEQS: Binding.MAX_NUM_SEQS,
    pb.BINDING_TOKEN_BUDGET: Binding.TOKEN_BUDGET,
}


class ServedEngineError(RuntimeError):
    """The engine or its service cannot be reached or does not allow it; the text says which."""


@dataclass(frozen=True)
class ServedEngineConfig(Parameters):
    """Which engine, by which service, and what may be done to it."""

    target: str = parameter("localhost:50061", help="the tuning service, HOST:PORT")
    group: str = parameter("default", help="the engine's group")
    engine: str | None = parameter(None, help="its name; None: the only one of the group")
    mode: str = parameter(
        "observe",
        choices=("observe", "shadow", "steer"),
        help="observe: only look; shadow: keep what would be applied; steer: apply it",
    )
    ca_file: str | None = parameter(None, help="PEM certificates to check the service's by")
    token_file: str | None = parameter(
        None, help="bearer token: of a viewer, or of an admin to steer"
    )
    hold_seconds: float = parameter(
        30.0, above=0, maximum=3600, help="how long limits hold without newer ones, when steering"
    )
    patience_seconds: float = parameter(
        30.0, above=0, help="longest time without a report, as of an idle engine"
    )


class ServedEngine:
    """One engine of a running server.

    To steer it, its group is held at fixed limits: it must be the group's only engine. Closing ends
    that, and so does an agent that is killed or asks for nothing new: limits hold for
    `hold_seconds`. The group's policy and history are not touched.

    Args:
        config: Which engine, and what may be done.

    Raises:
        ConfigError: A file that cannot be read.
        ServedEngineError: No such engine, more than one, or the service refuses.
    """

    def __init__(self, config: ServedEngineConfig) -> None:
        """Finds the engine and begins to watch it."""
        self.config = config
        self.shadow_limits: BatchLimits | None = None
        self._metadata = _metadata(config)
        self._channel = _channel(config)
        self._tuner = TunerServiceStub(self._channel)
        self._policies = PolicyServiceStub(self._channel)
        self._reports: queue.SimpleQueue[pb.EngineStatus | str] = queue.SimpleQueue()
        self._newest = b""
        self._held_at: str | None = None
        try:
            self._status = self._find()
        except BaseException:
            self._channel.close()
            raise
        self._watch: Any = self._tuner.WatchEngine(
            pb.WatchEngineRequest(
                group=config.group, engine=self._status.id.engine, interval_ms=_WATCH_MS
            ),
            metadata=self._metadata,
        )
        self._thread = threading.Thread(target=self._read, name="served-engine", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The engine's name in its group."""
        return str(self._status.id.engine)

    @property
    def facts(self) -> EngineFacts:
        """What does not change while it runs."""
        facts = self._status.hello.facts
        return EngineFacts(
            startup_limits=_limits(facts.startup_limits),
            total_blocks=facts.total_blocks,
            block_size=facts.block_size,
            tokens_per_decode=facts.tokens_per_decode,
            unchunked_prefill_tokens=facts.unchunked_prefill_tokens,
            kv_growth=(
                KvGrowth(facts.kv_growth_share, facts.kv_window_tokens)
                if facts.HasField("kv_growth_share")
                else EVERY_TOKEN
            ),
        )

    @property
    def targets(self) -> LatencyTargets:
        """The latency targets in force: its operator's own, else its group's."""
        status, found = self._status, {}
        for name in ("itl_slo_ms", "ttft_slo_ms"):
            # An older service does not say which are in force.
            source = status if status.HasField(name) else status.hello
            found[name] = getattr(source, name) if source.HasField(name) else None
        return LatencyTargets(**found)

    @property
    def applied_limits(self) -> BatchLimits:
        """The limits in force at its newest report."""
        return _limits(self._status.applied_limits)

    @property
    def source(self) -> str:
        """Who decided them."""
        return str(self._status.source)

    @property
    def binding(self) -> Binding:
        """What kept the next request out of its newest step."""
        return _BINDINGS.get(self._status.binding, Binding.NONE)

    def apply(self, limits: BatchLimits) -> None:
        """Asks for limits: applied when steering, kept as `shadow_limits` otherwise.

        When steering, reports that came since the last `collect` are dropped: they tell of former
        limits, and would be taken for what came of these.

        They are in force with the engine's next report, for `hold_seconds` at most, and pass the
        service's shield and its own.

        Raises:
            ServedEngineError: The service refuses.
        """
        self.shadow_limits = limits
        if self.config.mode == "steer":
            self._forget_waiting()
            self._held_at = (
                f"static:max_num_seqs={limits.max_num_seqs}"
                f":max_num_batched_tokens={limits.max_num_batched_tokens}"
            )
            self._hold(self._held_at, self.config.hold_seconds)

    def collect(self, seconds: float) -> TelemetryWindow:
        """Lets time pass and returns what the engine reported meanwhile, as one window.

        Args:
            seconds: How long to collect; it goes on to the first report, if none came by then.

        Raises:
            ServedEngineError: The engine or the service has gone, or nothing came in time.
        """
        ends_at = time.monotonic() + seconds
        gives_up_at = ends_at + self.config.patience_seconds
        windows: list[TelemetryWindow] = []
        while True:
            left = (ends_at if windows else gives_up_at) - time.monotonic()
            try:
                item = self._reports.get(timeout=max(0.0, left))
            except queue.Empty:
                break
            if isinstance(item, str):
                raise ServedEngineError(item)
            self._status = item
            windows.append(_window(item.window))
        if not windows:
            raise ServedEngineError(
                f"{self.config.group}/{self.name} has not reported for "
                f"{seconds + self.config.patience_seconds:g} s; idle engines do not"
            )
        return functools.reduce(operator.add, windows)

    def close(self) -> None:
        """Gives the group back its policy and ends the stream; a second call does nothing."""
        policy, self._held_at = self._held_at, None
        try:
            if policy is not None:
                self._hold(policy, 0.0)
        finally:
            self._watch.cancel()
            self._channel.close()
            self._thread.join(timeout=2)

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes it."""
        self.close()

    def _forget_waiting(self) -> None:
        """Drops the reports that wait: they tell of limits before those now asked for."""
        for _ in range(self._reports.qsize()):
            item = self._reports.get_nowait()
            if isinstance(item, str):  # why nothing more comes: the next to collect hears of it
                self._reports.put(item)
                return
            self._status = item

    def _find(self) -> pb.EngineStatus:
        config = self.config
        answer = self._ask(self._tuner.ListEngines, pb.ListEnginesRequest(group=config.group))
        names = ", ".join(e.id.engine for e in answer.engines) or "none"
        found = [e for e in answer.engines if config.engine in (None, e.id.engine)]
        if len(found) != 1:
            raise ServedEngineError(
                f"group {config.group!r} has {len(found)} engines that fit; it has: {names}"
            )
        if config.mode == "steer" and len(answer.engines) > 1:
            raise ServedEngineError(
                f"to steer {found[0].id.engine}, give it a group of its own (service_group): "
                f"{config.group!r} has {names}"
            )
        status: pb.EngineStatus = found[0]
        return status

    def _hold(self, policy: str, seconds: float) -> None:
        request = pb.PromotePolicyRequest(
            group=self.config.group, policy=policy, hold_seconds=seconds
        )
        self._ask(self._policies.PromotePolicy, request)

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            raise ServedEngineError(
                f"{self.config.target}: {error.code().name}: {error.details()}"
            ) from None

    def _read(self) -> None:
        """The watcher's thread: each report once."""
        try:
            for response in self._watch:
                if any(gone.engine == self.name for gone in response.gone):
                    self._reports.put(f"{self.config.group}/{self.name} has gone")
                for status in response.engines:
                    content = status.window.SerializeToString()
                    if status.window.seconds > 0 and content != self._newest:
                        self._newest = content
                        self._reports.put(status)
            self._reports.put("the service ended the stream")
        except grpc.RpcError as error:
            self._reports.put(f"{self.config.target}: {error.code().name}: {error.details()}")


def _limits(message: pb.BatchLimits) -> BatchLimits:
    return BatchLimits(message.max_num_seqs, message.max_num_batched_tokens)


def _window(message: pb.TelemetryWindow) -> TelemetryWindow:
    """A window from the wire, whose fields bear the same names."""
    names = (field.name for field in message.DESCRIPTOR.fields)
    sums = {name: getattr(message, name) for name in names if name != "limits"}
    return TelemetryWindow(**sums, limits=_limits(message.limits))


def _channel(config: ServedEngineConfig) -> Any:
    if config.ca_file is None:
        # What is not encrypted goes to the service alone, whatever the environment says of proxies.
        return grpc.insecure_channel(config.target, options=[("grpc.enable_http_proxy", 0)])
    credentials = grpc.ssl_channel_credentials(_content("ca_file", config.ca_file))
    return grpc.secure_channel(config.target, credentials)


def _metadata(config: ServedEngineConfig) -> tuple[tuple[str, str], ...]:
    if config.token_file is None:
        return ()
    token = _content("token_file", config.token_file).decode().strip()
    return (("authorization", f"Bearer {token}"),)


def _content(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path} ({error.strerror})") from None
