"""Rows into token ids: the base tokenizer's tokens of each prompt as it is served, and of the
answer after it.

The prompt of a chat is the chat template's with its generation prompt, and no further token; any
other prompt is the text with the tokenizer's special tokens. vLLM does the same for
`/v1/chat/completions` and `/v1/completions`, so the positions that an adapter edits are the same in
training and serving. A conversation becomes one example for each turn to learn, since a position
rule needs each of them at the end of a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from reft_serve.datafiles.conversations import Message, Tool
from reft_serve.datafiles.faults import Faults
from reft_serve.datafiles.formats import Chat, PreferencePair, Rows
from reft_serve.errors import DataInvalid
from reft_serve.recipes.recipe import Task, load_recipe
from reft_serve.training.data.examples import IGNORED, Example, Preference

__all__ = ["TrainingData", "encode", "notes_of"]

_BATCH = 1024
_LISTED = 20


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The examples of one file: supervised ones or preferences, never both.

    Args:
        too_long: the lines of examples that were left out, once for each example.
        fingerprint: of the rows, the task, the tokenizer and its chat template, so not of the date
            that a template writes.
    """

    where: str
    examples: tuple[Example, ...]
    preferences: tuple[Preference, ...]
    too_long: tuple[int, ...]
    max_tokens: int
    fingerprint: str

    def notes(self) -> list[str]:
        """Notes about skipped examples; empty if there are none."""
        kept = len(self.examples) + len(self.preferences)
        return notes_of(self.where, kept, self.too_long, self.max_tokens)


def notes_of(where: str, kept: int, too_long: Sequence[int], max_tokens: int) -> list[str]:
    """Notes about the examples of a file that are too long; empty if there are none.

    Args:
        kept: how many examples are not.
        too_long: the lines of those that are.
    """
    if not too_long:
        return []
    count = len(too_long)
    lines = ", ".join(map(str, too_long[:_LISTED])) + (", ..." if count > _LISTED else "")
    return [
        f"{where}: {count:,} of {count + kept:,} examples are longer than {max_tokens:,} "
        f"tokens and are left out (lines {lines})"
    ]


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt and the answers to it."""

    line: int
    prompt: str
    answers: tuple[str, ...]


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    task: Task | None = None,
    now: datetime | None = None,
) -> TrainingData:
    """The examples of a checked file, in its order.

    Args:
        max_tokens: the most tokens of an example, prompt and answer; longer ones are left out and
            counted.
        task: prompts and answers of instruction and GLUE rows; Alpaca's unless given. The others
            bring their own.
        now: what a chat template takes for the present time; a run that is resumed gives the time
            of its start.

    Raises:
        DataInvalid: with every fault of the file: a row that the task or the chat template cannot
            take, or no example left.
    """
    faults = Faults()
    chats = rows.format in ("chat", "preference")
    if chats and not tokenizer.chat_template:
        raise DataInvalid(
            rows.where, ["it holds chats, but the base's tokenizer has no chat template"]
        )
    texts = list(
        _chat_texts(rows, tokenizer, now, faults) if chats else _task_texts(rows, task, faults)
    )
    if faults:
        raise DataInvalid(rows.where, faults.sentences())
    examples = []
    preferences = []
    too_long = []
    for text, prompt_ids, answers in _tokens(texts, tokenizer, special=not chats):
        if len(prompt_ids) + max(map(len, answers)) > max_tokens:
            too_long.append(text.line)
        elif rows.format == "preference":
            preferences.append(Preference(prompt_ids, *answers))
        else:
            labels = (IGNORED,) * len(prompt_ids) + answers[0]
            examples.append(Example(prompt_ids + answers[0], labels, len(prompt_ids)))
    if not examples and not preferences:
        raise DataInvalid(rows.where, [f"every example is longer than {max_tokens:,} tokens"])
    fingerprint = _fingerprint(rows, tokenizer, max_tokens, task)
    return TrainingData(
        rows.where, tuple(examples), tuple(preferences), tuple(too_long), max_tokens, fingerprint
    )


def _fingerprint(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_tokens: int, task: Task | None
) -> str:
    """Everything that decides the tokens, except the time at which a chat template is rendered."""
    digest = hashlib.sha256()
    facts = (
        max_tokens,
        task,
        tokenizer.chat_template,
        sorted(tokenizer.get_vocab().items()),
        rows.format,
    )
    digest.update(repr(facts).encode())
    for row in rows.rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _task_texts(rows: Rows, task: Task | None, faults: Faults) -> Iterator[_Text]:
    task = task or (None if rows.format == "glue" else load_recipe("instruct").task)
    if task is None:
        faults.add("its rows are GLUE's: name the task with a recipe, such as glue-cola")
        return
    for line, row in rows.rows:
        try:
            yield _Text(line, task.question(row), (task.reply(row),))
        except ValueError as exc:
            faults.add(str(exc), line)


def _chat_texts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, now: datetime | None, faults: Faults
) -> Iterator[_Text]:
    template = _Template(tokenizer, now or datetime.now())
    for line, row in rows.rows:
        try:
            if isinstance(row, Chat):
                for turn in row.learnt:
                    yield template.text(
                        line, row.messages[:turn], row.messages[turn : turn + 1], row.tools
                    )
            elif isinstance(row, PreferencePair):
                answers = row.preferred_output + row.non_preferred_output
                yield template.text(line, row.input.messages, answers, row.input.tools)
        except TemplateError as exc:
            faults.add(f"the base's chat template refuses the conversation: {exc}", line)


class _Template:
    """A tokenizer's chat template, given conversations as vLLM gives them
    (vllm/renderers/hf.py).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, now: datetime) -> None:
        self._tokenizer = tokenizer
        self._now = now
        source = tokenizer.get_chat_template()
        self._knows_developers = "'developer'" in source or '"developer"' in source
        self._takes_parts = False
        self._takes_parts = "woof" not in self._shown("woof")

    def text(
        self,
        line: int,
        history: Sequence[Message],
        answers: Sequence[Message],
        tools: Sequence[Tool] | None,
    ) -> _Text:
        """A prompt and its answers. Raises TemplateError where the template refuses the
        conversation.
        """
        turns = self._turns(history)
        shown = None if tools is None else [_tool(tool) for tool in tools]
        prompt = self._render(turns, shown, add_generation_prompt=True)
        return _Text(
            line, prompt, tuple(self._answer(prompt, turns, answer, shown) for answer in answers)
        )

    def _answer(
        self, prompt: str, turns: list[_Turn], answer: Message, tools: list[_Turn] | None
    ) -> str:
        """The text after the prompt once the answer is rendered; the bare answer if rendering
        rewrites the prompt.
        """
        whole = self._render([*turns, _turn(answer, _SAID)], tools)
        said = whole.removeprefix(prompt) if whole.startswith(prompt) else answer.content or ""
        for call in answer.tool_calls or ():
            if call.function.name not in said:
                raise TemplateError(
                    f"it does not write the call of {call.function.name!r} after the prompt"
                )
        return said

    def _turns(self, messages: Sequence[Message]) -> list[_Turn]:
        """Where the template does not speak of developers, their turns become system turns, and
        those one at the start.
        """
        turns = [_turn(message, _SAID | {"name"}) for message in messages]
        if self._knows_developers or not any(turn["role"] == "developer" for turn in turns):
            return turns
        turns = [
            turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns
        ]
        systems = [turn["content"] for turn in turns if turn["role"] == "system"]
        if len(systems) == 1 and turns[0]["role"] == "system":
            return turns
        others = [turn for turn in turns if turn["role"] != "system"]
        return [{"role": "system", "content": "\n\n".join(systems)}, *others]

    def _shown(self, content: str) -> str:
        try:
            return self._render([{"role": "user", "content": content}], None)
        except TemplateError:
            return content

    def _render(
        self, turns: list[_Turn], tools: list[_Turn] | None, *, add_generation_prompt: bool = False
    ) -> str:
        conversation: list[Any] = turns
        # a template that goes through a list of parts, and finds none in a text
        if self._takes_parts:
            conversation = [
                turn if turn["role"] == "tool" else turn | {"content": _parts(turn["content"])}
                for turn in turns
            ]
        rendered: str = self._tokenizer.apply_chat_template(
            conversation,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            strftime_now=self._now.strftime,
        )
        return rendered


