"""What `reft-serve up` and `reft-serve logs` show a person."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner

from reft_serve.cli.app import app
from reft_serve.cli.logfiles import LogFiles, Tail
from reft_serve.cli.terminal import Terminal, describe

_START = (
    "INFO 11-30 15:00:01 [core.py:134] Initializing a V1 LLM engine",
    "INFO 11-30 15:00:02 [cpu_model_runner.py:68] Starting to load model DIR...",
    "WARNING 11-30 15:00:02 [x.py:1] deprecated",
    "INFO 11-30 15:00:03 [cpu_model_runner.py:87] Warming up model for the compilation...",
    "INFO 11-30 15:00:23 [cpu_model_runner.py:91] Warming up done.",
    "INFO 11-30 15:00:24 [entry.py:140] Starting vLLM server on unix:x",
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _terminal(folder: Path) -> tuple[Terminal, LogFiles, io.StringIO, Clock]:
    logs, shown, clock = LogFiles(folder), io.StringIO(), Clock()
    logs.begin()
    return Terminal(Console(file=shown, width=200), logs, clock), logs, shown, clock


def _append(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def _request(**data: object) -> str:
    facts = {
        "time": "2026-11-30T15:00:00.000Z",
        "level": "info",
        "message": "request",
        "method": "POST",
    }
    return json.dumps(
        facts | {"path": "/v1/chat/completions", "status": 200, "seconds": 0.42} | data
    )


def test_the_stages_of_a_start_have_times_and_nothing_of_vllms_is_shown(tmp_path: Path) -> None:
    terminal, logs, shown, clock = _terminal(tmp_path)
    terminal.starting("smollm2")
    for line in _START:
        clock.now += 2
        _append(logs.path("engine"), line)
        terminal.look()
    clock.now += 1
    terminal.ready(13, "http://127.0.0.1:8080/v1", "curl URL")
    words = shown.getvalue()
    assert [line.split()[1:-2] for line in words.splitlines() if line.startswith("  ok")] == [
        ["start", "vLLM"],
        ["load", "the", "model"],
        ["compile"],
        ["warm", "up"],
        ["start", "the", "server"],
    ]
    assert [line.split()[-2] for line in words.splitlines() if line.startswith("  ok")] == [
        "4.0",
        "4.0",
        "2.0",
        "2.0",
        "1.0",
    ]
    assert "Ready after 13 s at http://127.0.0.1:8080/v1. Try:" in words
    assert "    curl URL\n" in words
    assert str(logs.folder) in words
    assert "deprecated" not in words


def test_a_failed_start_shows_the_end_of_its_log_and_where_it_lies(tmp_path: Path) -> None:
    terminal, logs, shown, _ = _terminal(tmp_path)
    terminal.starting("m")
    _append(logs.path("engine"), *(f"line {n}" for n in range(40)), "ValueError: no such model")
    terminal.failed("engine", 1, 2.0)
    words = shown.getvalue()
    assert "The engine ended with code 1" in words
    assert "ValueError: no such model" in words
    assert "line 20" not in words
    assert f"The whole log: {logs.path('engine')}. Starting the engine again in 2 s." in words


def test_a_request_is_one_short_line(tmp_path: Path) -> None:
    terminal, logs, shown, _ = _terminal(tmp_path)
    _append(
        logs.path("gateway"),
        json.dumps({"level": "warning", "message": "an engine cannot be used"}),
    )
    terminal.ready(1, "URL", "curl")
    assert "engine" not in shown.getvalue().replace(str(logs.folder), "")
    shown.truncate(0)
    _append(
        logs.path("gateway"),
        _request(model="emoji", prompt_tokens=31, completion_tokens=12),
        _request(path="/health/ready", method="GET"),
        json.dumps({"time": "2026-11-30T15:00:00.000Z", "level": "info", "message": "listening"}),
        json.dumps(
            {"time": "2026-11-30T15:00:00.000Z", "level": "warning", "message": "slow [disk]"}
        ),
        "not JSON",
    )
    terminal.look()
    first, second = shown.getvalue().replace("\0", "").splitlines()
    assert first.split()[1:] == [
        "200",
        "POST",
        "/v1/chat/completions",
        "0.42",
        "s",
        "emoji",
        "31+12",
        "tokens",
    ]
    assert second.endswith("gateway: slow [disk]")


def test_a_get_that_repeats_is_shown_once_a_minute(tmp_path: Path) -> None:
    terminal, logs, shown, clock = _terminal(tmp_path)
    job: dict[str, Any] = {"method": "GET", "path": "/v1/fine_tuning/jobs/a"}
    for seconds, requests in (
        (0, [job, job, job | {"path": "/v1/models"}, job | {"status": 404}]),
        (59, [job, job | {"method": "POST"}, job | {"status": 404}]),
        (61, [job, job]),
    ):
        clock.now = seconds
        _append(logs.path("gateway"), *(_request(**each) for each in requests))
        terminal.look()
    assert [line.split()[1:4] for line in shown.getvalue().splitlines()] == [
        ["200", "GET", "/v1/fine_tuning/jobs/a"],
        ["200", "GET", "/v1/models"],
        ["404", "GET", "/v1/fine_tuning/jobs/a"],
        ["200", "POST", "/v1/fine_tuning/jobs/a"],
        ["404", "GET", "/v1/fine_tuning/jobs/a"],
        ["200", "GET", "/v1/fine_tuning/jobs/a"],
    ]


def test_an_exception_is_shown_by_its_last_line() -> None:
    line = json.dumps(
        {"level": "error", "message": "failed", "exception": "Traceback\n  x\nValueError: bad\n"}
    )
    shown = describe("worker", line)
    assert shown is not None
    assert shown.plain.endswith("worker: failed (ValueError: bad)")


def test_an_escape_sequence_of_a_caller_reaches_no_terminal(tmp_path: Path) -> None:
    hostile = "/v1/\x1b]0;owned\x07\x1b[2J" + 300 * "a"
    for record in (_request(path=hostile, model=hostile), _request(message=hostile)):
        text = describe("gateway", record, everything=True)
        assert text is not None
        assert text.plain.isprintable()
        assert "/v1/" in text.plain
    line = describe("engine", "\x1b[31mred", everything=True)
    assert line is not None
    assert line.plain.isprintable()
    terminal, logs, shown, _ = _terminal(tmp_path)
    _append(logs.path("engine"), "Error: \x1b[2J")
    terminal.failed("engine", 1, 2.0)
    assert "\x1b" not in shown.getvalue()


def test_a_tail_gives_whole_lines_also_after_a_log_was_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("a\nb\nc")
    tail, last = Tail(path), Tail(path, last=2)
    assert list(tail.read()) == ["a", "b"]
    assert list(last.read()) == ["b"]
    _append(path, "d")
    assert list(tail.read()) == ["cd"]
    path.write_text("e\n")  # shorter than what was read
    assert list(tail.read()) == ["e"]
    path.unlink()
    assert list(tail.read()) == []


def test_logs_of_the_run_before_are_kept_and_each_is_private(tmp_path: Path) -> None:
    logs = LogFiles(tmp_path)
    logs.begin()
    _append(logs.path("engine"), "old")
    logs.begin()
    assert logs.path("engine").read_text() == ""
    assert logs.path("engine").with_name("engine.log.1").read_text() == "old\n"
    assert logs.folder.stat().st_mode & 0o077 == 0
    assert logs.path("gateway").stat().st_mode & 0o077 == 0


def test_logs_shows_all_or_one_and_says_if_there_are_none(tmp_path: Path) -> None:
    runner = CliRunner()
    none = runner.invoke(app, ["logs", "--data", str(tmp_path), "--no-follow"])
    assert none.exit_code == 1
    assert "there are no logs in" in none.output
    logs = LogFiles(tmp_path)
    logs.begin()
    _append(logs.path("engine"), "INFO loading")
    _append(logs.path("gateway"), _request())
    both = runner.invoke(app, ["logs", "--data", str(tmp_path), "--no-follow"])
    assert "engine: INFO loading" in both.output
    assert "200  POST /v1/chat/completions" in both.output
    one = runner.invoke(app, ["logs", "gateway", "--raw", "--data", str(tmp_path), "--no-follow"])
    assert one.output == _request() + "\n"
