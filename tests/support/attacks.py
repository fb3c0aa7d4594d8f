"""What a hostile client may try, one bounded act at a time: shared by the tests and by `scripts/bench attack`.

Each attack is a function of an `Attacker`; it returns its outcome: a status, `closed`, `no answer` or the name of the
client's error. It makes what it sends from the attacker's random numbers, so that a seed repeats it.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.support.hostile_files import archives, damaged_adapters, data_files

__all__ = ["ATTACKS", "Attack", "Attacker", "act"]

_SECONDS = 15.0
_CHAT, _COMPLETIONS, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_ROWS = b'{"prompt": "once", "completion": "upon a time"}\n' * 8


@dataclass(slots=True)
class Attacker:
    """A hostile tenant's keys, and what its attacks share.

    Attributes:
        url: of the gateway.
        inference: a key of role inference.
        owner: a key of role owner.
        adapter: the files of an adapter that fits the base model.
        rng: decides sizes and mutations.
    """

    url: str
    inference: str
    owner: str
    adapter: Mapping[str, bytes]
    rng: random.Random
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=_SECONDS, trust_env=False)

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        method: str = "POST",
        **options: Any,
    ) -> str:
        """Send a request with the inference key, or another, and return its status."""
        headers = {"authorization": f"Bearer {self.inference if key is None else key}"}
        if body is not None:
            options["content"] = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers["content-type"] = "application/json"
        return str(self.http.request(method, path, headers=headers, **options).status_code)

    def upload(
        self, path: str, files: Mapping[str, bytes], part: str = "files", **form: str
    ) -> str:
        """Send files with the owner's key and return the status."""
        parts = [(part, item) for item in files.items()]
        return self.ask(path, key=self.owner, data=form, files=parts)

    def made(self, path: str, body: Any) -> tuple[str, dict[str, Any]]:
        """Make something with the owner's key: (status, the answer)."""
        headers = {"authorization": f"Bearer {self.owner}"}
        answer = self.http.post(path, json=body, headers=headers)
        with suppress(ValueError):
            return str(answer.status_code), dict(answer.json())
        return str(answer.status_code), {}

    def raw(self, pieces: Iterator[bytes], pause: float = 0.0, wait: float = 2.0) -> str:
        """Send bytes over a connection of its own and return how the server answers."""
        parts = urlsplit(self.url)
        try:
            with socket.create_connection(
                (parts.hostname or "", parts.port or 80), timeout=wait
            ) as sock:
                for piece in pieces:
                    sock.sendall(piece)
                    time.sleep(pause)
                answer = sock.recv(64)
        except TimeoutError:
            return "no answer"
        except OSError:
            return "closed"
        return (
            answer.split(b" ")[1].decode(errors="replace")
            if answer.startswith(b"HTTP/")
            else "closed"
        )

    def words(self, count: int) -> str:
        """Text of so many words."""
        return " ".join(
            self.rng.choice(("once", "upon", "a", "time", "cat", "\u4f60", "\U0001f431", "<s>"))
            for _ in range(count)
        )

    def close(self) -> None:
        """Close its connections."""
        self.http.close()


Attack = Callable[[Attacker], str]
ATTACKS: dict[str, Attack] = {}


def _attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


def act(attacker: Attacker, name: str) -> str:
    """Do one attack and return its outcome."""
    try:
        return ATTACKS[name](attacker)
    except httpx.TimeoutException:
        return "no answer"
    except (httpx.HTTPError, OSError) as exc:
        return type(exc).__name__


# Without a key.


@_attack
def many_headers(a: Attacker) -> str:
    lines = b"".join(b"x-%d: %d\r\n" % (k, k) for k in range(a.rng.choice((200, 2_000, 20_000))))
    return a.raw(iter((b"GET /v1/models HTTP/1.1\r\nhost: x\r\n", lines, b"\r\n")))


