"""Files over HTTP, by the `openai` client: what is taken, what is refused and how, and what is left behind."""

from __future__ import annotations

import random
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.gateway.harness import Gateway, Tenant, running
from tests.support.gateway.process import Process
from tests.support.gateway.uploads import ROW, jsonl, upload
from tests.support.waiting import wait_for


def blobs(gateway: Gateway) -> set[str]:
    return {path.name for path in (gateway.folder / "blobs").rglob("*") if path.is_file()}


def rows_of(gateway: Gateway) -> dict[str, str]:
    with sqlite3.connect(gateway.folder / "reft.db") as database:
        return dict(database.execute("SELECT id, status FROM files").fetchall())


def test_a_file_is_uploaded_listed_read_and_deleted(gateway: Gateway, tenant: Tenant) -> None:
    client, content = tenant.openai, jsonl()
    made = upload(tenant, expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.id.startswith("file-")
    assert (made.bytes, made.filename, made.purpose, made.status) == (
        len(content),
        "rows.jsonl",
        "fine-tune",
        "processed",
    )
    assert made.expires_at == pytest.approx(made.created_at + 3600, abs=1)
    assert {"format": "chat", "rows": 3}.items() <= (made.model_extra or {}).items()
    assert client.files.retrieve(made.id) == made
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [made.id]
    assert client.files.content(made.id).read() == content
    assert blobs(gateway) >= {made.id}
    gone = client.files.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
    for act in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            act(made.id)
    wait_for(lambda: made.id not in blobs(gateway) and made.id not in rows_of(gateway))
    audit = tenant.http.get("/v1/audit").json()["data"]
    assert [(entry["action"], entry["subject"]) for entry in audit[:2]] == [
        ("file.delete", made.id),
        ("file.create", made.id),
    ]


def test_files_are_listed_by_pages_in_both_orders(tenant: Tenant) -> None:
    made = [upload(tenant, jsonl(*[ROW] * (k + 1))).id for k in range(5)]
    for order, expected in (("asc", made), ("desc", made[::-1])):
        page = tenant.openai.files.list(limit=2, order=order)  # type: ignore[arg-type]
        assert ([file.id for file in page.data], page.has_more) == (expected[:2], True)
        assert [file.id for file in page] == expected
    assert list(tenant.openai.files.list(purpose="fine-tune-results")) == []
    with pytest.raises(openai.NotFoundError):
        tenant.openai.files.list(after="file-0")
    for bad in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": "x"}):
        with pytest.raises(openai.BadRequestError):
            tenant.openai.files.list(**bad)


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "has no rows"),
    "not JSON": (jsonl(ROW) + b"{nope}\n" + jsonl(ROW), "line 2: is not JSON"),
    "cut off": (jsonl(ROW, ROW)[:-9], "line 2: ends in the middle of a JSON value"),
    "two faults": (
        jsonl({"messages": []}, ROW, {"messages": "x"}),
        "line 1: messages is empty; line 3: messages must be a list",
    ),
    "a list of numbers": (b"[1, 2]", "line 1: is a number, not an object"),
    "NaN": (jsonl(ROW) + b'{"prompt": NaN, "completion": "x"}\n', "line 2"),
    "another format": (jsonl(ROW, ROW, {"prompt": "a", "completion": "b"}), "line 3: is a completion row"),
    "gzip": (b"\x1f\x8b\x08\x00junk", "compressed by gzip"),
    "binary": (random.Random(1).randbytes(5000), "line 1"),
    "UTF-16": ("hello".encode("utf-16"), "UTF-16"),
    "an empty answer": (jsonl({"prompt": "a", "completion": " "}), "line 1: completion is empty"),
    "no answer": (jsonl({"messages": ROW["messages"][:1]}), "line 1: messages has no assistant turn"),
    "a deep nest": (b"[" * 100_000, "line 1"),
    "a huge number": (b'{"prompt": ' + b"9" * 5000 + b', "completion": "x"}', "line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_gets_a_sentence_with_its_lines_and_leaves_nothing(
    gateway: Gateway, tenant: Tenant, case: str
) -> None:
    content, phrase = BAD[case]
    before = blobs(gateway)
    with pytest.raises(openai.BadRequestError) as caught:
        tenant.openai.files.create(file=("data.jsonl", content), purpose="fine-tune")
    assert phrase in caught.value.message
    assert "data file data.jsonl cannot be used" in caught.value.message
    assert caught.value.code == "data_invalid"
    assert blobs(gateway) == before
    assert list(tenant.openai.files.list()) == []


