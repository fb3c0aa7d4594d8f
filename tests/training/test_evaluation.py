"""Scoring a served model over HTTP: every question is asked, every answer kept, every failure told."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reft_serve.cli.evaluate import evaluate
from reft_serve.errors import ClientError, DataInvalid, ReftError, ServiceError
from tests.support.training.evaluation import table

SUMS = [{"instruction": f"{a} + {b}?", "input": "", "output": f"It is {a + b}.", "answer": f"{a + b}.0", "task": name}
        for name, a, b in [("small", 1, 2), ("small", 2, 2), ("large", 20, 30), ("large", 7, 70)]]  # fmt: skip
app = typer.Typer()
app.command()(evaluate)


@app.callback()
def _root() -> None:
    """One verb, called by its name."""


class Api(ThreadingHTTPServer):
    """An OpenAI server that answers sums. `script` maps a part of a prompt to statuses of its first requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.script: dict[str, list[int]] = {}
        self.lock = threading.Lock()
        self.busy = self.most_busy = 0
        self.gate: threading.Barrier | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self) -> Counter[str]:
        return Counter(
            body["prompt"].split("Instruction:\n")[1].split("\n")[0] for body in self.bodies
        )


class _Handler(BaseHTTPRequestHandler):
    server: Api
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        refused = self.headers["Authorization"] == "Bearer wrong"
        self._send(401 if refused else 200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            statuses = next(
                (left for part, left in server.script.items() if part in body["prompt"]), []
            )
            status = statuses.pop(0) if statuses else 200
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        if server.gate:
            server.gate.wait(10)
        with server.lock:
            server.busy -= 1
        if body["model"] != "adder":
            status = 404
        text = str(eval(body["prompt"].split("Instruction:\n")[1].split("?")[0]))
        choice = {
            "index": 0,
            "text": f"The answer is {text}.",
            "finish_reason": "stop",
            "logprobs": None,
        }
        self._send(
            status,
            {
                "id": "1",
                "object": "text_completion",
                "created": 1,
                "model": "adder",
                "choices": [choice],
            },
        )

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        if status != 200:
            answer = {
                "error": {
                    "message": f"refused with {status}",
                    "type": "x",
                    "param": None,
                    "code": None,
                }
            }
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.json"
    path.write_text(json.dumps(SUMS))
    return path


def run(api: Api, *arguments: object, model: str = "adder", recipe: str = "math") -> Any:
    given = [
        "evaluate",
        "--recipe",
        recipe,
        "--model",
        model,
        "--url",
        api.url,
        *map(str, arguments),
    ]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "160"})
    if isinstance(result.exception, ReftError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_score_of_each_set_is_told_with_its_interval(
    api: Api, sums: Path, tmp_path: Path
) -> None:
    wrong = json.loads(sums.read_text())
    wrong[3]["answer"] = "8"
    sums.write_text(json.dumps(wrong))
    out = tmp_path / "out.jsonl"
    result = run(api, sums, "--out", out)
    assert result.exit_code == 0
    assert table(result.stdout) == [
        ["small", "2", "2", "100.0%", "34.2% to 100.0%", ""],
        ["large", "2", "1", "50.0%", "9.5% to 90.5%", ""],
    ]
    assert "mean of the 2 sets: 75.0%" in result.stdout
    assert "4 predictions written to" in result.stdout


def test_the_request_is_the_recipes(api: Api, sums: Path, tmp_path: Path) -> None:
    run(api, sums, "--out", tmp_path / "out.jsonl", "--limit", 1, "--api-key", "secret")
    assert api.bodies == [
        {
            "model": "adder",
            "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n1 + 2?\n\n### Response:\n",
            "max_tokens": 512,
            "temperature": 0,
        }
    ]
    assert api.keys == {"Bearer secret"}
    run(
        api,
        sums,
        "--out",
        tmp_path / "two.jsonl",
        "--limit",
        1,
        "--max-tokens",
        9,
        recipe="instruct",
    )
    assert (api.bodies[1]["max_tokens"], api.bodies[1]["repetition_penalty"]) == (9, 1.1)


def test_every_prediction_is_written_in_the_order_of_the_file(
    api: Api, sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(api, sums, "--out", out)
    written = predictions(out)
    assert [prediction["instruction"] for prediction in written] == [
        row["instruction"] for row in SUMS
    ]
    assert "### Instruction:\n20 + 30?\n" in written[2].pop("prompt")
    assert written[2] == {
        "file": str(sums), "row": 3, "line": 1, "task": "large", "instruction": "20 + 30?", "reference": "50.0",
        "generator": "adder", "output": "The answer is 50.", "finish_reason": "stop", "extracted": "50.", "correct": True,
        "error": "",
    }  # fmt: skip


def test_requests_run_at_once_up_to_the_concurrency(api: Api, sums: Path, tmp_path: Path) -> None:
    api.gate = threading.Barrier(2)  # each request waits for another one
    run(api, sums, "--out", tmp_path / "out.jsonl", "--concurrency", 2)
    assert api.most_busy == 2


def test_a_request_that_fails_for_a_moment_is_tried_again(
    api: Api, sums: Path, tmp_path: Path
) -> None:
    api.script = {"2 + 2": [500, 429, 503]}
    result = run(api, sums, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0
    assert api.asked()["2 + 2?"] == 4


def test_a_request_that_fails_for_good_is_told_counted_as_wrong_and_written(
    api: Api, sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    api.script = {"2 + 2": [400]}
    result = run(api, sums, "--out", out)
    assert result.exit_code == 1
    assert (
        f"error: 1 of 4 requests failed; they count as wrong. The first, {sums} line 1: refused with 400"
        in result.stderr
    )
    assert table(result.stdout)[0] == ["small", "2", "1", "50.0%", "9.5% to 90.5%", ""]
    failed = predictions(out)[1]
    assert (failed["error"], failed["correct"], failed["output"]) == ("refused with 400", False, "")


def test_a_run_that_was_broken_off_goes_on_where_it_stopped(
    api: Api, sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    api.script = {"2 + 2": [400]}
    run(api, sums, "--out", out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(
        "".join(lines[:2]) + lines[2][:40]
    )  # one answered, one failed, one cut off, one never asked
    api.bodies.clear()
    result = run(api, sums, "--out", out, "--resume")
    assert result.exit_code == 0
    assert api.asked() == {"2 + 2?": 1, "20 + 30?": 1, "7 + 70?": 1}
    assert [prediction["correct"] for prediction in predictions(out)] == [True] * 4


def test_a_resume_asks_again_what_has_changed(api: Api, sums: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(api, sums, "--out", out)
    changed = json.loads(sums.read_text())
    changed[0]["instruction"] = "1 + 3?"
    sums.write_text(json.dumps(changed))
    api.bodies.clear()
    run(api, sums, "--out", out, "--resume")
    assert api.asked() == {"1 + 3?": 1}


def test_predictions_that_are_there_already_are_not_overwritten(
    api: Api, sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(
        ClientError, match="already exists: continue with --resume, or choose another --out"
    ):
        run(api, sums, "--out", out)
    assert out.read_text() == "precious"
    assert api.bodies == []


def test_a_model_that_is_not_served_stops_the_run(api: Api, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="the server rejects 'nobody': refused with 404"):
        run(api, sums, "--out", tmp_path / "out.jsonl", "--concurrency", 1, model="nobody")
    assert len(api.bodies) == 1


def test_a_key_that_is_refused_stops_the_run(api: Api, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="rejects the key: refused with 401"):
        run(api, sums, "--out", tmp_path / "out.jsonl", "--api-key", "wrong")


def test_a_server_that_is_not_there_stops_the_run(api: Api, sums: Path, tmp_path: Path) -> None:
    api.url = "http://127.0.0.1:1/v1"
    with pytest.raises(
        ServiceError, match=r"http://127\.0\.0\.1:1/v1 does not behave like an OpenAI server"
    ):
        run(api, sums, "--out", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_damaged_file_is_told_before_anything_is_asked(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(
        '{"instruction": "1 + 1?", "output": "", "answer": "2"}\n{"instruction": "1 + 1?"}\n'
    )
    with pytest.raises(DataInvalid, match='line 2: has neither an "output" nor an "answer"'):
        run(api, path, "--out", tmp_path / "out.jsonl")
    path.write_text('{"instruction": "1 + 1?", "output": "", "answer": "2"}\n')
    with pytest.raises(DataInvalid, match='line 1: has no "sentence", which the recipe needs'):
        run(api, path, "--out", tmp_path / "out.jsonl", recipe="glue-cola")
    assert api.bodies == []


def test_answers_without_a_metric_are_written_in_alpacaevals_names(
    api: Api, sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    result = run(api, sums, "--out", out, recipe="instruct")
    assert "judge the predictions with AlpacaEval's annotator" in result.stdout
    assert {"instruction", "output", "generator"} <= set(predictions(out)[0])
    assert predictions(out)[0]["correct"] is None
