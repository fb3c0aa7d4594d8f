"""Test an application against reft-serve without an engine: `FakeEngine` answers vLLM's HTTP API
and computes nothing.

Its `app` is an ASGI application. Hand it to a client in the same process, or serve it with any ASGI
server and name its address in a gateway's `REFT_ENGINES`:

    engine = FakeEngine()
    http = httpx.AsyncClient(transport=httpx.ASGITransport(engine.app))
    client = openai.AsyncOpenAI(api_key="none", base_url="http://engine/v1", http_client=http)
    answer = await client.completions.create(model="/models/fake-base", prompt="Rain is",
        max_tokens=4)
    assert engine.requests[0]["prompt"] == "Rain is"

An answer is numbers that follow from prompt, model and seed, so a test can identify an answer. The
fake behaves as vLLM does in what the gateway relies on: chunks and usage, errors in vLLM's shape,
adapters by name and directory, cancellation. Set the fields of `FakeEngine` to make it slow,
unhealthy or broken.
"""

from __future__ import annotations

from reft_serve.testing.fake_engine import FakeEngine

__all__ = ["FakeEngine"]
