"""The front end's side of structured outputs: each is compiled in a child process before the engine
core may see it.

A few children run at once, callers take turns, and verdicts are remembered. What passes continues
in llguidance's own form, so that the core reads neither schemas nor grammars.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, InvalidStateError
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerFast
from vllm.config import VllmConfig
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.request import get_structured_output_key

from reft_serve.engine.core.grammars import BACKEND, EXCEEDED
from reft_serve.engine.grammar_compiler.process import (
    AT_ONCE,
    CPU_SECONDS,
    KEPT_VERDICTS,
    MAX_MEMORY,
    WAITING_PER_CALLER,
    WALL_SECONDS,
    read_message,
    schema_options,
    send_message,
)
from reft_serve.errors import RequestInvalid
from reft_serve.structured_outputs import check_constraint

__all__ = ["GrammarChecks", "checks_of"]

_KEPT_BYTES = 32 * 1024 * 1024
_START_SECONDS = 60.0
_TOO_COSTLY = (
    f"is too costly: compiling it takes more than {CPU_SECONDS:g} s of processor time or "
    f"{MAX_MEMORY >> 20} MiB"
)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A constraint in the core's form, or why it is refused."""

    grammar: str = ""
    fault: str = ""
    lasting: bool = True


@dataclass(slots=True, eq=False)
class _Job:
    digest: str
    kind: str
    request: bytes
    caller: str
    waiting: list[Future[_Verdict]] = field(default_factory=list)
    connection: socket.socket | None = None


