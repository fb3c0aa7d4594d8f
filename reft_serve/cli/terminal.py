"""What `reft-serve up` shows a person: stages of the start, a line per request, the end of a log
after a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from reft_serve.cli.logfiles import LogFiles, Tail

__all__ = ["Terminal", "describe"]

_POLL_SECONDS = 0.1
_LAST_LINES = 15
_REPEAT_SECONDS = 60.0
_MOST_PATHS = 1000
# Characters of a path or of a model name.
_MOST_SHOWN = 200
_OPEN_PATHS = ("/health/", "/metrics")
# What vLLM logs when a stage begins. A stage that a model skips (compiling, with --enforce-eager)
# is not shown.
_STAGES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("load the model", re.compile(r"Starting to load model")),
    (
        "compile",
        re.compile(
            r"Warming up model for the compilation|Dynamo bytecode transform|vLLM's torch\.compile"
        ),
    ),
    (
        "warm up",
        re.compile(
            r"Warming up done|torch\.compile (took|takes)"
            r"|Capturing CUDA graphs|init engine \(profile"
        ),
    ),
    ("start the server", re.compile(r"Starting vLLM (API )?server")),
)


@dataclass(slots=True)
class _Stages:
    """The stage that the engine is in, and since when."""

    name: str
    begun: float
    reached: int = -1

    def see(self, line: str, now: float) -> tuple[str, float] | None:
        """The stage that this line of the engine's log ends, and its seconds; None if the stage
        continues.
        """
        for number, (name, pattern) in enumerate(_STAGES):
            if number > self.reached and pattern.search(line):
                ended = (self.name, now - self.begun)
                self.name, self.begun, self.reached = name, now, number
                return ended
        return None


class Terminal:
    """The output of `up` for a person. `follow` runs beside the processes; the other methods are
    called by `up`.
    """

    def __init__(
        self, console: Console, logs: LogFiles, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.logs = logs
        self._console = console
        self._clock = clock
        self._stages = _Stages("start vLLM", clock())
        self._status: Status | None = None
        self._starting = True
        self._begun_stopping = 0.0
        self._asked: dict[str, float] = {}
        self._tails = {name: Tail(logs.path(name)) for name in ("engine", "gateway", "worker")}

    def say(self, sentence: str) -> None:
        """Show a sentence."""
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def starting(self, model: str) -> None:
        """Say that the engine starts, and show the stage it is in."""
        self._console.print(Text.assemble("Starting ", (model, "bold")))
        self._stages.begun = self._clock()
        self._begin_status()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the spinner while something else writes to the terminal."""
        self._end_status()
        yield
        self._begin_status()

    def ready(self, seconds: float, url: str, command: str) -> None:
        """Say that requests can be sent to `url`, with a first command to paste."""
        self.look()
        if self._starting:
            self._end_stage(self._stages.name, self._clock() - self._stages.begun)
        self._end_status()
        self._starting = False
        self._console.print(
            Text.assemble((f"Ready after {seconds:.0f} s", "bold green"), f" at {url}. Try:\n")
        )
        self._console.print(f"    {command}\n", markup=False, highlight=False, soft_wrap=True)
        self.say(f"Logs: {self.logs.folder}; `reft-serve logs` follows them. Ctrl-C stops.")

    def stopping(self, seconds: float) -> None:
        """Say how long the end can take."""
        self._end_status()
        self._starting = False
        self._begun_stopping = self._clock()
        self.say(f"Stopping: what is under way has up to {seconds:.0f} s. Ctrl-C again stops now.")

    def stopped(self) -> None:
        """Say that everything has ended."""
        self.look()
        self.say(f"Stopped after {self._clock() - self._begun_stopping:.0f} s.")

    def failed(self, name: str, code: int, pause: float) -> None:
        """Say that a process ended, with the last lines of its log."""
        self._end_status()
        self._console.print(
            Text(f"The {name} ended with code {code}. The end of its log:", style="red")
        )
        for line in self.logs.last_lines(name, _LAST_LINES):
            self._console.print(
                f"    {_plain(line)}", style="dim", markup=False, highlight=False, soft_wrap=True
            )
        self.say(
            f"The whole log: {self.logs.path(name)}. Starting the {name} again in {pause:.0f} s."
        )
        if name == "engine" and self._starting:
            self._stages = _Stages("start vLLM", self._clock() + pause)
        self._begin_status()

    async def follow(self) -> None:
        """Show what the logs say, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_POLL_SECONDS)

    def look(self) -> None:
        """Show what the logs say since the last look."""
        for line in self._tails["engine"].read():
            ended = self._stages.see(line, self._clock()) if self._starting else None
            if ended is not None:
                self._end_stage(*ended)
                self._update_status()
        for name in ("gateway", "worker"):
            for line in self._tails[name].read():
                # While the engine starts, that it cannot be reached yet is no news.
                shown = describe(name, line, warnings=not self._starting)
                if shown is not None and not self._repeats(line):
                    self._console.print(shown, soft_wrap=True)
        self.logs.bound()

    def _repeats(self, line: str) -> bool:
        """True for a GET like one of the last minute: a client that waits for a job sends many."""
        record = _record(line) or {}
        if record.get("method") != "GET" or int(record.get("status") or 0) >= 400:
            return False
        path, now = str(record.get("path")), self._clock()
        if now - self._asked.get(path, -_REPEAT_SECONDS) < _REPEAT_SECONDS:
            return True
        if len(self._asked) >= _MOST_PATHS:
            self._asked.clear()
        self._asked[path] = now
        return False

    def _end_stage(self, name: str, seconds: float) -> None:
        self._console.print(
            Text.assemble(("  ok ", "green"), f"{name:18}", (f"{seconds:6.1f} s", "dim"))
        )

    def _begin_status(self) -> None:
        if self._starting and self._console.is_terminal:
            self._status = self._console.status(f"{self._stages.name} ...")
            self._status.start()

    def _update_status(self) -> None:
        if self._status is not None:
            self._status.update(f"{self._stages.name} ...")

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def describe(
    name: str, line: str, *, everything: bool = False, warnings: bool = True
) -> Text | None:
    """A line of the gateway's or a worker's log for a person.

    Args:
        name: of the process; shown before what is not a request.
        line: a JSON object, as `configure_logging` writes it; any other line is shown as it is with
            `everything`.
        everything: also what is neither a request nor a warning.
        warnings: False shows errors, not warnings.

    Returns:
        None for a line that is not shown.
    """
    record = _record(line)
    if record is None:
        return Text(f"{name}: {_plain(line)}") if everything else None
    when = (_clock_time(record.get("time")), "dim")
    if record["message"] == "request" and "path" in record:
        if str(record["path"]).startswith(_OPEN_PATHS) and not everything:
            return None
        return Text.assemble(when, "  ", *_request(record))
    style = {"warning": "yellow", "error": "red", "critical": "red"}.get(str(record.get("level")))
    if (style is None or (style == "yellow" and not warnings)) and not everything:
        return None
    text = Text.assemble(when, f"  {name}: ", (_plain(str(record["message"])), style or ""))
    if "exception" in record:
        last = str(record["exception"]).strip().splitlines()[-1]
        text.append(f" ({_plain(last)})", style=style)
    return text


def _request(record: dict[str, Any]) -> list[str | tuple[str, str]]:
    status = int(record.get("status") or 0)
    style = "red" if status >= 500 else "yellow" if status >= 400 else "green"
    words: list[str | tuple[str, str]] = [
        (f"{status}", style),
        f"  {_plain(str(record.get('method', ''))):4} {_plain(str(record['path']))[:_MOST_SHOWN]}",
        f"  {float(record.get('seconds') or 0):.2f} s",
    ]
    if record.get("model"):
        words.append((f"  {_plain(str(record['model']))[:_MOST_SHOWN]}", "bold"))
    if record.get("completion_tokens") is not None:
        words.append(f"  {record.get('prompt_tokens', 0)}+{record['completion_tokens']} tokens")
    return words


def _plain(text: str) -> str:
    """Without control characters: anybody can put a terminal's escape sequences into a path."""
    return "".join(
        each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text.expandtabs(4)
    )


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "message" in record else None


def _clock_time(written: object) -> str:
    """The local time of day of a log line's UTC time."""
    try:
        when = datetime.strptime(str(written)[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        return "--:--:--"
    return when.astimezone().strftime("%H:%M:%S")
