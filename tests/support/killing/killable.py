"""Processes that are killed and started again, as a supervisor would do it; a fake and a real engine among them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import reft_serve.demo
from tests.support.gateway.harness import adapter_files

_TOKEN_SECONDS = 0.02
_DEMO = Path(reft_serve.demo.__file__).parent
_CORE = b"EngineCore"
_NOTICE_SECONDS = 60.0


class Kept:
    """A process that can be killed and is started again on its port."""

    def __init__(self, command: list[str], settings: dict[str, str], log: Path) -> None:
        self._command, self._settings, self._log = command, settings, log
        self._running = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                env=os.environ | self._settings,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def kill(self) -> None:
        """Kill -9 it with all that it has started, and start it again."""
        self.stop()
        self._running = self._start()

    def kill_core(self) -> None:
        """Kill -9 vLLM's EngineCore alone; once the server has noticed and ended, start it again."""
        (core,) = (pid for pid in _children(self._running.pid) if _CORE in _name(pid))
        os.kill(core, signal.SIGKILL)
        self._running.wait(_NOTICE_SECONDS)
        self.kill()

    def stop(self) -> None:
        """End it for good."""
        with suppress(ProcessLookupError):
            os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _name(pid: int) -> bytes:
    return Path(f"/proc/{pid}/comm").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()


@dataclass(frozen=True, slots=True)
class EngineKind:
    """An engine by its port, an adapter for it, the tokens of a stream, and how long it may take to start."""

    command: Callable[[int], list[str]]
    adapter: Callable[[], dict[str, bytes]]
    tokens: int
    start_seconds: float
    settings: dict[str, str] = field(default_factory=dict)


def _fake(port: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tests.support.gateway.engine_process",
        str(port),
        str(_TOKEN_SECONDS),
    ]


def _real(port: int) -> list[str]:
    return [
        str(Path(sys.executable).with_name("reft-serve")), "serve", str(_DEMO / "model"), "--host", "127.0.0.1",
        "--port", str(port), "--enable-lora", "--max-loras", "4", "--enforce-eager", "--dtype", "float32",
        "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(1 << 27),
    ]  # fmt: skip


def _shipped() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (_DEMO / "adapters" / "birds").iterdir()}


FAKE = EngineKind(_fake, lambda: adapter_files(1), 50, 60.0)
# So many that most have not left the engine yet when a share of them has come.
REAL = EngineKind(
    _real, _shipped, 400, 240.0, {"REFT_LORA": "off", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
)
