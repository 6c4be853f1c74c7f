"""Health, which anybody may ask for: so it must not take the calls that engines need."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from batchpilot.service.meters import Meters
from batchpilot.service.refusals import RefusalError, answering

#: Streams at once that wait for a change of health: a balancer or two; engines have none.
MOST_WATCHERS = 64


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """gRPC's own, with so many who watch at once.

    Args:
        meters: Counts refusals.
    """

    def __init__(self, meters: Meters) -> None:
        """Starts without watchers."""
        super().__init__()
        self._meters = meters
        self._watchers = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Streams changes until the caller has enough."""
        async with answering("Watch", context, self._meters):
            if self._watchers >= MOST_WATCHERS:
                raise RefusalError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "too_many_watchers",
                    f"{MOST_WATCHERS} streams watch this service's health; call Check",
                )
        self._watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watchers -= 1
