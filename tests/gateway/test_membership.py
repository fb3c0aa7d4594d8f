"""Engines that a DNS name stands for: they come, and leave without a failed request."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reft_serve.errors import ServiceError
from reft_serve.gateway.engines.discovery import Discovery
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served
from tests.support.waiting import wait_for

NAME = "engines.reft.test"


class Zone:
    """What the resolver says of NAME: addresses, or an error."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.error: int | None = None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        real = socket.getaddrinfo

        def answer(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
            if host != NAME:
                return real(host, port, *rest, **options)
            if self.error is not None or not self.addresses:
                raise socket.gaierror(self.error or socket.EAI_NONAME, "no such name")
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
                for address in self.addresses
            ]

        patch.setattr(socket, "getaddrinfo", answer)


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Zone:
    made = Zone()
    made.install(monkeypatch)
    return made


@contextlib.contextmanager
def replicas(count: int) -> Iterator[tuple[int, list[FakeEngine], list[Served]]]:
    """Engines on one port of several loopback addresses, as pods are."""
    fakes = [FakeEngine() for _ in range(count)]
    served = [Served(fakes[0].app)]
    try:
        served += [
            Served(fake.app, f"127.0.0.{k + 1}", served[0].port)
            for k, fake in enumerate(fakes[1:], 1)
        ]
        yield served[0].port, fakes, served
    finally:
        for each in served:
            each.stop()


def test_engines_come_with_the_name_and_leave_when_their_last_answer_has_ended(
    tmp_path: Path, zone: Zone
) -> None:
    with replicas(2) as (port, (first, second), _):
        gateway = Gateway(tmp_path, f"dns+http://{NAME}:{port}")
        try:
            tenant = gateway.tenant("acme")
            assert gateway.http(None).get("/health/ready").status_code == 503
            zone.addresses = ["127.0.0.1"]
            wait_for(lambda: gateway.http(None).get("/health/ready").status_code == 200)
            assert tenant.upload("birds").status_code == 201
            first.token_seconds = 0.05
            streaming = tenant.openai.completions.create(
                model="birds", prompt="x", max_tokens=20, stream=True
            )
            next(streaming)
            zone.addresses = ["127.0.0.2"]
            wait_for(
                lambda: (
                    [e["name"] for e in engines(gateway)] == ["engine-1"]
                    and engines(gateway)[0]["healthy"]
                )
            )
            before = first.counts["requests"]
            assert all(tenant.say("birds", max_tokens=1) for _ in range(5))
            assert (first.counts["requests"], second.counts["requests"]) == (before, 5)
            assert len(list(streaming)) == 19
        finally:
            gateway.stop()


def test_a_resolver_in_trouble_takes_no_engine_away(tmp_path: Path, zone: Zone) -> None:
    with replicas(1) as (port, (engine,), _):
        zone.addresses = ["127.0.0.1"]
        gateway = Gateway(tmp_path, f"dns+http://{NAME}:{port}")
        try:
            tenant = gateway.tenant("acme")
            zone.error = socket.EAI_AGAIN
            probes = engine.counts["health"]
            wait_for(lambda: engine.counts["health"] > probes + 2)
            assert tenant.say("base", max_tokens=1)
            zone.error, zone.addresses = None, []
            wait_for(lambda: not engines(gateway))
            assert gateway.http(None).get("/health/ready").status_code == 503
        finally:
            gateway.stop()


def test_names_and_fixed_engines_go_together_and_the_real_resolver_is_asked(tmp_path: Path) -> None:
    with replicas(1) as (port, _, _):
        gateway = Gateway(tmp_path, f"http://127.0.0.1:{port},dns+http://localhost:{port}")
        try:
            healthy = [e for e in engines(gateway) if e["healthy"]]
            # the same address is the same engine
            assert [e["name"] for e in healthy] == ["engine-0"]
        finally:
            gateway.stop()


@pytest.mark.parametrize(
    "url", ["dns+http://name", "dns+https://name:1", "dns+http://:8000", "dns+http://a:x", "dns+"]
)
def test_a_name_that_cannot_be_looked_up_is_told_at_start(url: str) -> None:
    with pytest.raises(ServiceError, match=r"dns\+http://NAME:PORT"):
        Discovery([url], None)


def engines(gateway: Gateway) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = gateway.admin.get("/v1/admin/engines").json()["data"]
    return found
