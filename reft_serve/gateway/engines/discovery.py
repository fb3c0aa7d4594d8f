"""Which engines there are: those that the settings name, and those that a DNS name stands for now.

A headless Service of Kubernetes answers with the addresses of the pods that are ready. An address
that is not among them any more gets no new request, and its connections are closed when the last
answer has ended: so engines come and go under load.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from itertools import count
from urllib.parse import urlsplit

from reft_serve.errors import ServiceError
from reft_serve.gateway.engines.engine import Engine
from reft_serve.gateway.engines.urls import without_password

__all__ = ["Discovery"]

_log = logging.getLogger(__name__)
_DNS = "dns+"
# longer than whatever is asked of an engine in addition to requests, which are counted
_LEAVE_SECONDS = 60.0
# The resolver's own words for "there is no such name, or nothing behind it"; all else is a resolver
# in trouble.
_NOBODY = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


class Discovery:
    """The engines, made once for each address and kept as long as it is there."""

    def __init__(self, urls: Sequence[str], key: str | None) -> None:
        """Look nothing up yet.

        Args:
            urls: `http://HOST:PORT`, `unix:/PATH`, or `dns+http://NAME:PORT` for every address of
                NAME.
            key: the key that engines ask for.

        Raises:
            ServiceError: a URL of a DNS name has no port.
        """
        self._key = key
        self._names = [_checked(url) for url in urls if url.startswith(_DNS)]
        self._resolved: dict[str, tuple[str, ...]] = {}
        self._engines: dict[str, Engine] = {}
        self._leaving: dict[Engine, float] = {}
        self._fixed = tuple(url for url in urls if not url.startswith(_DNS))
        for url in self._fixed:
            self._add(url)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that may be given requests."""
        return tuple(self._engines.values())

    async def refresh(self) -> None:
        """Ask for the names' addresses, and let in who has come."""
        for name in self._names:
            await self._resolve(name)
        for url in self._wanted:
            if url not in self._engines:
                self._add(url)

    async def prune(self) -> None:
        """Drop engines that are no longer listed. Call after probing new ones, so that the fleet is
        never briefly empty.
        """
        for url in [url for url in self._engines if url not in self._wanted]:
            engine = self._engines.pop(url)
            _log.info("an engine was removed", extra={"data": {"engine": engine.state.url}})
            self._leaving[engine] = time.monotonic() + _LEAVE_SECONDS
        for engine in [
            gone
            for gone, at in self._leaving.items()
            if not gone.in_flight and at < time.monotonic()
        ]:
            del self._leaving[engine]
            await engine.close()

    @property
    def _wanted(self) -> dict[str, None]:
        return dict.fromkeys(
            [*self._fixed, *(url for urls in self._resolved.values() for url in urls)]
        )

    async def close(self) -> None:
        await asyncio.gather(
            *(engine.close() for engine in (*self._engines.values(), *self._leaving))
        )

    def _add(self, url: str) -> None:
        taken = {engine.name for engine in (*self._engines.values(), *self._leaving)}
        number = next(number for number in count() if f"engine-{number}" not in taken)
        self._engines[url] = Engine(number, url, self._key)

    async def _resolve(self, name: str) -> None:
        parts = urlsplit(name)
        try:
            answers = await asyncio.to_thread(
                socket.getaddrinfo, parts.hostname, parts.port, type=socket.SOCK_STREAM
            )
        except socket.gaierror as exc:
            if exc.errno in _NOBODY:
                self._resolved[name] = ()
            else:  # who is known stays: engines do not end because a resolver does
                _log.warning(
                    "the engines' host name cannot be resolved",
                    extra={"data": {"name": parts.hostname, "reason": str(exc)}},
                )
            return
        hosts = sorted({str(address[0]) for *_, address in answers})
        self._resolved[name] = tuple(
            f"{parts.scheme}://{_bracketed(host)}:{parts.port}" for host in hosts
        )


def _checked(url: str) -> str:
    plain = url.removeprefix(_DNS)
    try:
        parts = urlsplit(plain)
        sound = parts.scheme == "http" and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:
        sound = False
    if not sound:
        shown = without_password(url)[:200]
        raise ServiceError(f"REFT_ENGINES: {shown!r} is not dns+http://NAME:PORT")
    return plain


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
