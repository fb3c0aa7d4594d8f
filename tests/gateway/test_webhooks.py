"""Webhooks, by the `openai` client: endpoints, signatures, retries, and where events may not go."""

from __future__ import annotations

import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from sqlalchemy import func, insert, select

from reft_serve.config import GatewaySettings
from reft_serve.database.jobs.outcomes import Cancelled, Failed
from reft_serve.database.models import Delivery, now_ms
from reft_serve.database.webhooks import PENDING_PER_WEBHOOK, DueWebhook
from reft_serve.errors import RequestInvalid
from reft_serve.gateway.events.addresses import is_public
from reft_serve.gateway.events.webhook_sender import SENDERS_PER_TENANT, check_url, choose
from reft_serve.gateway.routes.webhooks import TESTS_PER_MINUTE
from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import Gateway, Tenant, running
from tests.support.gateway.uploads import upload
from tests.support.waiting import wait_for

ALL: list[Any] = [
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
]


class Receiver:
    """An HTTP server that keeps what it gets and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.got.append(
                    ({name.lower(): value for name, value in self.headers.items()}, body)
                )
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
    settings: dict[str, Any] = {
        "webhooks_to_private_addresses": True,
        "webhook_retry_seconds": 0.05,
    }
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
    made = tenant.openai.webhooks.create(
        name="all", url=receiver.url + "/hook?a=b", event_types=ALL
    )
    tenant.openai.webhooks.create(
        name="bad news", url=receiver.url + "/bad", event_types=["fine_tuning.job.failed"]
    )
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


def test_an_event_is_sent_again_until_it_is_taken_with_the_same_id(
    lax: Gateway, receiver: Receiver
) -> None:
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


def test_endpoints_are_made_listed_changed_rotated_and_deleted(
    lax: Gateway, receiver: Receiver
) -> None:
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
    changed = client.update(
        made[0].id, name="new", event_types=["fine_tuning.job.failed", "fine_tuning.job.failed"]
    )
    assert (changed.name, changed.event_types, changed.url) == (
        "new",
        ["fine_tuning.job.failed"],
        receiver.url,
    )
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
        "https://[fe80::1]/", "https://100.64.0.1/", "https://[fec0::1]/", "https://[::ffff:0:127.0.0.1]/",
        "https://[::127.0.0.1]/", "https://[64:ff9b:1::a9fe:a9fe]/", "https://192.0.0.192/", "https://168.63.129.16/",
        "https://[fd00:ec2::254]/", "https://100.100.100.200/", "https://[2001::1]/", "https://[2001:db8::1]/",
        "https://[ff0e::1]/", "https://[2002:808:808::1]/", "https://[5f00::1]/", "https://[64:ff9b::a9fe:a9fe]/",
        "https://[::ffff:168.63.129.16]/", "https://198.18.0.1/", "https://255.255.255.255/", "https://8.8.8.8:25/",
        "https://example.com:22/", f"https://{'a' * 64}.example/", "https://a..example/",
    ],
)  # fmt: skip
def test_a_url_that_is_not_public_is_refused(tenant: Tenant, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tenant.openai.webhooks.create(name="w", url=url, event_types=ALL)
    assert caught.value.param in ("url", None)
    made = tenant.openai.webhooks.create(name="w", url="https://example.com/", event_types=ALL)
    with pytest.raises(openai.BadRequestError):
        tenant.openai.webhooks.update(made.id, url=url)


def test_a_name_that_stands_for_a_private_address_is_not_sent_to(
    tenant: Tenant, receiver: Receiver
) -> None:
    """`localhost` is a name: only its address tells, and it is asked for at each attempt."""
    port = receiver.url.rpartition(":")[2]
    made = tenant.openai.webhooks.create(
        name="w", url=f"https://localhost:{port}/", event_types=ALL
    )
    with pytest.raises(openai.BadRequestError, match="only be sent to public addresses"):
        tenant.openai.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert receiver.got == []


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_taken(address: str) -> None:
    settings = GatewaySettings()
    assert is_public(ipaddress.ip_address(address))
    check_url("https://example.com:8443/", settings)
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


def test_a_test_reports_the_answer_and_has_a_limit(lax: Gateway, receiver: Receiver) -> None:
    tenant = lax.tenant("tester")
    made = tenant.openai.webhooks.create(name="w", url=receiver.url, event_types=ALL)
    receiver.answers = [204, 307, 500]
    told = [
        tenant.openai.webhooks.test(made.id, event_type="fine_tuning.job.failed") for _ in range(3)
    ]
    assert [(each.status_code, each.success) for each in told] == [
        (204, True),
        (307, False),
        (500, False),
    ]
    for _ in range(TESTS_PER_MINUTE - 3):
        tenant.openai.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    with pytest.raises(openai.RateLimitError):
        tenant.openai.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert len(receiver.got) == TESTS_PER_MINUTE


@pytest.fixture
def silent() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that takes connections and never answers; its URL, and the connections."""
    listening, taken = socket.create_server(("127.0.0.1", 0), backlog=256), []

    def accept() -> None:
        while True:
            try:
                taken.append(listening.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", taken
    listening.close()
    for each in taken:
        each.close()


def test_silent_endpoints_of_one_tenant_delay_no_other(
    lax: Gateway, receiver: Receiver, silent: tuple[str, list[socket.socket]]
) -> None:
    url, connections = silent
    hostile, victim = lax.tenant("silent"), lax.tenant("victim")
    for k in range(20):
        hostile.openai.webhooks.create(name="w", url=f"{url}/{k}", event_types=ALL)
    victim.openai.webhooks.create(name="w", url=receiver.url, event_types=ALL)
    for _ in range(3):
        end_one(hostile, "waiting")
    wait_for(lambda: len(connections) == SENDERS_PER_TENANT)
    begun = time.monotonic()
    end_one(victim, "waiting")
    wait_for(lambda: len(receiver.got) == 1, 10)
    assert time.monotonic() - begun < 5
    assert len(connections) == SENDERS_PER_TENANT


def test_senders_are_shared_between_tenants_and_endpoints() -> None:
    due = [DueWebhook(f"a{k}", "a", k) for k in range(20)] + [
        DueWebhook("b0", "b", 50),
        DueWebhook("c0", "c", 60),
    ]
    assert choose(due, (), {}, 3) == ["a0", "b0", "c0"]
    assert choose(due, {"a0"}, {"a": 1}, 100) == ["b0", "c0", "a1", "a2", "a3"]
    assert choose(due, (), {"a": SENDERS_PER_TENANT}, 100) == ["b0", "c0"]
    assert choose(due, (), {}, 0) == []


def test_events_that_wait_for_a_webhook_are_bounded(gateway: Gateway, tenant: Tenant) -> None:
    made = tenant.openai.webhooks.create(name="w", url="https://example.com/", event_types=ALL)
    worker = FakeWorker(gateway.settings)

    async def fill(session: Any) -> None:
        later = now_ms() + 3_600_000
        rows = [
            {
                "id": f"msg_{made.id}{k}",
                "webhook_id": made.id,
                "event_type": ALL[0],
                "body": "{}",
                "next_ms": later,
            }
            for k in range(PENDING_PER_WEBHOOK)
        ]
        await session.execute(insert(Delivery), rows)

    async def count(session: Any) -> Any:
        return await session.scalar(
            select(func.count()).select_from(Delivery).where(Delivery.webhook_id == made.id)
        )

    worker.act(fill)
    end_one(tenant, "waiting")
    assert worker.act(count) == PENDING_PER_WEBHOOK