_Turn = dict[str, Any]
_Ids = tuple[int, ...]
_SAID = frozenset({"role", "content", "tool_calls", "tool_call_id"})


def _turn(message: Message, keys: frozenset[str]) -> _Turn:
    """A turn as vLLM gives it to a template: no content is an empty text, and the arguments of tool
    calls are objects.
    """
    turn: _Turn = {"content": ""} | message.model_dump(include=set(keys), exclude_none=True)
    for call in turn.get("tool_calls", ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return turn


def _tool(tool: Tool) -> _Turn:
    """A tool as vLLM gives it to a template: with its nulls, except `strict`'s."""
    shown = tool.model_dump()
    if shown["function"]["strict"] is None:
        del shown["function"]["strict"]
    return shown


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if content else []


def _tokens(
    texts: Sequence[_Text], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> Iterator[tuple[_Text, _Ids, tuple[_Ids, ...]]]:
    """The tokens of each prompt and of each answer to it."""

    def ids(batch: list[str], *, special: bool) -> list[list[int]]:
        # split_special_tokens is False, as it is in vLLM: a chat template's own markers must stay
        # whole.
        return list(tokenizer(batch, add_special_tokens=special, verbose=False).input_ids)

    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        prompts = iter(ids([text.prompt for text in batch], special=special))
        wholes = iter(
            ids(
                [text.prompt + answer for text in batch for answer in text.answers], special=special
            )
        )
        for text, prompt_ids in zip(batch, prompts, strict=True):
            answers = []
            for answer in text.answers:
                whole = next(wholes)
                begun = whole[: len(prompt_ids)] == prompt_ids
                answer_ids = whole[len(prompt_ids) :] if begun else ids([answer], special=False)[0]
                answers.append(_ended(answer_ids, tokenizer.eos_token_id))
            yield text, tuple(prompt_ids), tuple(answers)


def _ended(ids: list[int], end: int | None) -> _Ids:
    """An answer's tokens up to its last end token, which is added if there is none: generation
    stops there.
    """
    if end is None:
        return tuple(ids)
    last = max((i for i, token in enumerate(ids) if token == end), default=None)
    return (*ids, end) if last is None else tuple(ids[: last + 1])
