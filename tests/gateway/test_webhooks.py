"""Webhooks, by the `openai` client: endpoints, signatures, retries, and where events may not go."""

from __future__ import annotations

import http.server
import ipaddress
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from reft_serve.config import GatewaySettings
from reft_serve.database.outcomes import Cancelled, Failed
from reft_serve.errors import RequestInvalid
from reft_serve.gateway.notifying import _check_address, check_url
from tests.gateway.fake_worker import FakeWorker
from tests.gateway.harness import Gateway, Tenant, running
from tests.gateway.test_files import upload
from tests.gateway.test_inference import wait_for

ALL: list[Any] = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


class Receiver:
    """An HTTP server that keeps what it gets and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(outer.answers.pop(0) if outer.answers else 200)
                self.send_header("location", outer.url + "/elsewhere")
                self.end_headers()
                self.wfile.write(b"x" * 100_000)

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def lax(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose webhooks may go to loopback."""
    settings: dict[str, Any] = {"webhooks_to_private_addresses": True, "webhook_retry_seconds": 0.05}
    with running(tmp_path_factory.mktemp("webhooks"), **settings) as (gateway, _):
        yield gateway


def end_one(tenant: Tenant, how: str) -> str:
    job = tenant.openai.fine_tuning.jobs.create(model="base", training_file=upload(tenant).id)
    worker = FakeWorker(tenant.gateway.settings)
    if how == "waiting":
        tenant.openai.fine_tuning.jobs.cancel(job.id)
    elif how == "succeeded":
        worker.succeed(worker.claim())
    else:
        worker.finish(worker.claim(), Failed("x", "y") if how == "failed" else Cancelled())
    return job.id


def test_each_end_of_a_job_is_told_and_signed(lax: Gateway, receiver: Receiver) -> None:
    tenant = lax.tenant("told")
    made = tenant.openai.webhooks.create(name="all", url=receiver.url + "/hook?a=b", event_types=ALL)
    tenant.openai.webhooks.create(name="bad news", url=receiver.url + "/bad", event_types=["fine_tuning.job.failed"])
    expected = []
    for how in ("succeeded", "failed", "cancelled", "waiting"):
        kind = f"fine_tuning.job.{'cancelled' if how == 'waiting' else how}"
        expected += [(kind, end_one(tenant, how))] * (2 if how == "failed" else 1)
    wait_for(lambda: len(receiver.got) == 5, 10)
    seen = []
    for headers, body in receiver.got:
        if "fine_tuning.job.failed" not in body.decode():
            event: Any = tenant.openai.webhooks.unwrap(body, headers, secret=made.signing_secret)
            seen.append((event.type, event.data.id))
            assert event.object == "event"
            with pytest.raises(openai.InvalidWebhookSignatureError):
                tenant.openai.webhooks.unwrap(body + b" ", headers, secret=made.signing_secret)
    assert sorted(seen) == sorted(pair for pair in expected if "failed" not in pair[0])
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 5
    metrics = lax.admin.get("/metrics").text
    assert 'reft_webhook_deliveries_total{result="delivered"} 5.0' in metrics


def test_an_event_is_sent_again_until_it_is_taken_with_the_same_id(lax: Gateway, receiver: Receiver) -> None:
    tenant = lax.tenant("patient")
    made = tenant.openai.webhooks.create(name="w", url=receiver.url, event_types=ALL)
    receiver.answers = [500, 302, 429]
    end_one(tenant, "failed")
    wait_for(lambda: len(receiver.got) == 4, 15)
    assert len({(headers["webhook-id"], body) for headers, body in receiver.got}) == 1
    for headers, body in receiver.got:
        tenant.openai.webhooks.unwrap(body, headers, secret=made.signing_secret)
    receiver.answers = [410]
    end_one(tenant, "failed")
    wait_for(lambda: len(receiver.got) == 5, 10)
    tenant.openai.webhooks.delete(made.id)
    end_one(tenant, "failed")
    wait_for(lambda: "given_up" in lax.admin.get("/metrics").text)
    assert len(receiver.got) == 5