class GrammarChecks:
    """Compiles constraints in children of one process, which ends with this object or its process.

    Args:
        tokenizer: what `LLTokenizer` is made from, as JSON: `tokenizer`, `n_vocab`, `eos`.
        options: of JSON schemas, as `serialise` takes them.
    """

    def __init__(self, tokenizer: dict[str, Any], options: dict[str, Any]) -> None:
        self._tokenizer = json.dumps(tokenizer).encode()
        self._options = options
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._verdicts: OrderedDict[str, _Verdict] = OrderedDict()
        self._bytes = 0
        self._threads = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        threading.Thread(target=self._start, name="reft-grammar-start", daemon=True).start()

    def submit(self, params: StructuredOutputsParams, caller: str) -> Future[_Verdict]:
        """Begin to check a constraint. Cancelling the future ends the work if no other request
        waits for it.

        Raises:
            VLLMValidationError: a bound of `reft_serve.structured_outputs` is exceeded.
            QueueOverflowError: too many of this caller are waiting.
        """
        kind, text = self._read(params)
        digest = hashlib.sha256(f"{kind}\0{text}".encode(errors="surrogatepass")).hexdigest()
        future: Future[_Verdict] = Future()
        with self._lock:
            if (known := self._verdicts.get(digest)) is not None:
                self._verdicts.move_to_end(digest)
                future.set_result(known)
                return future
            job = self._jobs.get(digest)
            if job is None:
                job = self._enqueue(_Job(digest, kind, self._request(kind, text), caller))
            job.waiting.append(future)
        future.add_done_callback(lambda done: self._leave(job, done) if done.cancelled() else None)
        return future

    def condemn(self, params: StructuredOutputsParams) -> None:
        """Refuse from now on what exceeded its bound while it was matched."""
        kind, text = self._read(params)
        digest = hashlib.sha256(f"{kind}\0{text}".encode(errors="surrogatepass")).hexdigest()
        with self._lock:
            self._keep(digest, _Verdict(fault=f"{kind} {EXCEEDED}"))

    def _read(self, params: StructuredOutputsParams) -> tuple[str, str]:
        for kind in ("json", "regex", "choice", "grammar", "structural_tag"):
            if (spec := getattr(params, kind)) is not None:
                try:
                    check_constraint(kind, spec)
                except RequestInvalid as exc:
                    raise VLLMValidationError(str(exc)) from exc
                break
        option, text = get_structured_output_key(params)
        return option.name.lower(), text

    def _request(self, kind: str, text: str) -> bytes:
        return json.dumps({"kind": kind, "text": text, "options": self._options}).encode()

    def _enqueue(self, job: _Job) -> _Job:
        queue = self._queues.setdefault(job.caller, deque())
        if len(queue) >= WAITING_PER_CALLER:
            raise QueueOverflowError
        queue.append(job)
        self._jobs[job.digest] = job
        if self._threads < AT_ONCE:
            self._threads += 1
            threading.Thread(target=self._work, name="reft-grammar", daemon=True).start()
        return job

    def _leave(self, job: _Job, future: Future[_Verdict]) -> None:
        with self._lock:
            if future in job.waiting:
                job.waiting.remove(future)
            if job.waiting or self._jobs.get(job.digest) is not job:
                return
            del self._jobs[job.digest]
            if job.connection is not None:
                job.connection.shutdown(socket.SHUT_RDWR)

    def _next(self) -> _Job | None:
        """The next job, of the caller that has waited longest; None ends the thread."""
        with self._lock:
            while self._queues:
                caller, queue = self._queues.popitem(last=False)
                job = queue.popleft()
                if queue:
                    self._queues[caller] = queue
                if self._jobs.get(job.digest) is job:
                    return job
            self._threads -= 1
            return None

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                verdict = self._judge(job)
            except OSError as exc:
                verdict = _Verdict(fault=f"{job.kind} could not be compiled: {exc}", lasting=False)
            with self._lock:
                if self._jobs.get(job.digest) is not job:
                    continue  # everybody left
                del self._jobs[job.digest]
                if verdict.lasting:
                    self._keep(job.digest, verdict)
                waiting = job.waiting
                job.waiting = []
            for future in waiting:
                try:
                    future.set_result(verdict)
                except InvalidStateError:  # it was cancelled in this moment
                    continue

    def _keep(self, digest: str, verdict: _Verdict) -> None:
        self._verdicts[digest] = verdict
        self._verdicts.move_to_end(digest)
        self._bytes += len(verdict.grammar)
        while len(self._verdicts) > KEPT_VERDICTS or self._bytes > _KEPT_BYTES:
            self._bytes -= len(self._verdicts.popitem(last=False)[1].grammar)

    def _judge(self, job: _Job) -> _Verdict:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                control = self._start()
                with self._lock:
                    if self._jobs.get(job.digest) is not job:
                        return _Verdict()
                    job.connection = ours
                socket.send_fds(control, [b"."], [theirs.fileno()])
            began = time.monotonic()
            try:
                send_message(ours, job.request)
                ours.settimeout(_START_SECONDS)
                began = time.monotonic()
                answer = json.loads(read_message(ours))
            except (EOFError, OSError):
                lasting = time.monotonic() - began < WALL_SECONDS - 0.5
                return _Verdict(fault=f"{job.kind} {_TOO_COSTLY}", lasting=lasting)
            finally:
                with self._lock:
                    job.connection = None
        return _Verdict(answer.get("grammar", ""), answer.get("fault", ""))

    def _start(self) -> socket.socket:
        """The socket of the process, which is started if it does not run."""
        with _STARTING:
            if (
                self._control is not None
                and self._process is not None
                and self._process.poll() is None
            ):
                return self._control
            ours, theirs = socket.socketpair()
            with theirs:
                command = [
                    sys.executable,
                    "-m",
                    "reft_serve.engine.grammar_compiler.process",
                    str(theirs.fileno()),
                ]
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                )
            self._control = ours
            weakref.finalize(self, ours.close)
            send_message(ours, self._tokenizer)
            return ours


_STARTING = threading.Lock()
# by input processor
_checks: weakref.WeakKeyDictionary[Any, GrammarChecks] = weakref.WeakKeyDictionary()


def checks_of(processor: Any) -> GrammarChecks | None:
    """The checks of a front end, given its input processor; None if vLLM is left as it is."""
    return _checks.get(processor)


