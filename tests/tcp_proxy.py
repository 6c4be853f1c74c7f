"""A TCP proxy that a test can cut, freeze, slow down and spoil."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress


class Proxy:
    """Forwards connections to `upstream`, as long as nothing is wrong with the network.

    Attributes:
        port: Where it listens.
        upstream: Port of this machine it forwards to.
        is_open: Whether it takes connections; what it does not take, it closes.
        is_frozen: Whether bytes stop on their way; they go on when it thaws.
        delay_seconds: How long every byte is on its way.
        garbles: Whether answers are spoiled.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.is_open = True
        self.is_frozen = False
        self.delay_seconds = 0.0
        self.garbles = False
        self.port = 0
        self._chance = random.Random(0)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="proxy")
        self._thread.start()
        self._ready.wait()

    def cut(self) -> None:
        """Ends every connection and takes no new one."""
        self.is_open = False
        self.drop()

    def drop(self) -> None:
        """Ends every connection."""
        self._loop.call_soon_threadsafe(self._drop)

    def heal(self) -> None:
        """Everything is well again."""
        self.is_open, self.is_frozen, self.garbles, self.delay_seconds = True, False, False, 0.0

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.run_until_complete(self._end_tasks())
            self._loop.close()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _drop(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connection, "127.0.0.1", 0)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open:
            writer.transport.abort()
            return
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, forth}
        with suppress(asyncio.CancelledError):  # at the end; Python 3.11 would log it
            await asyncio.gather(self._pump(reader, forth, False), self._pump(back, writer, True))
        self._writers -= {writer, forth}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.create_task(self._send(queue, writer, answers))
        try:
            while chunk := await reader.read(65536):
                queue.put_nowait((self._loop.time() + self.delay_seconds, chunk))
        except OSError:
            pass
        queue.put_nowait((self._loop.time() + self.delay_seconds, b""))
        await sender

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, answers: bool
    ) -> None:
        while True:
            due, chunk = await queue.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            while self.is_frozen:
                await asyncio.sleep(0.01)
            if not chunk or writer.transport.is_closing():
                writer.transport.abort()
                return
            if answers and self.garbles:
                chunk = self._garbled(chunk)
            writer.write(chunk)

    def _garbled(self, chunk: bytes) -> bytes:
        """The bytes with about one in eight replaced at random."""
        chance = self._chance
        return bytes(chance.randrange(256) if chance.random() < 0.125 else b for b in chunk)
