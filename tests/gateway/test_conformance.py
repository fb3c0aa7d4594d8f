"""`reft-serve up` with the shipped model, spoken to by the `openai` client: a real engine behind the gateway."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import reft_serve.demo
from tests.deploy.expressions import unmet
from tests.docs.blocks import ROOT, Block, blocks
from tests.gateway.test_inference import take, wait_for

DEMO = Path(reft_serve.demo.__file__).parent
READY_SECONDS = 240
PROMPT = "Once upon a time there was a little"
HELLO: list[Any] = [{"role": "user", "content": "Tell me a story"}]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


class Up:
    """One `reft-serve up` process and its first key."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "up.log"
        (folder / "template.jinja").write_text(TEMPLATE)
        command = [
            sys.executable, "-m", "reft_serve.cli_up", "--data", str(folder / "data"), "--port", str(self.port),
            "--dtype", "float32", "--max-num-seqs", "64", "--tool-call-parser", "hermes", "--enable-auto-tool-choice",
            "--chat-template", str(folder / "template.jinja"),
        ]  # fmt: skip
        begun = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"REFT_LORA": "off", "REFT_CACHE_SECONDS": "0.5"}
            )
        self._probe = httpx.Client(base_url=self.url, timeout=5, trust_env=False)
        while self._status("/health/ready") != 200:
            if self.process.poll() is not None or time.monotonic() > begun + READY_SECONDS:
                self.stop()
                pytest.fail(f"`up` did not become ready:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - begun
        found = re.search(r"rk-[\w-]{43}", self.log.read_text())
        assert found, "the first key was not shown"
        self.key = found[0]
        self.http = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=60, trust_env=False
        )
        transport = openai.DefaultHttpxClient(trust_env=False)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, http_client=transport
        )

    def _status(self, path: str) -> int:
        try:
            return self._probe.get(path).status_code
        except httpx.HTTPError:
            return 0

    def upload(self, name: str, **form: str) -> httpx.Response:
        files = [("files", (file.name, file.read_bytes())) for file in sorted((DEMO / "adapters" / name).iterdir())]
        return self.http.post("/v1/adapters", data={"name": name, **form}, files=files)

    def say(self, model: str, prompt: Any = PROMPT, **options: Any) -> str:
        given = {"max_tokens": 12, "temperature": 0} | options
        text: str = self.openai.completions.create(model=model, prompt=prompt, **given).choices[0].text
        return text

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up"))
    for name in ("birds", "cats", "speech"):
        assert running.upload(name).status_code == 201
    yield running
    running.stop()


def test_up_says_when_it_is_ready_and_shows_the_key_once(up: Up) -> None:
    log = up.log.read_text()
    assert "ready after" in log
    assert log.count(up.key) == 1


def test_each_adapter_answers_in_its_own_way(up: Up) -> None:
    said = {name: up.say(name) for name in ("base", "birds", "cats", "speech")}
    assert len(set(said.values())) == 4
    with ThreadPoolExecutor(8) as pool:
        mixed = list(pool.map(up.say, [*said, *said]))
    assert mixed == [*said.values(), *said.values()]


def test_a_version_answers_within_two_seconds_of_its_upload(up: Up) -> None:
    begun = time.monotonic()
    assert up.upload("tears").status_code == 201
    up.say("tears", max_tokens=1)
    assert time.monotonic() - begun < 2


def test_completions_stream_what_they_would_answer_whole(up: Up) -> None:
    options: Any = {"model": "birds", "prompt": PROMPT, "max_tokens": 10, "temperature": 0, "logprobs": 3}
    whole = up.openai.completions.create(**options)
    chunks = list(up.openai.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 10
    assert {c.model for c in chunks} == {"birds"} == {whole.model}
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.top_logprobs is not None
    assert len(whole.choices[0].logprobs.top_logprobs[0]) >= 3
    streamed = [p for c in chunks[:-1] if c.choices[0].logprobs for p in c.choices[0].logprobs.token_logprobs or []]
    assert streamed == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=2e-3)