def test_a_large_file_is_checked_as_a_small_one_is(tenant: Tenant) -> None:
    large = jsonl(*[ROW] * 20_000)
    assert len(large) > 1 << 20
    made = upload(tenant, large)
    assert {"format": "chat", "rows": 20_000}.items() <= (made.model_extra or {}).items()
    assert tenant.openai.files.content(made.id).read() == large
    with pytest.raises(
        openai.BadRequestError, match=r"data file d\.jsonl cannot be used: line 20001: is not JSON"
    ):
        upload(tenant, large + b"{x}\n", "d.jsonl")


@pytest.mark.parametrize(
    "purpose", ["batch", "assistants", "vision", "user_data", "evals", "fine-tune\0"]
)
def test_other_purposes_are_refused_with_a_sentence(tenant: Tenant, purpose: Any) -> None:
    with pytest.raises(
        openai.BadRequestError, match="only the purpose fine-tune is supported"
    ) as caught:
        tenant.openai.files.create(file=("a.jsonl", jsonl()), purpose=purpose)
    assert caught.value.param == "purpose"


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"purpose": "fine-tune", "expires_after[anchor]": "created_at"},
        {"purpose": "fine-tune", "expires_after[seconds]": "3600"},
        {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "9"},
        {"purpose": "fine-tune", "expires_after[anchor]": "deleted_at", "expires_after[seconds]": "3600"},
    ],
)  # fmt: skip
def test_half_a_form_is_refused(tenant: Tenant, form: dict[str, str]) -> None:
    answer = tenant.http.post("/v1/files", data=form, files={"file": ("a.jsonl", jsonl())})
    assert answer.status_code == 400, answer.text
    assert tenant.http.post("/v1/files", data={"purpose": "fine-tune"}).status_code == 400


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"), ("C:\\a\\b.jsonl", "b.jsonl"), ("ä" * 300, "ä" * 255), ("..", ".."),
        ('q"\r\n.x', 'q".x'),
    ],
)  # fmt: skip
def test_a_filename_is_for_show_only(
    gateway: Gateway, tenant: Tenant, name: str, shown: str
) -> None:
    made = upload(tenant, name=name)
    assert made.filename.replace("%22", '"').replace("%0D%0A", "") == shown
    assert made.id in blobs(gateway)


def test_another_tenants_file_is_not_there(make_tenant: Callable[..., Tenant]) -> None:
    one, two = make_tenant(), make_tenant()
    made = upload(one)
    assert list(two.openai.files.list()) == []
    for act in (two.openai.files.retrieve, two.openai.files.content, two.openai.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            act(made.id)
        with pytest.raises(openai.NotFoundError) as absent:
            act("file-0123456789abcdef01234567")
        assert caught.value.message.replace(made.id, "") == absent.value.message.replace(
            "file-0123456789abcdef01234567", ""
        )
    assert one.openai.files.content(made.id).read() == jsonl()
    weak = make_tenant(role="inference")
    with pytest.raises(openai.PermissionDeniedError):
        upload(weak)


def test_room_is_limited_by_bytes_of_files_and_versions_together(
    gateway: Gateway, make_tenant: Callable[..., Tenant]
) -> None:
    size = len(jsonl())
    small = make_tenant(limits={"storage_bytes": 2 * size + 10})
    first = upload(small)
    upload(small)
    with pytest.raises(openai.RateLimitError, match="bytes of storage is used up"):
        upload(small)
    assert small.upload("birds").status_code == 429
    small.openai.files.delete(first.id)
    upload(small)
    wait_for(lambda: set(rows_of(gateway).values()) == {"processed"})
    full = make_tenant(limits={"storage_bytes": 3 * size})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _status(full), range(8)))
    assert sorted(answers) == [200] * 3 + [429] * 5
    wait_for(
        lambda: (
            set(rows_of(gateway).values()) == {"processed"}
            and blobs(gateway) == set(rows_of(gateway))
        )
    )