@_attack
def endless_header(a: Attacker) -> str:
    size = a.rng.randrange(1 << 10, 4 << 20)
    return a.raw(
        iter((b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx: ", *[b"a" * 65_536] * (size >> 16)))
    )


@_attack
def slow_headers(a: Attacker) -> str:
    return a.raw((b"%c" % byte for byte in b"GET / HTTP/1.1\r\nhost"), pause=0.1, wait=0.5)


@_attack
def idle_connections(a: Attacker) -> str:
    parts = urlsplit(a.url)
    held = []
    try:
        for _ in range(40):
            held.append(
                socket.create_connection((parts.hostname or "", parts.port or 80), timeout=2)
            )
            held[-1].sendall(
                a.rng.choice(
                    (
                        b"",
                        b"GET /v1",
                        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n{",
                    )
                )
                or b""
            )
        time.sleep(2)
        return "held"
    finally:
        for sock in held:
            sock.close()


@_attack
def odd_requests(a: Attacker) -> str:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
    line = bytearray(head + b"2\r\n{}\r\n0\r\n\r\n")
    for _ in range(a.rng.randrange(8)):
        line[a.rng.randrange(len(line))] = a.rng.randrange(256)
    return a.raw(iter((bytes(line),)), wait=1)


@_attack
def unknown_keys(a: Attacker) -> str:
    return [
        a.ask("/v1/models", key=f"rk-{a.rng.getrandbits(256):064x}"[:46], method="GET")
        for _ in range(5)
    ][-1]


@_attack
def body_without_a_key(a: Attacker) -> str:
    head = b"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 70000000\r\n\r\n"
    return a.raw(iter((head, *[bytes(65_536)] * 32)))


# With a key of role inference.


@_attack
def wrong_bodies(a: Attacker) -> str:
    count = a.rng.choice((10, 1_000, 200_000))
    path, body = a.rng.choice((
        (_RESPONSES, b'{"model":"base","input":[{"content":[' + b"0," * count + b"0]}]}"),
        (_COMPLETIONS, b'{"model":"base","prompt":[' + b"[-1]," * count + b"[1]]}"),
        (_CHAT, b'{"model":"base","messages":[' + b"{}," * count + b"{}]}"),
        (_CHAT, b'{"model":"base","messages":[],"tools":[' + b"[]," * count + b"1]}"),
    ))  # fmt: skip
    return a.ask(path, body)


@_attack
def json_floods(a: Attacker) -> str:
    count = a.rng.choice((100, 10_000, 300_000))
    return a.ask(a.rng.choice((_COMPLETIONS, _CHAT, "/v1/embeddings")), a.rng.choice((
        b"[" * count, b'{"a":' * count, b'{"model":' + b"9" * count + b"}", b'{"model":"' + b"\\u0000" * count + b'"}',
        b"{" + b",".join(b'"k%d":0' % k for k in range(count)) + b"}",
        b'{"model":"base","prompt":"' + b"\xff" * count + b'"}',
        b'{"model":"base","temperature":1e' + b"9" * min(count, 1_000) + b"}",
    )))  # fmt: skip


@_attack
def json_without_the_scope(a: Attacker) -> str:
    body = b'{"version":[' + b"{}," * a.rng.choice((1_000, 300_000)) + b"{}]}"
    return a.ask("/v1/adapters/a/aliases/b", body, method="PUT")


@_attack
def upload_without_the_scope(a: Attacker) -> str:
    return a.ask(
        "/v1/adapters",
        files=[("files", ("reft_model.safetensors", bytes(a.rng.randrange(1 << 22))))],
    )


@_attack
def upload_that_stops(a: Attacker) -> str:
    head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {a.owner}\r\ncontent-length: 9000000\r\n"
    head += "content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    head += 'content-disposition: form-data; name="file"; filename="x"\r\n\r\n'
    return a.raw(iter((head.encode(), *[bytes(65_536)] * a.rng.randrange(64))))


@_attack
def huge_prompts(a: Attacker) -> str:
    prompt = a.rng.choice(
        (
            a.words(a.rng.choice((2_000, 200_000))),
            [1] * 100_000,
            ["x"] * 2_000,
            [[1, 2]] * 2_000,
            "\x00" * 10_000,
        )
    )
    return a.ask(_COMPLETIONS, {"model": "base", "prompt": prompt, "max_tokens": 1})


@_attack
def odd_numbers(a: Attacker) -> str:
    number = a.rng.choice((-1, 0, 2**31, 2**63, 10**400, 1e308, 0.5, True, None, "1", [], {}))
    name = a.rng.choice(
        (
            "max_tokens",
            "n",
            "best_of",
            "logprobs",
            "temperature",
            "top_p",
            "seed",
            "stop",
            "min_tokens",
            "logit_bias",
            "reft_strength",
        )
    )
    return a.ask(
        _COMPLETIONS, {"model": "base", "prompt": a.words(3), "max_tokens": 2, name: number}
    )


@_attack
def many_choices(a: Attacker) -> str:
    return a.ask(
        _COMPLETIONS,
        {"model": "base", "prompt": [a.words(2)] * 8, "n": a.rng.choice((2, 17)), "max_tokens": 8},
    )


@_attack
def costly_schemas(a: Attacker) -> str:
    large = a.rng.choice((50, 5_000, 2**31))
    schema = a.rng.choice((
        {"type": "array", "minItems": large, "prefixItems": [{}, {}]}, {"type": "string", "minLength": large},
        {"const": "x" * min(large, 600_000)}, {"enum": [str(k) for k in range(min(large, 60_000))]},
        {"type": "object", "properties": {f"p{k}": {"type": "string"} for k in range(min(large, 300))}},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 20}}, "$ref": "#/$defs/a"},
        {"type": "integer", "minimum": -(2**62), "maximum": large}, {"type": "string", "pattern": "(([a-z ]*)*[a-z ]*)*"},
    ))  # fmt: skip
    chat = {"model": "base", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    flat = {"type": "json_schema", "name": "x", "schema": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return a.ask(*a.rng.choice((
        (_CHAT, chat | {"response_format": form}),
        (_COMPLETIONS, {"model": "base", "prompt": "hi", "max_tokens": 4, "structured_outputs": {"json": schema}}),
        (_RESPONSES, {"model": "base", "input": "hi", "max_output_tokens": 4, "text": {"format": flat}}),
        (_CHAT, chat | {"tools": [tool], "tool_choice": "required"}),
    )))  # fmt: skip


@_attack
def costly_grammars(a: Attacker) -> str:
    structured = a.rng.choice((
        {"grammar": "root ::= w*\nw ::= [a-z ]* [a-z ]* [a-z ]* | w w | w w w"}, {"grammar": "root ::= root root | \"a\""},
        {"regex": "(([a-z ]*)*[a-z ]*)*"}, {"regex": "(a{1,1000}){1,1000}"}, {"regex": "(" * a.rng.choice((10, 5_000))},
        {"choice": [str(k) for k in range(a.rng.choice((10, 60_000)))]}, {"structural_tag": "{" * 100},
        {"grammar": "root ::= " + "(" * 1_000}, {"json": "{" * 1_000},
    ))  # fmt: skip
    return a.ask(
        _COMPLETIONS,
        {"model": "base", "prompt": "hi", "max_tokens": 16, "structured_outputs": structured},
    )


@_attack
def media_in_tool_outputs(a: Attacker) -> str:
    image = [{"type": "input_image", "image_url": "http://127.0.0.1:1/x.png"}]
    items = [{"type": "function_call_output", "call_id": "c", "output": image}]
    return a.ask(_RESPONSES, {"model": "base", "input": items})


@_attack
def leaving_early(a: Attacker) -> str:
    body = {
        "model": "base",
        "prompt": a.words(20),
        "max_tokens": 200,
        "stream": a.rng.random() < 0.5,
        "ignore_eos": True,
    }
    headers = {"authorization": f"Bearer {a.inference}"}
    try:
        with a.http.stream(
            "POST", _COMPLETIONS, json=body, headers=headers, timeout=a.rng.uniform(0.05, 0.5)
        ) as answer:
            next(answer.iter_bytes(), b"")
    except httpx.TimeoutException:
        return "left"
    return "left"


@_attack
def slow_reader(a: Attacker) -> str:
    body = json.dumps(
        {"model": "base", "prompt": "x", "max_tokens": 100, "stream": True, "ignore_eos": True}
    )
    head = f"POST {_COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {a.inference}\r\n"
    head += "content-type: application/json\r\n"
    return a.raw(iter((f"{head}content-length: {len(body)}\r\n\r\n{body}".encode(),)), pause=1.0)


@_attack
def list_floods(a: Attacker) -> str:
    path = a.rng.choice(
        ("/v1/models", "/v1/adapters", "/v1/files", "/v1/fine_tuning/jobs", "/v1/usage", "/v1/keys")
    )
    query = a.rng.choice(
        (
            "",
            "?limit=100",
            "?limit=1000000000",
            "?after=x",
            "?" + "&".join(f"k{k}=1" for k in range(500)),
        )
    )
    return [a.ask(path + query, key=a.owner, method="GET") for _ in range(5)][-1]


# With a key of role owner.


@_attack
def hostile_archives(a: Attacker) -> str:
    name, content = a.rng.choice(archives(a.rng, a.adapter))()
    return a.upload("/v1/adapters", {name: content}, name=f"archive-{a.rng.randrange(4)}")


@_attack
def hostile_adapters(a: Attacker) -> str:
    files = a.rng.choice(damaged_adapters(a.rng, a.adapter))()
    return a.upload("/v1/adapters", files, name=f"adapter-{a.rng.randrange(4)}")


@_attack
def hostile_data_files(a: Attacker) -> str:
    content = a.rng.choice(data_files(a.rng))()
    return a.upload("/v1/files", {"rows.jsonl": content}, part="file", purpose="fine-tune")


@_attack
def many_adapters(a: Attacker) -> str:
    return a.upload("/v1/adapters", a.adapter, name=f"mass-{a.rng.randrange(50)}")


@_attack
def many_keys(a: Attacker) -> str:
    status, key = a.made(
        "/v1/keys", {"role": a.rng.choice(("owner", "inference", "admin")), "name": a.words(2)}
    )
    if status == "201" and a.rng.random() < 0.8:
        a.ask(f"/v1/keys/{key['id']}", key=a.owner, method="DELETE")
    return status


@_attack
def many_webhooks(a: Attacker) -> str:
    url = a.rng.choice(
        (
            "https://127.0.0.1/",
            "https://[::ffff:0:10.0.0.1]/",
            "https://hook.invalid/",
            "http://10.0.0.1/",
            "https://x@y:z/",
        )
    )
    status, made = a.made(
        "/v1/webhook_endpoints",
        {"name": "x", "url": url, "event_types": ["fine_tuning.job.failed"]},
    )
    if "id" in made:
        a.ask(f"/v1/webhook_endpoints/{made['id']}/test", {}, key=a.owner)
        a.ask(f"/v1/webhook_endpoints/{made['id']}", key=a.owner, method="DELETE")
    return status


@_attack
def jobs_made_and_cancelled(a: Attacker) -> str:
    headers = {"authorization": f"Bearer {a.owner}"}
    sent = a.http.post(
        "/v1/files",
        data={"purpose": "fine-tune"},
        files={"file": ("rows.jsonl", _ROWS)},
        headers=headers,
    )
    if sent.status_code != 200:
        return str(sent.status_code)
    epochs = a.rng.choice((1, 100, 10**9))
    body = {
        "model": "base",
        "training_file": sent.json()["id"],
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}},
    }
    status, job = a.made("/v1/fine_tuning/jobs", body)
    if "id" in job:
        a.ask(f"/v1/fine_tuning/jobs/{job['id']}/cancel", {}, key=a.owner)
    a.ask(f"/v1/files/{sent.json()['id']}", key=a.owner, method="DELETE")
    return status