def test_sampling_fields_do_what_they_say(up: Up) -> None:
    create = up.openai.completions.create
    several = create(model="cats", prompt=PROMPT, n=3, seed=7, temperature=1.0, max_tokens=8)
    again = create(model="cats", prompt=PROMPT, n=3, seed=7, temperature=1.0, max_tokens=8)
    assert [c.text for c in several.choices] == [c.text for c in again.choices]
    assert len({c.text for c in several.choices}) > 1
    word = up.say("base", max_tokens=6).split()[2]
    assert word not in up.say("base", stop=[word])
    forced = create(model="base", prompt=PROMPT, max_tokens=3, temperature=0, logit_bias={"50": 100}, logprobs=0)
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or [])) == 1
    assert len(create(model="base", prompt=["a b", "c d"], max_tokens=2).choices) == 2
    assert create(model="base", prompt=[5, 6, 7], max_tokens=2).usage.prompt_tokens == 3  # type: ignore[union-attr]


def test_chat_whole_and_streamed(up: Up) -> None:
    create = up.openai.chat.completions.create
    options: Any = {"model": "birds", "messages": HELLO, "max_completion_tokens": 8, "temperature": 0}
    whole = create(**options, logprobs=True, top_logprobs=2)
    chunks = list(create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == whole.choices[0].message.content
    drawn: Any = options | {"temperature": 1.0, "seed": 3, "n": 2, "stream": True}
    both = list(create(**drawn, stream_options={"include_usage": True}))
    assert {c.index for chunk in both for c in chunk.choices} == {0, 1}
    assert whole.choices[0].logprobs is not None
    assert len((whole.choices[0].logprobs.content or [])[0].top_logprobs) == 2
    assert [each[-1].usage.completion_tokens for each in (chunks, both)] == [8, 16]
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    shaped = create(
        model="base", messages=HELLO, max_tokens=40, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )  # fmt: skip
    # A model as small as this one seldom ends an object within its tokens; that it begins one is the format's doing.
    assert (shaped.choices[0].message.content or "").lstrip().startswith("{")
    choice = {"structured_outputs": {"choice": ["north", "south"]}}
    chosen = create(model="base", messages=HELLO, max_tokens=20, temperature=0, extra_body=choice)
    assert chosen.choices[0].message.content in ("north", "south")
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": schema}}
    named: Any = {"type": "function", "function": {"name": "look"}}
    called = create(model="base", messages=HELLO, tools=[tool], tool_choice=named, max_tokens=40, temperature=0)
    assert called.choices[0].finish_reason in ("tool_calls", "length", "stop")  # as far as so small a model gets


def test_responses_whole_and_streamed(up: Up) -> None:
    options: Any = {"model": "birds", "input": "Tell me a story", "max_output_tokens": 8, "temperature": 0}
    whole = up.openai.responses.create(**options)
    events = list(up.openai.responses.create(**options, stream=True))
    last: Any = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text != ""
    assert whole.model == last.response.model == "birds"
    assert last.response.usage.output_tokens == 8


def test_every_failure_is_the_sdks_own_exception(up: Up) -> None:
    create = up.openai.completions.create
    for kind, call in (
        (openai.NotFoundError, lambda: create(model="nobody", prompt=["x"])),
        (openai.BadRequestError, lambda: create(model="base", prompt="x", max_tokens=100_000)),
        (openai.BadRequestError, lambda: create(model="base", prompt="x", temperature=9)),
        (openai.BadRequestError, lambda: create(model="base", prompt="word " * 5000)),
        (openai.BadRequestError, lambda: create(model="birds", prompt=[10**8])),
        (openai.BadRequestError, lambda: up.openai.embeddings.create(model="base", input="x")),
        (openai.AuthenticationError, up.openai.with_options(api_key="no").models.list),
    ):
        with pytest.raises(kind) as caught:
            call()
        body: Any = caught.value.body
        assert set(body) == {"message", "type", "param", "code"}
        assert not re.search(r"reft-v-|/|vllm|pydantic", body["message"].replace("https://", "")), body["message"]
    assert up.say("birds")


def test_damage_that_only_the_engine_sees_is_told(up: Up) -> None:
    files = {file.name: file.read_bytes() for file in (DEMO / "adapters" / "birds").iterdir()}
    tensors = files["reft_model.safetensors"]
    files["reft_model.safetensors"] = tensors[:-4] + b"\xff\xff\xff\x7f"
    answer = up.http.post("/v1/adapters", data={"name": "nan"}, files=[("files", item) for item in files.items()])
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "holds NaN or Inf" in message
    assert message.startswith("adapter nan cannot be used:")
    assert "/" not in message


def test_usage_equals_what_the_answers_said(up: Up) -> None:
    def counted() -> list[int]:
        found = [u for u in up.http.get("/v1/usage?group_by=model").json()["data"] if u["group"]["model"] == "speech@1"]
        return [found[0][name] for name in ("requests", "prompt_tokens", "completion_tokens")] if found else [0, 0, 0]

    before, told = counted(), [0, 0, 0]
    for tokens in (3, 9):
        answer = up.openai.completions.create(model="speech@1", prompt=PROMPT, max_tokens=tokens)
        assert answer.usage is not None
        told = [told[0] + 1, told[1] + answer.usage.prompt_tokens, told[2] + answer.usage.completion_tokens]
    assert [after - then for after, then in zip(counted(), before, strict=True)] == told


def test_dashboard_and_alerts_ask_for_metrics_that_are_there(up: Up) -> None:
    files = {file.name: file.read_bytes() for file in (DEMO / "adapters" / "cats").iterdir()}
    files["reft_model.safetensors"] = files["reft_model.safetensors"][:-4] + b"\xff\xff\xff\x7f"
    up.http.post("/v1/adapters", data={"name": "unloadable"}, files=[("files", item) for item in files.items()])
    tenant = up.http.post("/v1/admin/tenants", json={"name": "slow", "limits": {"requests_per_minute": 1}}).json()
    key = up.http.post(f"/v1/admin/tenants/{tenant['id']}/keys", json={"role": "inference"}).json()["secret"]
    body = {"model": "base", "prompt": "x", "max_tokens": 2}
    headers = {"authorization": f"Bearer {key}"}
    assert [up.http.post("/v1/completions", json=body, headers=headers).status_code for _ in range(2)] == [200, 429]
    for model in ("speech", "speech", "cats", "cats"):  # what the first leaves in the cache, the second finds there
        up.say(model, "Once upon a time there was a little girl. " * 20)

    def missing() -> list[str]:
        pages = [up.http.get(path).text for path in ("/metrics", "/v1/admin/engines/engine-0/metrics")]
        return unmet(pages, seldom=frozenset({"status"}), of=lambda metric: not metric.startswith("reft_worker_"))

    deadline = time.monotonic() + 15  # the engine asks its workers every five seconds
    while (told := missing()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert told == []


@pytest.mark.parametrize("block", [each for each in blocks("docs/quick-start.md") if each.how == "up"], ids=str)
def test_the_quick_start_does_what_it_says(up: Up, block: Block) -> None:
    code = block.code.replace("127.0.0.1:8080", up.url.removeprefix("http://")).replace("rk-...", up.key)
    command = [sys.executable, "-c", code] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"KEY": up.key}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert '"error"' not in ended.stdout
    assert "birds" in ended.stdout


def test_a_caller_that_leaves_frees_the_engine(up: Up) -> None:
    stream = up.openai.completions.create(
        model="birds", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    wait_for(lambda: up.http.get("/v1/admin/engines").json()["data"][0]["in_flight"] == 0, 5)

    def statuses() -> set[str]:
        return {each["group"]["status"] for each in up.http.get("/v1/usage?group_by=status").json()["data"]}

    wait_for(lambda: "cancelled" in statuses())


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("REFT_TEST_KILLS"), reason="starts an engine anew: REFT_TEST_KILLS=1 runs it")
def test_a_killed_engine_comes_back_and_adapters_with_it(up: Up) -> None:
    said = up.say("birds")
    pieces: list[Any] = []
    stream = up.openai.completions.create(
        model="birds", prompt=PROMPT, max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    pieces.append(next(stream))
    children = _children_of(up.process.pid)
    engine = next(pid for pid in children if b"api_server" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.killpg(engine, signal.SIGKILL)
    with pytest.raises(openai.APIError):
        take(stream, pieces)
    with pytest.raises(openai.InternalServerError):
        up.say("birds")
    wait_for(lambda: up._status("/health/ready") == 200, READY_SECONDS)
    assert up.say("birds") == said


def test_ctrl_c_ends_everything(up: Up) -> None:
    children = _children_of(up.process.pid)
    assert len(children) == 2
    up.stop()
    assert up.process.returncode == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def _children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
