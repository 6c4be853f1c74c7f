"""The one place where what goes wrong in a call becomes a gRPC status.

Handlers raise `RefusalError`; whatever else escapes them is a fault of ours: logged, counted as
INTERNAL, and told to the caller without its details.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc

from batchpilot.service.meters import Meters
from batchpilot.service.validation import ReportError

logger = logging.getLogger("batchpilot.service")

#: A status travels in headers, which are short.
LONGEST_TEXT = 1000
#: The reason of streams that end because the service does.
STOPPING = "stopping"


class RefusalError(Exception):
    """A call, or what it asked for, that is refused.

    Attributes:
        code: The status it ends with.
        reason: A short constant for metrics.
    """

    def __init__(self, code: grpc.StatusCode, reason: str, text: str) -> None:
        """Keeps what the caller and the metrics are told."""
        super().__init__(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...")
        self.code = code
        self.reason = reason


@contextmanager
def refusals() -> Iterator[None]:
    """Turns every exception but a cancellation into a `RefusalError`.

    Raises:
        RefusalError: Whatever went wrong.
    """
    try:
        yield
    except RefusalError:
        raise
    except ReportError as error:
        raise RefusalError(
            grpc.StatusCode.INVALID_ARGUMENT, "invalid_message", str(error)
        ) from None
    except Exception as error:
        logger.exception("a call failed in the service's own code")
        raise RefusalError(
            grpc.StatusCode.INTERNAL, "internal", "internal error; see the service's log"
        ) from error


@asynccontextmanager
async def answering(method: str, context: Any, meters: Meters) -> AsyncIterator[None]:
    """Around a handler: a refusal ends the call with its status, and is counted."""
    try:
        with refusals():
            yield
    except RefusalError as refusal:
        telling = meters.refused(method, refusal.code.name, refusal.reason)
        if telling and refusal.reason != STOPPING:  # every stream's end is no news then
            logger.warning("%s from %s: %s: %s", method, context.peer(), refusal.code.name, refusal)
        await context.abort(refusal.code, str(refusal))