def test_endpoints_are_made_listed_changed_rotated_and_deleted(lax: Gateway, receiver: Receiver) -> None:
    tenant, other = lax.tenant("owner"), lax.tenant("other")
    client = tenant.openai.webhooks
    made = [client.create(name=f"w{k}", url=receiver.url, event_types=ALL) for k in range(3)]
    secret = made[0].signing_secret
    assert made[0].signing_secret_hint not in ("", secret)
    page = client.list(limit=2)
    assert page.has_more
    assert [each.id for each in page] == [each.id for each in made[::-1]]
    assert secret not in "".join(each.to_json() for each in client.list())
    assert secret not in tenant.http.get("/v1/audit").text
    changed = client.update(made[0].id, name="new", event_types=["fine_tuning.job.failed", "fine_tuning.job.failed"])
    assert (changed.name, changed.event_types, changed.url) == ("new", ["fine_tuning.job.failed"], receiver.url)
    rotated = client.rotate_secret(made[0].id, keep_old_secret_active_for_24_hours=True)
    result = client.test(made[0].id, event_type="fine_tuning.job.failed")
    assert (result.status_code, result.success) == (200, True)
    headers, body = receiver.got[-1]
    for signing in (secret, rotated.signing_secret):
        client.unwrap(body, headers, secret=signing)
    again = client.rotate_secret(made[0].id)
    client.test(made[0].id, event_type="fine_tuning.job.failed")
    headers, body = receiver.got[-1]
    client.unwrap(body, headers, secret=again.signing_secret)
    for signing in (secret, rotated.signing_secret):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.unwrap(body, headers, secret=signing)
    assert client.event_types.list().data == ALL
    theirs = other.openai.webhooks
    acts: list[Callable[[], object]] = [
        lambda: theirs.retrieve(made[0].id), lambda: theirs.update(made[0].id, name="x"),
        lambda: theirs.rotate_secret(made[0].id), lambda: theirs.delete(made[0].id),
        lambda: theirs.test(made[0].id, event_type="fine_tuning.job.failed"),
    ]  # fmt: skip
    for act in acts:
        with pytest.raises(openai.NotFoundError):
            act()
    gone = client.delete(made[0].id)
    assert (gone.deleted, gone.object) == (True, "webhook_endpoint.deleted")
    receiver.stop()
    with pytest.raises(openai.BadRequestError, match="could not be reached: the connection failed"):
        client.test(made[1].id, event_type="fine_tuning.job.failed")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "https://127.0.0.1/", "https://10.0.0.1/", "https://169.254.169.254/latest", "https://[::1]/",
        "https://[::ffff:127.0.0.1]/", "https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/", "https://0.0.0.0/",
        "https://224.0.0.1/", "https://user:word@example.com/", "https://:443/", "https://x:99999/", "ftp://example.com/",
        "https://[fe80::1]/", "https://100.64.0.1/", f"https://{'a' * 64}.example/", "https://a..example/",
    ],
)  # fmt: skip
def test_a_url_that_is_not_public_is_refused(tenant: Tenant, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tenant.openai.webhooks.create(name="w", url=url, event_types=ALL)
    assert caught.value.param in ("url", None)
    made = tenant.openai.webhooks.create(name="w", url="https://example.com/", event_types=ALL)
    with pytest.raises(openai.BadRequestError):
        tenant.openai.webhooks.update(made.id, url=url)


def test_a_name_that_stands_for_a_private_address_is_not_sent_to(tenant: Tenant, receiver: Receiver) -> None:
    """`localhost` is a name: only its address tells, and it is asked for at each attempt."""
    port = receiver.url.rpartition(":")[2]
    made = tenant.openai.webhooks.create(name="w", url=f"https://localhost:{port}/", event_types=ALL)
    with pytest.raises(openai.BadRequestError, match="public addresses only"):
        tenant.openai.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert receiver.got == []


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_taken(address: str) -> None:
    settings = GatewaySettings()
    _check_address(ipaddress.ip_address(address), settings)
    check_url(f"https://[{address}]/" if ":" in address else f"https://{address}/", settings)
    with pytest.raises(RequestInvalid):
        check_url(f"http://{address}/", settings)


def test_only_owners_have_webhooks_and_not_without_end(make_tenant: Callable[..., Tenant]) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        make_tenant(role="inference").openai.webhooks.list()
    tenant = make_tenant()
    for _ in range(20):
        tenant.openai.webhooks.create(name="w", url="https://example.com/", event_types=ALL)
    with pytest.raises(openai.BadRequestError, match="20 webhooks"):
        tenant.openai.webhooks.create(name="w", url="https://example.com/", event_types=ALL)
