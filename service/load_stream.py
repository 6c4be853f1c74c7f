"""One engine's Tune stream for the load generator: HTTP/2 by hand, over a connection of its own.

gRPC's Python client costs as much for each message as the service does: a generator made of it
would be what is measured on a small machine. This sends the frames that client sends (preface,
HEADERS, DATA with gRPC's five bytes before each message), keeps to the service's flow control and
answers its pings. It knows no TLS, retries or compression, and does not read trailers: a stream
that ends is an error here, and the service's log says why.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_HEADERS, ACK = 4, 1
INITIAL_WINDOW_SIZE = 4
DEFAULT_WINDOW = 65_535
LARGEST_WINDOW = 2**31 - 1
#: The one stream of the connection.
STREAM = 1
ENDINGS = {RST_STREAM: "RST_STREAM", GOAWAY: "GOAWAY", HEADERS: "TRAILERS"}


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2; RFC 9113, section 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def request_headers(authority: str, path: str) -> bytes:
    """The header block of a gRPC call, in HPACK without a table (RFC 7541, section 6.2.2)."""
    return b"".join(
        (
            b"\x83\x86",  # :method POST and :scheme http, of the static table
            b"\x04" + _text(path),
            b"\x01" + _text(authority),
            b"\x0f\x10" + _text("application/grpc"),  # content-type
            b"\x00" + _text("te") + _text("trailers"),
        )
    )


def _text(text: str) -> bytes:
    assert len(text) < 127, text
    return bytes([len(text)]) + text.encode("ascii")


class LoadStream(asyncio.Protocol):
    """A connection with one call on it.

    Args:
        authority: The service's address.
        path: The method.
        heard: Called with every message of the service's.
        ended: Called once, with why, when the stream ends from the other side.
    """

    def __init__(
        self,
        authority: str,
        path: str,
        heard: Callable[[bytes], None],
        ended: Callable[[str], None],
    ) -> None:
        """Knows what to say once it is connected."""
        self._opening = request_headers(authority, path)
        self._heard = heard
        self._ended: Callable[[str], None] | None = ended
        self._transport: asyncio.Transport | None = None
        self._received = b""  # bytes of a frame that has not come whole
        self._message = b""  # bytes of a message that has not come whole
        self._unsent: list[bytes] = []
        self._windows = {0: DEFAULT_WINDOW, STREAM: DEFAULT_WINDOW}
        self._initial_window = DEFAULT_WINDOW

    @property
    def is_open(self) -> bool:
        """Whether the stream stands."""
        return self._transport is not None and self._ended is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Opens the call."""
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, LARGEST_WINDOW)
        more = struct.pack(">I", LARGEST_WINDOW - DEFAULT_WINDOW)
        transport.write(
            PREFACE
            + frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW_UPDATE, 0, 0, more)
            + frame(HEADERS, END_HEADERS, STREAM, self._opening)
        )

    def connection_lost(self, error: Exception | None) -> None:
        """The service, or this side, has hung up."""
        self._end("CONNECTION")

    def send(self, message: bytes) -> None:
        """Sends a message now, or when the service has room for it."""
        self._unsent.append(struct.pack(">BI", 0, len(message)) + message)
        self._send_what_fits()

    def close(self) -> None:
        """Hangs up; `ended` is not called any more."""
        self._ended = None
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Takes in what has come, frame by frame."""
        data = self._received + data
        at = 0
        while len(data) - at >= 9:
            ends = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if ends > len(data):
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big") & LARGEST_WINDOW
            self._take(data[at + 3], data[at + 4], stream, data[at + 9 : ends])
            at = ends
        self._received = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            self._take_data(payload)
        elif kind == WINDOW_UPDATE:
            self._windows[stream] += int.from_bytes(payload, "big") & LARGEST_WINDOW
            self._send_what_fits()
        elif kind == PING and not flags & ACK:
            self._write(frame(PING, ACK, 0, payload))
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
        elif kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & 1):
            self._end(ENDINGS[kind])

    def _take_data(self, payload: bytes) -> None:
        self._message += payload
        while len(self._message) >= 5:
            ends = 5 + int.from_bytes(self._message[1:5], "big")
            if ends > len(self._message):
                return
            message, self._message = self._message[5:ends], self._message[ends:]
            self._heard(message)

    def _take_settings(self, payload: bytes) -> None:
        for at in range(0, len(payload), 6):
            name, value = struct.unpack_from(">HI", payload, at)
            if name == INITIAL_WINDOW_SIZE:
                self._windows[STREAM] += value - self._initial_window
                self._initial_window = value
        self._write(frame(SETTINGS, ACK, 0, b""))

    def _send_what_fits(self) -> None:
        windows = self._windows
        while self._unsent and len(self._unsent[0]) <= min(windows[0], windows[STREAM]):
            payload = self._unsent.pop(0)
            windows[0] -= len(payload)
            windows[STREAM] -= len(payload)
            self._write(frame(DATA, 0, STREAM, payload))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _end(self, why: str) -> None:
        if self._ended is not None:
            ended, self._ended = self._ended, None
            ended(why)
