"""A served model asked every question of a data file over HTTP, and every answer kept. No torch.

Questions go to `/v1/completions` as text, so that the server tokenises them as training did. Each
answer is written as it comes; an interrupted run can be resumed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from openai import (
    APIError,
    AsyncOpenAI,
    AuthenticationError,
    DefaultAsyncHttpxClient,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
)

from reft_serve.datafiles.faults import Faults
from reft_serve.datafiles.formats import Instruction, Rows
from reft_serve.errors import ClientError, DataInvalid, ReftError, ServiceError
from reft_serve.evaluation.scoring import Score, Verdict, judge, score
from reft_serve.recipes.recipe import Task

__all__ = ["Prediction", "Question", "Server", "ask", "questions", "scores"]

_RETRIES = 4
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Question:
    """One row to ask, the `row`-th of its file. `task` names the set that it counts in."""

    file: str
    row: int
    line: int
    task: str
    instruction: str
    prompt: str
    reference: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """One line of the file of predictions; `instruction`, `output` and `generator` are AlpacaEval's
    names.

    `error` is the failure of a request that had no answer; the row is counted as wrong, and asked
    again on a resume.
    """

    file: str
    row: int
    line: int
    task: str
    instruction: str
    prompt: str
    reference: str
    generator: str
    output: str = ""
    finish_reason: str = ""
    extracted: str = ""
    correct: bool | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """Whom to ask: `url` with or without its /v1."""

    url: str
    model: str
    api_key: str = field(default="none", repr=False)
    concurrency: int = 32
    timeout: float = 600.0


def questions(rows: Rows, task: Task) -> list[Question]:
    """The questions of a checked file.

    Raises:
        DataInvalid: rows that the task has no question for, or no answer to compare with; all are
            listed.
    """
    faults = Faults()
    questions = []
    for number, (line, row) in enumerate(rows.rows, 1):
        try:
            instruction = row.instruction if isinstance(row, Instruction) else ""
            name = (row.task if isinstance(row, Instruction) else None) or Path(rows.where).stem
            questions.append(
                Question(
                    rows.where,
                    number,
                    line,
                    name,
                    instruction,
                    task.question(row),
                    task.reference(row),
                )
            )
        except ValueError as exc:
            faults.add(str(exc), line)
    if faults:
        raise DataInvalid(rows.where, faults.sentences())
    return questions


async def ask(
    server: Server,
    task: Task,
    asked: Sequence[Question],
    out: Path,
    *,
    resume: bool = False,
    on_answer: Callable[[Prediction], None] = lambda _: None,
) -> list[Prediction]:
    """Ask all questions, a prediction for each in their order, which `out` has too.

    Args:
        resume: keep the answers that `out` holds from a run that was broken off.
        on_answer: called after each answer, kept ones included.

    Raises:
        ClientError: `out` is there already and this is not a resume; or the server knows no such
            model or key.
        ServiceError: the server cannot be reached.
    """
    if out.exists() and not resume:
        raise ClientError(f"{out} already exists: continue with --resume, or choose another --out")
    done = _kept(out, server, asked) if resume else {}
    waiting = iter([question for question in asked if _key_of(question) not in done])

    async def work(client: AsyncOpenAI, file: IO[str]) -> None:
        for question in waiting:
            prediction = await _answer(client, server, task, question)
            done[_key_of(question)] = prediction
            file.write(_json(prediction))
            file.flush()
            on_answer(prediction)

    async with _client(server) as client:
        _save(out, list(done.values()))
        for prediction in done.values():
            on_answer(prediction)
        with out.open("a", encoding="utf-8") as file:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(server.concurrency):
                        group.create_task(work(client, file))
            except* ReftError as broken:
                raise broken.exceptions[0] from None
    ordered = [done[_key_of(question)] for question in asked]
    _save(out, ordered)
    return ordered


def scores(task: Task, predictions: Sequence[Prediction]) -> dict[str, Score]:
    """The score of each set, by its name."""
    sets: dict[str, list[tuple[Verdict, str]]] = {}
    for prediction in predictions:
        verdict = Verdict(prediction.extracted, prediction.correct)
        sets.setdefault(prediction.task, []).append((verdict, prediction.reference))
    return {name: score(task.metric, judged) for name, judged in sets.items()}


@asynccontextmanager
async def _client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    """A client of a server that answers. Raises ServiceError or ClientError if it does not."""
    root = server.url.rstrip("/")
    # A proxy that the environment names is not for loopback.
    http = DefaultAsyncHttpxClient(
        trust_env=urlsplit(root).hostname not in _LOOPBACK, timeout=server.timeout
    )
    url = root if root.endswith("/v1") else f"{root}/v1"
    async with AsyncOpenAI(
        base_url=url, api_key=server.api_key, max_retries=_RETRIES, http_client=http
    ) as client:
        try:
            await client.with_options(max_retries=0, timeout=30).models.list()
        except (AuthenticationError, PermissionDeniedError) as exc:
            raise ClientError(f"{url} rejects the key: {_reason(exc)}") from exc
        except OpenAIError as exc:
            raise ServiceError(
                f"{url} does not behave like an OpenAI server: {_reason(exc)}"
            ) from exc
        yield client


async def _answer(
    client: AsyncOpenAI, server: Server, task: Task, question: Question
) -> Prediction:
    empty = Prediction(**asdict(question), generator=server.model)
    more = {"repetition_penalty": task.repetition_penalty} if task.repetition_penalty != 1 else None
    try:
        response = await client.completions.create(
            model=server.model,
            prompt=question.prompt,
            max_tokens=task.max_new_tokens,
            temperature=0,
            extra_body=more,
        )
    except (NotFoundError, AuthenticationError, PermissionDeniedError) as exc:
        raise ClientError(f"the server rejects {server.model!r}: {_reason(exc)}") from exc
    except OpenAIError as exc:
        return replace(empty, error=_reason(exc), correct=None if task.metric == "none" else False)
    if not response.choices:
        return replace(
            empty,
            error="the response has no choice",
            correct=None if task.metric == "none" else False,
        )
    choice = response.choices[0]
    verdict = judge(task, choice.text, question.reference)
    return replace(
        empty,
        output=choice.text,
        finish_reason=choice.finish_reason or "",
        extracted=verdict.extracted,
        correct=verdict.correct,
    )


def _reason(exc: OpenAIError) -> str:
    """The server's own sentence, or the class of a failure that has none."""
    body = exc.body if isinstance(exc, APIError) else None
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or exc or type(exc).__name__)[:400]


def _kept(out: Path, server: Server, asked: Sequence[Question]) -> dict[_QuestionKey, Prediction]:
    """Predictions in `out` for these questions and this model. A truncated line is ignored."""
    wanted = {_key_of(question): question for question in asked}
    kept = {}
    for line in (
        out.read_text(encoding="utf-8", errors="replace").splitlines() if out.exists() else []
    ):
        try:
            prediction = Prediction(**json.loads(line))
        except (ValueError, TypeError):
            continue
        question = wanted.get((prediction.file, prediction.row))
        if question and not prediction.error and _answers(prediction, question, server):
            kept[_key_of(question)] = prediction
    return kept


def _answers(prediction: Prediction, question: Question, server: Server) -> bool:
    recorded = (prediction.generator, prediction.prompt, prediction.reference)
    return recorded == (server.model, question.prompt, question.reference)


def _save(out: Path, predictions: Sequence[Prediction]) -> None:
    """Write the whole file, or leave the old one."""
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text("".join(map(_json, predictions)), encoding="utf-8")
    partial.replace(out)


def _json(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"


_QuestionKey = tuple[str, int]


def _key_of(question: Question) -> _QuestionKey:
    return question.file, question.row
