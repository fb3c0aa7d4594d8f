"""A gateway and fake engines on loopback, each a real HTTP server in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from reft_serve.config import GatewaySettings
from reft_serve.database import keys, tenants
from reft_serve.database.connection import Database
from reft_serve.database.migrations.schema import migrate
from reft_serve.gateway.app import create_app
from reft_serve.gateway.http.connections import Connections, protocol_of
from reft_serve.interventions.vocabulary import required_tensors
from reft_serve.testing import FakeEngine
from tests.support.databases import new_sqlite

ADMIN = "operator"


class Served:
    """An ASGI application behind uvicorn, in a thread with an event loop of its own."""

    def __init__(
        self, app: Any, host: str = "127.0.0.1", port: int = 0, http: Any = "auto"
    ) -> None:
        self.app = app
        # Without its protocol asyncio would leave Nagle on, and every answer would wait 40 ms.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind((host, port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        config = uvicorn.Config(
            app,
            log_level="error",
            lifespan="on",
            timeout_graceful_shutdown=2,
            log_config=None,
            http=http,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.01)

    def _run(self) -> None:
        asyncio.run(self._server.serve([self._socket]))

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(15)
        self._socket.close()


class Gateway:
    """A running gateway, with an admin's key and helpers to make tenants of it."""

    def __init__(
        self, folder: Path, engines: Mapping[str, FakeEngine] | str, **settings: Any
    ) -> None:
        self.folder = folder
        urls = engines if isinstance(engines, str) else ",".join(engines)
        given: dict[str, Any] = {
            "database": f"sqlite:///{folder / 'reft.db'}",
            "store": folder / "store",
            "gateway_name": "test",
        }
        self.settings = GatewaySettings(
            **(given | {"engines": urls, "probe_seconds": 0.2} | settings)
        )
        self.admin_key = asyncio.run(first_key(self.settings.database))
        self.served = Served(
            create_app(self.settings), http=protocol_of(Connections(self.settings))
        )
        self.url = self.served.url
        self.admin = self.http(self.admin_key)

    def http(self, key: str | None, **options: Any) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=30, trust_env=False, **options
        )

    def openai(self, key: str) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, http_client=http
        )

    def tenant(
        self, name: str, role: str = "owner", limits: dict[str, Any] | None = None
    ) -> Tenant:
        made = self.admin.post("/v1/admin/tenants", json={"name": name, "limits": limits or {}})
        assert made.status_code in (201, 409), made.text
        found = self.admin.get(f"/v1/admin/tenants/{name}").json()
        key = self.admin.post(f"/v1/admin/tenants/{name}/keys", json={"role": role})
        assert key.status_code == 201, key.text
        return Tenant(self, found["id"], name, key.json()["secret"])

    def stop(self) -> None:
        self.admin.close()
        self.served.stop()


class Tenant:
    """A tenant of a running gateway, acting with one of its keys."""

    def __init__(self, gateway: Gateway, id_: str, name: str, key: str) -> None:
        self.gateway, self.id, self.name, self.key = gateway, id_, name, key
        self.http = gateway.http(key)
        self.openai = gateway.openai(key)

    def upload(self, name: str, seed: int = 0, **form: str) -> httpx.Response:
        parts = [("files", (file, content)) for file, content in adapter_files(seed).items()]
        return self.http.post("/v1/adapters", data={"name": name, **form}, files=parts)

    def say(self, model: str, prompt: str = "hello there", **options: Any) -> str:
        return self.openai.completions.create(model=model, prompt=prompt, **options).choices[0].text


@contextmanager
def running(
    folder: Path, engines: int = 1, **settings: Any
) -> Iterator[tuple[Gateway, list[FakeEngine]]]:
    """A gateway over some fake engines."""
    fakes = [FakeEngine() for _ in range(engines)]
    with ExitStack() as stack:
        served = [Served(fake.app) for fake in fakes]
        for each in served:
            stack.callback(each.stop)
        gateway = Gateway(
            folder, {each.url: fake for each, fake in zip(served, fakes, strict=True)}, **settings
        )
        stack.callback(gateway.stop)
        yield gateway, fakes


async def first_key(url: str) -> str:
    if url.startswith("sqlite:"):
        await new_sqlite(url)
    database = Database(url)
    await migrate(database)
    async with database.writing() as session:
        found = [tenant for tenant in await tenants.list_tenants(session) if tenant.name == ADMIN]
        tenant = found[0] if found else await tenants.create_tenant(session, ADMIN)
        _, secret = await keys.create_key(session, tenant, "admin")
    await database.close()
    return secret


def adapter_files(
    seed: int = 0, rank: int = 2, width: int = 8, layers: int = 4
) -> dict[str, bytes]:
    """A sound adapter of a model that does not exist; another one for every seed."""
    manifest = {
        "format_version": 1,
        "base_model": {
            "name": "tiny",
            "architecture": "LlamaForCausalLM",
            "hidden_size": width,
            "num_hidden_layers": layers,
        },
        "interventions": [
            {"layer": 1, "component": "block_output", "kind": "loreft", "rank": rank}
        ],
        "positions": {"spec": "f1+l1"},
        "provenance": {"seed": seed},
    }
    header, at, body = {}, 0, b""
    for name in required_tensors("loreft"):
        shape = [rank] if name == "b" else [rank, width]
        size = 4 * rank * (1 if name == "b" else width)
        header[f"interventions.0.{name}"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at, body = at + size, body + bytes([seed % 251 or 1]) * size
    text = json.dumps(header).encode()
    tensors = len(text).to_bytes(8, "little") + text + body
    return {"reft_config.json": json.dumps(manifest).encode(), "reft_model.safetensors": tensors}


def take(stream: Iterable[Any], into: list[Any]) -> None:
    for chunk in stream:
        into.append(chunk)


def usage_of(tenant: Tenant, *groups: str) -> list[dict[str, Any]]:
    query = "&".join(f"group_by={group}" for group in groups)
    found: list[dict[str, Any]] = tenant.http.get(f"/v1/usage?{query}").json()["data"]
    return found


def operations(gateway: Gateway) -> list[tuple[str, str]]:
    document = gateway.served.app.openapi()
    return [(method, path) for path, item in document["paths"].items() for method in item]
