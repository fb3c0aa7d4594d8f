"""vLLM's OpenAI server with the plugin, as a process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters.damage import MAX_BYTES, MAX_RANK, MODEL, write_good

READY_SECONDS = 400


class Server:
    """vLLM's own server, with nothing of ours on the command line, and without a compiler."""

    def __init__(self, folder: Path, *arguments: str, ready_seconds: float = READY_SECONDS) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "server.log"
        self.good = folder / "good"
        write_good(self.good)
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--served-model-name", "base",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enable-lora", "--max-loras", "4", "--enforce-eager",
            "--lora-modules", f"good={self.good}", *arguments,
        ]  # fmt: skip
        settings = {
            "REFT_MAX_RANK": str(MAX_RANK),
            "REFT_MAX_ADAPTER_BYTES": str(MAX_BYTES),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | settings, stdout=log, stderr=log
            )
        deadline = time.monotonic() + ready_seconds
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def load(self, name: str, path: Path, *, again: bool = False) -> tuple[int, dict[str, Any]]:
        """POST /v1/load_lora_adapter: the status and the answer's JSON, {} where it has none."""
        body = json.dumps(
            {"lora_name": name, "lora_path": str(path), "load_inplace": again}
        ).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, {}
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
