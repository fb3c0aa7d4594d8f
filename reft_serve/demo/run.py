"""The demonstration: `python -m reft_serve.demo.run`. Five ReFT adapters and their base answer in
one batch.

Exit code 0 only if every request was answered, every adapter changed its base's answers, and every
greedy answer is the same alone as it was in the batch.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from openai import APIError, AsyncOpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reft_serve.demo.behaviours import ADAPTERS, BEHAVIOURS, MODEL, Behaviour
from reft_serve.demo.server import serving
from reft_serve.errors import ServiceError

__all__ = ["BASE", "Answer", "Ask", "faults_of", "main"]

BASE = "base"
_PROMPTS = (
    "Once upon a time, there was a little girl who had a big red hat.",
    "Ben and his mom went to the park on a sunny day.",
    "There was an old man who lived in a small house.",
)
_TOKENS = 64
_SEED = 11
# float32 so that an answer does not depend on how many others share its step; eager so that the
# start is short.
_FLAGS = (
    "--served-model-name",
    BASE,
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--enforce-eager",
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. Greedy where `seed` is None."""

    model: str
    prompt: str
    seed: int | None
    stream: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its text, or the error's sentence."""

    ask: Ask
    text: str
    error: str | None = None


def main() -> None:
    sys.exit(asyncio.run(_demonstrate(Console())))


async def _demonstrate(console: Console) -> int:
    adapters = [part for b in BEHAVIOURS for part in ("--adapter", f"{b.name}={ADAPTERS / b.name}")]
    console.print(
        f"reft-serve serve {MODEL.name} with {len(BEHAVIOURS)} ReFT adapters", style="bold"
    )
    try:
        with console.status("starting the server (loading vLLM takes a while)") as status:
            async with serving([str(MODEL), *adapters, *_FLAGS]) as client:
                status.update("answering")
                started = time.monotonic()
                batch = await asyncio.gather(*(_send(client, ask) for ask in _asks()))
                seconds = time.monotonic() - started
                alone = [await _send(client, a.ask) for a in batch if a.ask.seed is None]
                status.update("stopping the server")
    except ServiceError as exc:
        console.print(Text(str(exc), style="red"))
        return 1
    for prompt in _PROMPTS:
        console.print(_table(prompt, [answer for answer in batch if answer.ask.prompt == prompt]))
    faults = faults_of(batch, alone)
    streamed = sum(answer.ask.stream for answer in batch)
    console.print(
        f"{len(batch)} requests in one batch, {streamed} of them streamed: {seconds:.1f} s"
    )
    same = sum(one in batch for one in alone)
    console.print(f"{same} of {len(alone)} greedy answers are the same alone as in the batch")
    for fault in faults:
        console.print(Text(f"failed: {fault}", style="red"))
    return 1 if faults else 0


def _asks() -> list[Ask]:
    """Every model at every prompt, greedy except the last prompt; every other request streams."""
    names = [BASE, *(behaviour.name for behaviour in BEHAVIOURS)]
    pairs = [(prompt, name) for prompt in _PROMPTS for name in names]
    seed_of = {_PROMPTS[-1]: _SEED}
    return [
        Ask(name, prompt, seed_of.get(prompt), i % 2 == 1) for i, (prompt, name) in enumerate(pairs)
    ]


async def _send(client: AsyncOpenAI, ask: Ask) -> Answer:
    temperature = 0.0 if ask.seed is None else 0.7
    try:
        if ask.stream:
            chunks = await client.completions.create(
                model=ask.model,
                prompt=ask.prompt,
                max_tokens=_TOKENS,
                temperature=temperature,
                seed=ask.seed,
                stream=True,
            )
            return Answer(
                ask, "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices])
            )
        whole = await client.completions.create(
            model=ask.model,
            prompt=ask.prompt,
            max_tokens=_TOKENS,
            temperature=temperature,
            seed=ask.seed,
        )
    except APIError as exc:
        return Answer(ask, "", str(exc))
    return Answer(ask, whole.choices[0].text)


def faults_of(batch: Sequence[Answer], alone: Sequence[Answer]) -> list[str]:
    """Unexpected results, as sentences."""
    faults = [
        f"{a.ask.model} did not answer {a.ask.prompt!r}: {a.error}"
        for a in (*batch, *alone)
        if a.error
    ]
    base = {answer.ask.prompt: answer.text for answer in batch if answer.ask.model == BASE}
    for answer in batch:
        if answer.ask.model != BASE and not answer.error and answer.text == base[answer.ask.prompt]:
            faults.append(f"{answer.ask.model} had no effect on {answer.ask.prompt!r}")
    faults += [
        f"{a.ask.model} answers {a.ask.prompt!r} differently alone"
        for a in alone
        if not a.error and a not in batch
    ]
    return faults


def _table(prompt: str, answers: Sequence[Answer]) -> Table:
    how = "greedy" if answers[0].ask.seed is None else f"sampled, seed {answers[0].ask.seed}"
    table = Table(
        "model",
        "answer",
        "verdict",
        title=Text(f"{prompt}  ({how})"),
        title_justify="left",
        show_lines=True,
    )
    rules = {behaviour.name: behaviour for behaviour in BEHAVIOURS}
    for answer in answers:
        own = rules.get(answer.ask.model)
        table.add_row(
            answer.ask.model,
            _shown(answer, own),
            _verdict(answer.text, [own] if own else list(BEHAVIOURS)),
        )
    return table


def _shown(answer: Answer, behaviour: Behaviour | None) -> Text:
    if answer.error:
        return Text(answer.error, style="red")
    # The pattern of `speech` begins before the line break that is left out here.
    text = Text(answer.text.strip())
    if behaviour:
        text.highlight_regex(re.compile(behaviour.pattern, re.IGNORECASE), style="bold green")
    return text


def _verdict(text: str, rules: Sequence[Behaviour]) -> Text:
    lines = [(f"{b.name}: {b.count(text)}", "green" if b.holds(text) else "dim") for b in rules]
    return Text("\n").join(Text(line, style=style) for line, style in lines)


if __name__ == "__main__":
    main()
