"""A Service as a cluster has it: connections go to backends that are ready, and what is ready is
noticed a little late.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time

NOTICED_SECONDS = 0.2


class Balancer:
    """Passes each connection on to one ready backend, byte by byte. It tries once: what fails there
    fails for the caller.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turns = itertools.count()
        self._ports: set[int] = set()
        self._ready: list[int] = []
        self._listening = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._listening.wait(10)
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, port: int) -> None:
        """Look at a backend from now on, and return when it gets connections."""
        self._ports = {*self._ports, port}
        deadline = time.monotonic() + 60
        while port not in self._ready:
            assert time.monotonic() < deadline, "the backend does not become ready"
            time.sleep(0.05)

    def remove(self, port: int) -> None:
        """Forget a backend."""
        self._ports = self._ports - {port}

    def stop(self) -> None:
        """Accept nothing more."""
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._ending = asyncio.Event()
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        looking = asyncio.create_task(self._look())
        self._listening.set()
        await self._ending.wait()
        looking.cancel()
        server.close()

    async def _look(self) -> None:
        while True:
            self._ready = [port for port in sorted(self._ports) if await _is_ready(port)]
            await asyncio.sleep(NOTICED_SECONDS)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, IndexError):
            port = self._ready[next(self._turns) % len(self._ready)] if self._ready else -1
            if port > 0:
                theirs, ours = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(_pipe(reader, ours), _pipe(theirs, writer))
        writer.close()


async def _pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await source.read(65536):
            target.write(chunk)
            await target.drain()
    target.close()


async def _is_ready(port: int) -> bool:
    """As a readiness probe: any trouble is a no."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        status = await asyncio.wait_for(reader.readline(), 3)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return b" 200 " in status
