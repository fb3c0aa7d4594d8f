"""`reft-serve up` as a process, with the shipped model and a real engine, and what its clients need."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import reft_serve.demo

DEMO = Path(reft_serve.demo.__file__).parent
READY_SECONDS = 400
PROMPT = "Once upon a time there was a little"
# Unlike the shipped model's own it shows tools.
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if tools %}{{ tools | tojson }} {% endif %}"


class Up:
    """One `reft-serve up` process and its first key. `flags` go to it, `settings` to its environment.

    Its engine compiles nothing, which saves a minute; `scripts/demo` runs one that does.

    `program` is another installation's `reft-serve`, which runs in `folder`; None: this one. `model`: the base; the shipped
    one unless given.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        program: Path | None = None,
        model: Path | None = None,
        **settings: str,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "up.log"
        up = [str(program), "up"] if program else [sys.executable, "-m", "reft_serve.cli.up"]
        up += [] if model is None else [str(model)]
        command = [*up, "--data", str(folder / "data"), "--port", str(self.port)]
        command += ["--dtype", "float32", "--max-num-seqs", "64", "--enforce-eager", *flags]
        given = {"REFT_LORA": "off", "REFT_CACHE_SECONDS": "0.5", **settings}
        begun = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | given,
                cwd=folder if program else None,
            )
        self._probe = httpx.Client(base_url=self.url, timeout=5, trust_env=False)
        while self.status("/health/ready") != 200:
            if self.process.poll() is not None or time.monotonic() > begun + READY_SECONDS:
                self.stop()
                pytest.fail(f"`up` did not become ready:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - begun
        found = re.search(r"rk-[\w-]{43}", self.log.read_text())
        assert found, "the first key was not shown"
        self.key = found[0]
        self.http = self.client(self.key)
        self.openai = self.sdk(self.key)

    @classmethod
    def able(cls, folder: Path, collector: str) -> Up:
        """One that calls tools, answers in a format, tells a collector, and reads long prompts in pieces."""
        (folder / "template.jinja").write_text(TEMPLATE)
        return cls(
            folder, "--tool-call-parser", "hermes", "--enable-auto-tool-choice",
            "--chat-template", str(folder / "template.jinja"), "--max-num-batched-tokens", "512",
            "--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}',
            REFT_OTLP_ENDPOINT=collector, OTEL_BSP_SCHEDULE_DELAY="200",
        )  # fmt: skip

    def client(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def sdk(self, key: str) -> openai.OpenAI:
        transport = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, http_client=transport
        )

    def status(self, path: str) -> int:
        """What a path answers without a key; 0 where nothing does."""
        try:
            return self._probe.get(path).status_code
        except httpx.HTTPError:
            return 0

    def upload(self, name: str, public: str = "", **form: str) -> httpx.Response:
        """Publish one of the shipped adapters, under its own name or another."""
        files = [
            ("files", (file.name, file.read_bytes()))
            for file in sorted((DEMO / "adapters" / name).iterdir())
        ]
        return self.http.post("/v1/adapters", data={"name": public or name, **form}, files=files)

    def say(self, model: str, prompt: Any = PROMPT, **options: Any) -> str:
        given = {"max_tokens": 12, "temperature": 0} | options
        text: str = (
            self.openai.completions.create(model=model, prompt=prompt, **given).choices[0].text
        )
        return text

    def children(self) -> list[int]:
        """The processes that it watches over."""
        return [
            int(pid)
            for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            .read_text()
            .split()
        ]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