@_attack
def event_streams(a: Attacker) -> str:
    headers = {"authorization": f"Bearer {a.owner}"}
    jobs = a.http.get("/v1/fine_tuning/jobs?limit=1", headers=headers)
    if jobs.status_code != 200 or not jobs.json()["data"]:
        return str(jobs.status_code)
    path = f"/v1/fine_tuning/jobs/{jobs.json()['data'][0]['id']}/events?stream=true"
    with a.http.stream("GET", path, headers=headers, timeout=2) as answer:
        return str(answer.status_code)


@_attack
def fuzzed_json(a: Attacker) -> str:
    method, path, body = a.rng.choice(_SOUND)
    text = bytearray(json.dumps(body).encode())
    for _ in range(a.rng.randrange(1, 6)):
        at = a.rng.randrange(len(text))
        text[at : at + a.rng.randrange(3)] = a.rng.choice(
            (b"", b'"', b"null", b"[", b"}", b"9" * 30, b"\\u0000", bytes((a.rng.randrange(256),)))
        )
    return a.ask(path, bytes(text), key=a.owner, method=method)


_SOUND: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "POST",
        _COMPLETIONS,
        {"model": "base", "prompt": "once", "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1}},
    ),
    (
        "POST",
        _CHAT,
        {"model": "base", "messages": [{"role": "user", "content": "once"}], "max_tokens": 2},
    ),
    ("POST", _RESPONSES, {"model": "base", "input": "once", "max_output_tokens": 2}),
    (
        "POST",
        "/v1/fine_tuning/jobs",
        {"model": "base", "training_file": "file-none", "suffix": "x", "seed": 1},
    ),
    ("PUT", "/v1/adapters/none/aliases/production", {"version": "sha256:0"}),
    ("PUT", "/v1/adapters/none/shares/none", {}),
    ("POST", "/v1/keys", {"role": "nobody", "name": "x", "limits": {"choices": 1}}),
    ("POST", "/v1/webhook_endpoints", {"name": "x", "url": "ftp://x", "event_types": ["x"]}),
)
