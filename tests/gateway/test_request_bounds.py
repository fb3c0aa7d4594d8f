"""What a caller sends is bounded before it is served: each attack leaves `/health/live` prompt and the process small."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from reft_serve.gateway.http.server import unsent_bytes
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served, Tenant
from tests.support.gateway.process import process
from tests.support.waiting import wait_for

_JSON = {"content-type": "application/json"}
_SETTINGS = {
    "REFT_HEADER_SECONDS": "1.5",
    "REFT_BODY_SECONDS": "1",
    "REFT_MAX_CONNECTIONS": "60",
    "REFT_MAX_SPOOLED_BYTES": str(16 << 20),
}

# In a process of its own: the tests' own threads would hold it up.
_PULSE = """
import http.client, json, select, sys, time
took = []
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
while True:
    began = time.monotonic()
    try:
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
    except http.client.RemoteDisconnected:  # at its bound, the gateway closes an idle connection: a client opens another
        connection.close()
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
    assert answer.status == 200 and answer.read()
    took.append(time.monotonic() - began)
    if len(took) == 3:
        print("begun", flush=True)
    if select.select([sys.stdin], [], [], 0.005)[0]:
        break
print(json.dumps(took))
"""


class _Lab:
    """A gateway process, the keys of some tenants, and its health."""

    def __init__(self, pid: int, url: str, keys: dict[str, str]) -> None:
        self.pid, self.url, self.keys = pid, url, keys

    def http(self, name: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[name]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def connect(self, first: bytes = b"") -> socket.socket:
        place = urlsplit(self.url)
        sock = socket.create_connection((place.hostname, place.port), timeout=20)
        sock.sendall(first)
        return sock

    def peak_mib(self) -> int:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) >> 10

    def spooled_bytes(self) -> int:
        total = 0
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                if "(deleted)" in os.readlink(descriptor):
                    total += descriptor.stat().st_size
            except OSError:
                continue
        return total

    @contextmanager
    def steady(self, mib: int = 100) -> Iterator[None]:
        """A block in which 99 of 100 health checks take under 200 ms, and memory grows by less than `mib`."""
        before = self.peak_mib()
        command = [sys.executable, "-c", _PULSE, str(urlsplit(self.url).port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pulse:
            assert pulse.stdout is not None
            assert pulse.stdout.readline() == b"begun\n"
            yield
            took = json.loads(pulse.communicate(timeout=60)[0])
        busy = max(
            1.0, os.getloadavg()[0] / (os.cpu_count() or 1)
        )  # others' work takes its part of each core
        assert sorted(took)[int(len(took) * 0.99) - 1] < 0.2 * busy
        assert self.peak_mib() - before < mib


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Lab]:
    folder = tmp_path_factory.mktemp("bounds")
    served = Served(FakeEngine().app)
    prepared = Gateway(folder, "http://127.0.0.1:1")
    keys = {role: prepared.tenant(role, role=role).key for role in ("inference", "owner")}
    keys["other"] = prepared.tenant("other").key
    prepared.stop()
    with process(folder, served.url, **_SETTINGS) as (running, url):
        yield _Lab(running.pid, url, keys)
    served.stop()


def _answer(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    sock.close()
    return b"".join(parts)


def _push(sock: socket.socket, part: bytes, times: int) -> None:
    try:
        for _ in range(times):
            sock.sendall(part)
    except OSError:
        pass  # it was cut off


_HEAD = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("first", "part"),
    [
        (_HEAD, b"abcdefghij: klmnopqr\r\n" * 4096), (_HEAD + b"x: ", b"a" * 65536), (b"GET /", b"a" * 65536),
        (_HEAD, b"a" * 65536), (_HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 4096),
        (_HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"a" * 65536),
    ],
    ids=["lines", "value", "path", "name", "trailers", "chunk-extension"],
)  # fmt: skip
def test_headers_without_end_are_cut_off(lab: _Lab, first: bytes, part: bytes) -> None:
    with lab.steady(30):
        sock = lab.connect(first)
        sock.settimeout(2)
        with suppress(TimeoutError):
            _push(sock, part, 200)
        sock.close()


def test_too_many_headers_are_refused_in_the_usual_shape(lab: _Lab) -> None:
    answer = _answer(lab.connect(_HEAD + b"a: b\r\n" * 200 + b"\r\n"))
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


def test_what_is_not_http_is_refused_in_the_usual_shape(lab: _Lab) -> None:
    answer = _answer(lab.connect(b"hello\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request"


def test_silent_and_half_connections_are_closed_and_shut_nobody_out(lab: _Lab) -> None:
    half, silent = lab.connect(_HEAD), lab.connect()
    began = time.monotonic()
    assert _answer(half).startswith(b"HTTP/1.1 408 ")
    assert _answer(silent) == b""
    assert time.monotonic() - began < 10
    with lab.steady():
        held = [lab.connect(_HEAD if number % 2 else b"") for number in range(150)]
        with lab.http("inference") as client:
            for _ in range(5):
                assert (
                    client.post(
                        "/v1/completions", json={"model": "base", "prompt": "x"}
                    ).status_code
                    == 200
                )
        for sock in held:
            sock.close()


def test_slow_headers_end_in_time(lab: _Lab) -> None:
    sock = lab.connect(_HEAD)
    began = time.monotonic()
    while time.monotonic() - began < 15:
        try:
            sock.sendall(b"a: b\r\n")
        except OSError:
            break
        time.sleep(0.2)
    assert time.monotonic() - began < 10
    sock.close()


def test_requests_that_are_sent_before_the_first_is_answered_are_few(lab: _Lab) -> None:
    with lab.steady(60):
        assert (
            _answer(lab.connect(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" * 20_000)).count(
                b"HTTP/1.1"
            )
            < 100
        )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("responses", b'{"model":"base","input":[{"content":[' + b"0," * 200_000 + b"0]}]}"),
        ("responses", b'{"model":"base","input":[' + b"{}," * 60_000 + b"0]}"),
        ("completions", b'{"model":"base","prompt":[' + b"[-1]," * 60_000 + b"[1]]}"),
        ("completions", b'{"model":"base","prompt":[' + b"0," * 250_000 + b'""]}'),
        ("completions", b'{"model":"base",' + b",".join(b'"a%d":0' % n for n in range(200_000)) + b"}"),
        ("chat/completions", b'{"model":"base","messages":[' + b"[]," * 60_000 + b"0]}"),
        ("chat/completions", b'{"model":"base","messages":[' + b"{}," * 1_300_000 + b"0]}"),
        ("chat/completions", b'{"model":"base","tools":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        ("chat/completions", b'{"model":"base","seed":' + b"9" * 4_000_000 + b"}"),
        ("embeddings", b'{"model":"base","input":[' + b"[1]," * 60_000 + b'""]}'),
        ("embeddings", b'{"model":"base","input":"' + b"\\" * 3_999_999 + b"}"),
        ("classify", b'{"model":"base","input":"x","text_pair":[' + b"[1]," * 60_000 + b'""]}'),
    ],
)  # fmt: skip
def test_a_large_body_that_is_wrong_costs_little(lab: _Lab, path: str, body: bytes) -> None:
    with lab.http("inference") as client, lab.steady(150):
        answer = client.post(f"/v1/{path}", content=body, headers=_JSON)
    assert answer.status_code == 400, answer.text
    assert len(answer.content) < 5000


def test_many_large_sound_bodies_at_once_are_served_by_turns(lab: _Lab) -> None:
    """Small requests of another tenant pass meanwhile."""
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "word " * 800_000}],
        "max_tokens": 1,
    }
    content = json.dumps(body).encode()

    def ask(_: int) -> int:
        with lab.http("inference") as client:
            return client.post("/v1/chat/completions", content=content, headers=_JSON).status_code

    with lab.steady(300), ThreadPoolExecutor(20) as pool:
        asked = pool.map(ask, range(20))
        with lab.http("other") as other:
            for _ in range(10):
                small = other.post(
                    "/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 1}
                )
                assert small.status_code == 200
        statuses = set(asked)
    assert 200 in statuses
    assert statuses <= {200, 429}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/adapters/a/aliases/b"), ("POST", "/v1/keys"), ("POST", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/webhook_endpoints"), ("POST", "/v1/adapters"), ("POST", "/v1/files"),
    ],
)  # fmt: skip
def test_a_key_without_the_scope_is_refused_before_its_body_comes(
    lab: _Lab, method: str, path: str
) -> None:
    key = lab.keys["inference"]
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 30000000\r\n"
    sock = lab.connect(head.encode() + b"content-type: application/json\r\n\r\n")
    assert sock.recv(20).startswith(b"HTTP/1.1 403 ")
    sock.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/v1/adapters/a/aliases/b"), ("POST", "/v1/keys"), ("POST", "/v1/fine_tuning/jobs")],
)
def test_management_routes_take_little_json(lab: _Lab, method: str, path: str) -> None:
    with lab.http("owner") as client, lab.steady():
        large = client.request(
            method, path, content=b"[" + b"{}," * 1_000_000 + b"0]", headers=_JSON
        )
        many = client.request(
            method, path, content=b'{"version":[' + b"{}," * 20_000 + b"0]}", headers=_JSON
        )
        some = client.request(
            method, path, content=b'{"a":[' + b"{}," * 2_000 + b"0]}", headers=_JSON
        )
    assert (large.status_code, many.status_code, some.status_code) == (413, 400, 400)
    assert len(some.content) < 5000


def test_long_queries_are_refused(lab: _Lab) -> None:
    with lab.http("owner") as client, lab.steady():
        few = client.get(
            "/v1/fine_tuning/jobs?" + "&".join(f"metadata[k{n}]=v" for n in range(200))
        )
        many = lab.connect(b"GET /v1/files?" + b"a=b&" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert few.status_code == 400
    assert _answer(many).startswith(b"HTTP/1.1 431 ")


def _begin_upload(lab: _Lab, name: str, declared: int) -> socket.socket:
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {lab.keys[name]}\r\n"
        f"content-type: multipart/form-data; boundary=bbb\r\ncontent-length: {declared}\r\n\r\n"
        '--bbb\r\ncontent-disposition: form-data; name="files"; filename="reft_model.safetensors"\r\n\r\n'
    )
    return lab.connect(head.encode())


def test_an_upload_that_stops_is_given_up_and_removed(lab: _Lab) -> None:
    sock = _begin_upload(lab, "owner", 6 << 20)
    sock.sendall(bytes(4 << 20))
    wait_for(lambda: lab.spooled_bytes() > 1 << 20)
    lagging = _answer(sock)
    assert lagging.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in lagging
    assert lab.spooled_bytes() == 0


def test_uploads_share_the_disk_and_no_tenant_takes_all_of_it(lab: _Lab) -> None:
    with lab.http("owner") as owner:
        too_large = owner.post(
            "/v1/adapters", data={"name": "x"}, files=[("files", ("x.tar", bytes(9 << 20)))]
        )
    assert too_large.status_code == 413
    first = _begin_upload(lab, "owner", 6 << 20)
    first.sendall(b"x")
    time.sleep(0.3)
    second, other = _begin_upload(lab, "owner", 6 << 20), _begin_upload(lab, "other", 6 << 20)
    assert second.recv(20).startswith(b"HTTP/1.1 429 ")
    assert other.recv(20).startswith(b"HTTP/1.1 408 "), "it was let in, and stopped"
    for sock in (first, second, other):
        sock.close()


def test_a_form_has_few_parts_and_is_multipart(lab: _Lab) -> None:
    with lab.http("owner") as client, lab.steady():
        many = client.post(
            "/v1/adapters", data={"name": "x"}, files=[("files", (f"{n}", b"")) for n in range(40)]
        )
        fields = client.post("/v1/adapters", files={f"f{n}": (None, "x") for n in range(40)})
        plain = client.post("/v1/adapters", data={"name": "x"})
    assert [answer.status_code for answer in (many, fields, plain)] == [400, 400, 400]


def test_a_slow_body_is_given_up(lab: _Lab) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {lab.keys['inference']}\r\n"
    sock = lab.connect(
        head.encode() + b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    )
    assert _answer(sock).startswith(b"HTTP/1.1 408 ")


def test_it_ends_once_a_slow_caller_has_taken_the_end_of_its_answer(
    tmp_path: Path, make_served: Callable[[], Served], prepared_key: str
) -> None:
    """A closed connection's bytes are still the kernel's: with a container they would go."""
    with process(tmp_path, make_served().url, REFT_DRAIN_SECONDS="15") as (running, url):
        place = urlsplit(url)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((place.hostname, place.port))
        sock.sendall(
            f"GET /openapi.json HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {prepared_key}\r\n\r\n".encode()
        )
        assert place.port is not None
        wait_for(lambda: unsent_bytes({place.port or 0}) > 10_000)
        running.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert running.poll() is None
        answer = _answer(sock)
        assert running.wait(10) in (0, -signal.SIGTERM)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    assert len(body) == int(length[1])


@pytest.fixture
def make_served() -> Iterator[Callable[[], Served]]:
    served: list[Served] = []

    def make() -> Served:
        served.append(Served(FakeEngine().app))
        return served[-1]

    yield make
    for each in served:
        each.stop()


@pytest.fixture
def prepared_key(tmp_path: Path) -> str:
    prepared = Gateway(tmp_path, "http://127.0.0.1:1")
    prepared.stop()
    return prepared.admin_key


def test_a_caller_that_leaves_an_upload_leaves_nothing(gateway: Gateway, tenant: Tenant) -> None:
    intake = gateway.served.app.state.services.intake
    place = urlsplit(gateway.url)
    sock = socket.create_connection((place.hostname, place.port))
    head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.key}\r\ncontent-length: 9999\r\n"
    sock.sendall(head.encode() + b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
    wait_for(lambda: intake.uploads.used == 1)
    sock.close()
    wait_for(lambda: (intake.uploads.used, intake.disk.used, intake.requests.used) == (0, 0, 0))