def wrap_validate_guidance_grammar(_: Any) -> Callable[..., None]:
    """In place of `validate_guidance_grammar`, which compiles in the front end's own process and
    without bounds.
    """
    return lambda *_, **__: None


def wrap_input_processor_init(original: Any) -> Callable[..., None]:
    """Around `InputProcessor.__init__`: start the process early, since it reads the tokenizer."""

    def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        config = vllm_config.structured_outputs_config
        generates = vllm_config.model_config.runner_type != "pooling"
        if generates and config.backend == BACKEND and self.tokenizer is not None:
            options = schema_options(white_space=not config.disable_any_whitespace)
            _checks[self] = GrammarChecks(_tokenizer_facts(self.tokenizer, vllm_config), options)

    return init


def _tokenizer_facts(tokenizer: Any, config: VllmConfig) -> dict[str, Any]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return {"tokenizer": "byte", "n_vocab": None, "eos": None}
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    size = max(config.model_config.get_vocab_size(), len(tokenizer))
    return {"tokenizer": backend.to_str(), "n_vocab": size, "eos": tokenizer.eos_token_id}


def _constraint(params: Any) -> StructuredOutputsParams | None:
    constraint = params.structured_outputs if isinstance(params, SamplingParams) else None
    if constraint is None or constraint.all_constraints_none() or constraint.json_object is False:
        return None
    return constraint


def sending_compiled(request: Any, verdict: Future[_Verdict]) -> None:
    """Put what was compiled in the place of the constraint.

    Raises:
        VLLMValidationError: it was refused.
    """
    checked = verdict.result()
    if checked.fault:
        raise VLLMValidationError(checked.fault)
    params = request.sampling_params
    backend = params.structured_outputs._backend
    emptied: dict[str, Any] = dict.fromkeys(
        ("json", "regex", "choice", "json_object", "structural_tag")
    )
    params.structured_outputs = replace(
        params.structured_outputs, grammar=checked.grammar, **emptied
    )
    params.structured_outputs._backend = backend


def wrap_process_inputs(original: Any) -> Callable[..., Any]:
    """Around `InputProcessor.process_inputs`, after vLLM's own checks: only what was compiled
    continues to the core.

    On a server the verdict is known by now; elsewhere this waits for it.
    """

    def process_inputs(
        self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        constraint = _constraint(params)
        checks = checks_of(self)
        if constraint is None or checks is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        verdict = checks.submit(constraint, _caller(prompt))
        request = original(self, request_id, prompt, params, *args, **kwargs)
        sending_compiled(request, verdict)
        return request

    return process_inputs


def _caller(prompt: Any) -> str:
    """The tenant for fair scheduling: a gateway gives each tenant its own cache salt."""
    return str(prompt.get("cache_salt") or "") if isinstance(prompt, dict) else ""


def wrap_generate(original: Any) -> Callable[..., AsyncIterator[Any]]:
    """Around `AsyncLLM.generate`: await the verdict, and report a bound that was exceeded while
    matching.
    """

    def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        constraint = _constraint(sampling_params)
        checks = checks_of(self.input_processor)
        if constraint is None or checks is None:
            answers: AsyncIterator[Any] = original(self, prompt, sampling_params, *args, **kwargs)
            return answers
        return _checked(
            checks,
            constraint,
            _caller(prompt),
            lambda: original(self, prompt, sampling_params, *args, **kwargs),
        )

    return generate


async def _checked(
    checks: GrammarChecks,
    constraint: StructuredOutputsParams,
    caller: str,
    generate: Callable[[], Any],
) -> AsyncIterator[Any]:
    verdict = await asyncio.wrap_future(checks.submit(constraint, caller))
    if verdict.fault:
        raise VLLMValidationError(verdict.fault)
    answers = generate()
    try:
        async for answer in answers:
            if any(output.stop_reason == EXCEEDED for output in getattr(answer, "outputs", ())):
                checks.condemn(constraint)
                raise VLLMValidationError(f"the structured output {EXCEEDED}")
            yield answer
    finally:
        await answers.aclose()
