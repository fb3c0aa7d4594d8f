"""The process that compiles grammars first, for a verdict: it forks a child with limits for each.

A child that needs too much memory or time ends alone. Imports neither vllm nor torch; run as
`python -m reft_serve.engine.grammar_compiler.process FD`, ends when its socket is closed, and its
children end with it.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from typing import Any

import llguidance

from reft_serve.engine.grammar_compiler.closed_schemas import closed
from reft_serve.errors import RequestInvalid
from reft_serve.parent import end_with_parent

__all__ = [
    "AT_ONCE",
    "CPU_SECONDS",
    "KEPT_VERDICTS",
    "LIMITS",
    "MATCHING_SECONDS",
    "MAX_GRAMMAR_MEMORY",
    "MAX_LEXER_STATES",
    "MAX_MEMORY",
    "MAX_SYMBOLS",
    "STEP_ITEMS",
    "STEP_SECONDS",
    "TOKEN_SECONDS",
    "WAITING_PER_CALLER",
    "WALL_SECONDS",
    "read_message",
    "schema_options",
    "send_message",
    "serialise",
]

# What compiling one grammar may take, in its child.
CPU_SECONDS = 0.7
WALL_SECONDS = 5.0
MAX_MEMORY = 512 * 1024 * 1024
# What a compiled grammar may hold: the engine keeps it while its requests run.
MAX_GRAMMAR_MEMORY = 64 * 1024 * 1024
# Bounds of the matcher itself, which hold in every step of the engine.
STEP_ITEMS = 5_000
MAX_SYMBOLS = 100_000
MAX_LEXER_STATES = 50_000
# Children that compile at one time, what may wait for them of one caller, and verdicts that are
# remembered.
AT_ONCE = 2
WAITING_PER_CALLER = 64
KEPT_VERDICTS = 1_024
# Processor time for matching one request: at first, and for each of its tokens; and for all
# requests of one step.
MATCHING_SECONDS = 0.25
TOKEN_SECONDS = 0.002
STEP_SECONDS = 0.04
# Between the elements of JSON: regular expressions. Free white space would let small models pad
# until their tokens end.
_SEPARATORS = {"item_separator": r",\x20?", "key_separator": r":\x20?"}
_LEXER_FUEL = 500_000
_STEP_LEXER_FUEL = 50_000
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=_LEXER_FUEL,
    step_lexer_fuel=_STEP_LEXER_FUEL,
    step_max_items=STEP_ITEMS,
    max_lexer_states=MAX_LEXER_STATES,
    max_grammar_size=MAX_SYMBOLS,
    verbose_errors=False,
)
# Tokens that a child tries, and what matching one may cost after the first, which the engine
# prepares off its loop.
_WALKS = 3
_WALK_TOKENS = 24
_TOKEN_SECONDS = 0.02


def schema_options(*, white_space: bool) -> dict[str, Any]:
    """The options of JSON schemas: one line, with a space after a comma or a colon where
    `white_space` allows it.
    """
    return {"whitespace_flexible": False, **(_SEPARATORS if white_space else {})}


def serialise(kind: Any, text: str, options: Any) -> str:
    """A constraint in llguidance's own form. `kind` is a field of `structured_outputs`; `options`
    are of JSON schemas.

    Raises:
        RequestInvalid: it cannot be understood.
    """
    matcher = llguidance.LLMatcher
    try:
        if kind == "json_object":
            return matcher.grammar_from_json_schema('{"type": "object"}', defaults=options)
        if kind == "json":
            return matcher.grammar_from_json_schema(
                json.dumps(closed(json.loads(text))), defaults=options
            )
        if kind == "structural_tag":
            return _tags(json.loads(text), options)
        if kind == "choice":  # one lexeme, since rows of the parser hold fewer alternatives
            return "start: CHOICE\nCHOICE: " + " | ".join(
                json.dumps(choice) for choice in json.loads(text)
            )
        return llguidance.grammar_from(kind, text)
    except RequestInvalid:
        raise
    except Exception as exc:  # of several parsers, some written in Python
        raise RequestInvalid(f"{kind} is not valid: {str(exc)[:500]}") from exc


def _tags(tag: dict[str, Any], options: Any) -> str:
    if "structures" not in tag:
        raise RequestInvalid("structural_tag is supported with `triggers` and `structures` only")
    triggers = tag["triggers"]
    tags = []
    for structure in tag["structures"]:
        begin = structure["begin"]
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise RequestInvalid(f"structural_tag: no trigger begins {begin[:100]!r}")
        schema = llguidance.LLMatcher.grammar_from_json_schema(
            closed(structure["schema"]), defaults=options
        )
        tags.append(
            llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=structure["end"])
        )
    return llguidance.StructTag.to_grammar(tags)


def judge(tokenizer: llguidance.LLTokenizer, request: dict[str, Any]) -> dict[str, str]:
    """Compile and try a constraint: its `grammar`, or the `fault` that it has."""
    before = _resident()
    try:
        grammar = serialise(request["kind"], request["text"], request["options"])
    except RequestInvalid as exc:
        return {"fault": str(exc)}
    compiled = llguidance.LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)
    fault = compiled.get_error() or _walk(compiled)
    if fault:
        return {"fault": f"{request['kind']} cannot be used: {fault.partition(chr(10))[0][:500]}"}
    if _resident() - before > MAX_GRAMMAR_MEMORY:
        return {
            "fault": f"{request['kind']} is too large: it takes more than "
            f"{MAX_GRAMMAR_MEMORY >> 20} MiB compiled"
        }
    return {"grammar": grammar}


def _walk(compiled: llguidance.LLMatcher) -> str:
    """Generate random tokens that the grammar allows, and return the failure, if any."""
    chosen = random.Random(0)  # noqa: S311 - the same verdict each time
    compiled.compute_bitmask()
    for _ in range(_WALKS):
        matcher = compiled.deep_copy()
        for _ in range(_WALK_TOKENS):
            if matcher.is_stopped():
                break
            began = time.process_time()
            token = _allowed(matcher.compute_bitmask(), chosen)
            if token is None or not matcher.consume_token(token):
                break
            if time.process_time() - began > _TOKEN_SECONDS:
                return (
                    f"a token takes more than {_TOKEN_SECONDS * 1000:g} ms to match; it is too "
                    "large or too ambiguous"
                )
        if matcher.is_error():
            return str(matcher.get_error())
    return ""


def _allowed(mask: bytes, chosen: random.Random) -> int | None:
    """Any token of a mask of bits."""
    start: int = chosen.randrange(len(mask))
    for at in itertools.chain(range(start, len(mask)), range(start)):
        if mask[at]:
            return at * 8 + chosen.choice([bit for bit in range(8) if mask[at] >> bit & 1])
    return None


def main(fd: int) -> None:
    """Fork a child for every socket that comes over this one, until it is closed."""
    control = socket.socket(fileno=fd)
    tokenizer = _tokenizer(json.loads(read_message(control)))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, which the server handles
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            _serve(tokenizer, fds[0])
        os.close(fds[0])


def _serve(tokenizer: llguidance.LLTokenizer, fd: int) -> None:
    try:
        _limit_itself()
        with socket.socket(fileno=fd) as caller:
            request = json.loads(read_message(caller))
            _end_with(caller)
            send_message(caller, json.dumps(judge(tokenizer, request)).encode())
    finally:
        os._exit(0)


def _limit_itself() -> None:
    end_with_parent()
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115 - it is about to exit
    allowed = pages * resource.getpagesize() + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The kernel ends the process, whatever it is doing.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_with(caller: socket.socket) -> None:
    """Have the kernel end this process when the other side of the socket is closed."""
    fcntl.fcntl(caller, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(caller, fcntl.F_SETFL, fcntl.fcntl(caller, fcntl.F_GETFL) | os.O_ASYNC)


def _tokenizer(facts: dict[str, Any]) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(
        facts["tokenizer"], n_vocab=facts["n_vocab"], eos_token=facts["eos"]
    )


def _resident() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()


def send_message(sock: socket.socket, message: bytes) -> None:
    """Send a message with its length."""
    sock.sendall(len(message).to_bytes(8, "little") + message)


def read_message(sock: socket.socket) -> bytes:
    """Read a message.

    Raises:
        EOFError: the other side closed the socket first.
    """
    return _read(sock, int.from_bytes(_read(sock, 8), "little"))


def _read(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    main(int(sys.argv[1]))