def _status(tenant: Tenant) -> int:
    files = {"file": ("a.jsonl", jsonl())}
    return tenant.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files).status_code


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, max_file_bytes=10_000, max_upload_bytes=20_000) as (gateway, _):
        tenant = gateway.tenant("acme")
        upload(tenant, jsonl(*[ROW] * 100)[:9_000].rsplit(b"\n", 1)[0])
        for size in (11_000, 25_000):
            with pytest.raises(openai.APIStatusError) as caught:
                upload(tenant, b" " * size)
            assert caught.value.status_code == 413
        assert len(blobs(gateway)) == 1


def test_files_expire(tmp_path: Path) -> None:
    with running(tmp_path, file_seconds=1, upkeep_seconds=0.2) as (gateway, _):
        tenant = gateway.tenant("acme")
        made = upload(tenant)
        kept = upload(tenant, expires_after={"anchor": "created_at", "seconds": 3600})
        wait_for(lambda: [file.id for file in tenant.openai.files.list()] == [kept.id])
        with pytest.raises(openai.NotFoundError):
            tenant.openai.files.retrieve(made.id)
        wait_for(lambda: blobs(gateway) == {kept.id} == set(rows_of(gateway)))
        gateway.admin.delete("/v1/admin/tenants/acme")
        wait_for(lambda: not blobs(gateway) and not rows_of(gateway))


def test_a_blob_that_is_gone_is_the_stores_failure(gateway: Gateway, tenant: Tenant) -> None:
    made = upload(tenant)
    next((gateway.folder / "blobs").rglob(made.id)).unlink()
    with pytest.raises(openai.InternalServerError, match="missing from the file store"):
        tenant.openai.files.content(made.id)


def test_a_caller_that_leaves_half_way_leaves_nothing(gateway: Gateway, tenant: Tenant) -> None:
    before = blobs(gateway), rows_of(gateway)
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.key}\r\ncontent-length: 5000000\r\n"
        "content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        'content-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", gateway.served.port)) as half:
        half.sendall(head.encode() + jsonl() * 5000)
    assert upload(tenant)
    after = rows_of(gateway)
    assert len(after) == len(before[1]) + 1
    assert len(blobs(gateway)) == len(before[0]) + 1


def test_a_gateway_that_is_killed_during_uploads_leaves_no_blob_without_a_row(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as (gateway, _):  # only to make the database, a tenant and a key
        tenant = gateway.tenant("acme")
    process = Process(tmp_path)
    headers = {"authorization": f"Bearer {tenant.key}"}
    told: set[str] = set()
    stop = threading.Event()

    def send(k: int) -> None:
        content = jsonl(*[ROW] * 3_000)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{process.port}", headers=headers, trust_env=False
        ) as http:
            while not stop.is_set():
                try:
                    answer = http.post(
                        "/v1/files",
                        data={"purpose": "fine-tune"},
                        files={"file": ("a", content)},
                        timeout=30,
                    )
                    told.add(answer.json()["id"])
                except httpx.HTTPError:
                    time.sleep(0.05)

    dice = random.Random(3)
    with ThreadPoolExecutor(3) as pool:
        for k in range(3):
            pool.submit(send, k)
        wait_for(lambda: len(told) >= 2, 60)
        time.sleep(dice.uniform(0.0, 0.3))
        process.kill()
        process.start()
        stop.set()
    with sqlite3.connect(tmp_path / "reft.db") as database:  # as if an hour had gone by
        database.execute(
            "UPDATE files SET created_ms = created_ms - 7200000 WHERE status = 'uploading'"
        )
    try:
        wait_for(
            lambda: (
                set(rows_of(gateway).values()) == {"processed"}
                and blobs(gateway) == set(rows_of(gateway))
            ),
            60,
        )
        assert told <= set(rows_of(gateway))
    finally:
        process.kill()
