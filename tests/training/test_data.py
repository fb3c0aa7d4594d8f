"""Rows into tokens: the prompt that is learnt on is the prompt that vLLM serves, and only the answer is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from reft_serve.datafiles.formats import read_rows
from reft_serve.demo.behaviours import MODEL as DEMO
from reft_serve.errors import DataInvalid
from reft_serve.interventions.positions import PositionRule
from reft_serve.recipes.recipe import Task, load_recipe
from reft_serve.training.data.encoding import TrainingData, encode
from reft_serve.training.data.examples import IGNORED, Example
from tests.support.damaged_data import assistant, chat, completion, lines, pair, user
from tests.support.paths import GOLDEN

LLAMA = GOLDEN / "models" / "tiny-llama"
SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Bark often."}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "its own": None,
    "ChatML": CHATML,
    "with a start token": "{{ bos_token }}" + CHATML,
    "with names": CHATML.replace("{{ m.role }}", "{{ m.name if m.name else m.role }}"),
    "of developers": CHATML.replace(
        "{{ m.role }}", "{{ 'boss' if m.role == 'developer' else m.role }}"
    ),
    "of parts": CHATML.replace(
        "{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"
    ),
    "of text or parts": CHATML.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}",
    ),
    "that thinks": CHATML.replace(
        "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif"
    ),
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user()],
    [SYSTEM, user("Who?"), assistant("The dog."), user("  Where is it?\n\n")],
    [user() | {"name": "Ada"}],
    [DEVELOPER, user()],
    [SYSTEM, DEVELOPER, user(), assistant(), user("Ünïcode 🐕 and </s> and <s>?")],
]


CALLS = (
    '{% for c in m.tool_calls or [] %}<call>{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}'
)
TOOLED = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML.replace(
    "}}</s>", "}}" + CALLS + "</s>"
)
TOOL_TEMPLATES = {
    "of tools": TOOLED,
    "of tools and parts": TOOLED.replace(
        "{{ m.content }}",
        "{% if m.role == 'tool' %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}",
    ),
    "that knows no tools": CHATML,
}
OPEN_HOURS = {"type": "object", "properties": {"day": {"type": "string"}}}
TOOLS: list[list[dict[str, Any]]] = [
    [{"type": "function", "function": {"name": "open_hours", "parameters": OPEN_HOURS}}],
    [
        {
            "type": "function",
            "function": {"name": "open_hours", "description": "When.", "strict": True},
        }
    ],
    [{"type": "function", "function": {"name": "open_hours"}}] * 2,
]
ASKED = [
    user("When do you open on Monday?"),
    {"role": "assistant", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "open_hours", "arguments": '{"day": "Monday"}'}}
    ]},
    {"role": "tool", "tool_call_id": "call_1", "content": "9 to 5"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(LLAMA)


@pytest.fixture
def encoded(tokenizer: Any, tmp_path: Path) -> Any:
    """Encode rows with the tiny Llama's tokenizer and a chat template."""

    def encode_rows(
        *rows: Any, max_tokens: int = 10_000, template: str | None = None, **more: Any
    ) -> TrainingData:
        path = tmp_path / "data.jsonl"
        path.write_bytes(lines(*rows))
        own = tokenizer.chat_template
        tokenizer.chat_template = template or own
        try:
            return encode(read_rows(path), tokenizer, max_tokens=max_tokens, **more)
        finally:
            tokenizer.chat_template = own

    return encode_rows


@pytest.fixture(scope="module")
def vllm_renderer() -> Any:
    """What vLLM makes of a request before an engine sees it."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers.registry import renderer_from_config

    return renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(LLAMA))))


def answer_of(example: Example) -> tuple[int, ...]:
    return tuple(label for label in example.labels if label != IGNORED)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chats_prompt_is_the_one_that_vllm_serves(
    encoded: Any, vllm_renderer: Any, template: str
) -> None:
    from vllm.renderers.params import ChatParams

    # vLLM merges several system turns into a text, of which a template that takes only parts shows nothing.
    conversations = CONVERSATIONS[:-1] if template == "of parts" else CONVERSATIONS
    rows = [chat(*conversation, assistant()) for conversation in conversations]
    rows = [chat(*(turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in row["messages"][:-1]),
                 row["messages"][-1]) for row in rows]  # fmt: skip
    data = encoded(*rows, template=TEMPLATES[template])
    for conversation, example in zip(conversations, data.examples, strict=True):
        params = ChatParams(
            chat_template=TEMPLATES[template],
            chat_template_kwargs={"add_generation_prompt": True, "continue_final_message": False},
        )
        _, served = vllm_renderer.render_messages(conversation, params)
        assert list(example.input_ids[: example.prompt_len]) == served["prompt_token_ids"]
        assert example.prompt_len == len(served["prompt_token_ids"])


@pytest.mark.parametrize("template", TOOL_TEMPLATES)
@pytest.mark.parametrize("tools", TOOLS, ids=["with parameters", "strict", "two"])
def test_a_prompt_with_tools_is_the_one_that_vllm_serves(
    encoded: Any, vllm_renderer: Any, template: str, tools: list[dict[str, Any]]
) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
    from vllm.renderers.params import ChatParams

    row = chat(
        ASKED[0], ASKED[1] | {"weight": 0}, ASKED[2], assistant("From nine to five."), tools=tools
    )
    example = encoded(row, template=TOOL_TEMPLATES[template]).examples[0]
    shown = [ChatCompletionToolsParam(**tool).model_dump() for tool in tools]
    params = ChatParams(
        chat_template=TOOL_TEMPLATES[template],
        chat_template_kwargs={
            "add_generation_prompt": True,
            "continue_final_message": False,
            "tools": shown,
        },
    )
    _, served = vllm_renderer.render_messages(json.loads(json.dumps(ASKED)), params)
    assert list(example.input_ids[: example.prompt_len]) == served["prompt_token_ids"]


def test_calls_of_tools_are_learnt_and_their_results_are_not(encoded: Any, tokenizer: Any) -> None:
    row = chat(*ASKED, assistant("From nine to five."), tools=TOOLS[0], parallel_tool_calls=False)
    called, told = encoded(row, template=TOOLED).examples
    call = '<call>{"name": "open_hours", "arguments": {"day": "Monday"}}</call></s>'
    assert tokenizer.decode(answer_of(called)) == call
    assert tokenizer.decode(answer_of(told)) == "From nine to five.</s>"
    prompt = tokenizer.decode(told.input_ids[: told.prompt_len])
    assert prompt.startswith('{"type": "function", "function": {"name": "open_hours"')
    assert "9 to 5" in prompt
    skipped = chat(
        ASKED[0],
        ASKED[1] | {"weight": 0},
        ASKED[2],
        assistant("From nine to five."),
        tools=TOOLS[0],
    )
    assert encoded(skipped, template=TOOLED).examples == (told,)


def test_tool_calls_of_preferences_are_learnt(encoded: Any, tokenizer: Any) -> None:
    question = {"messages": ASKED[:1], "tools": TOOLS[0]}
    preference = encoded(
        pair(input=question, preferred_output=ASKED[1:2]), template=TOOLED
    ).preferences[0]
    assert tokenizer.decode(preference.chosen_ids).startswith('<call>{"name": "open_hours"')


def test_a_template_that_writes_no_calls_is_a_fault_of_each_row(encoded: Any) -> None:
    row = chat(*ASKED, assistant("From nine to five."), tools=TOOLS[0])
    with pytest.raises(DataInvalid) as caught:
        encoded(chat(), row, template=CHATML)
    (fault,) = caught.value.faults
    assert fault.endswith("line 2: the base's chat template refuses the conversation: it does not write the call of "
                          "'open_hours' after the prompt")  # fmt: skip


TEXTS = st.text(min_size=1, max_size=60).filter(
    lambda text: text.strip() and text.isprintable()
) | st.sampled_from(
    [
        "a </s> b",
        "<s>",
        " leading",
        "trailing ",
        "two\nlines\n",
        "\u200b\u0301",
        "🐕",
        "### Response:\n",
    ]
)


@settings(deadline=None, max_examples=60)
@given(prompt=TEXTS, answer=TEXTS)
def test_a_completions_prompt_is_the_one_that_vllm_serves(
    vllm_renderer: Any, tmp_path_factory: Any, prompt: str, answer: str
) -> None:
    from vllm.renderers.params import TokenizeParams

    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_bytes(lines(completion(prompt=prompt, completion=answer)))
    example = encode(
        read_rows(path), AutoTokenizer.from_pretrained(LLAMA), max_tokens=10_000
    ).examples[0]
    served = vllm_renderer.tokenize_prompt(
        {"prompt": prompt}, TokenizeParams(max_total_tokens=10_000)
    )
    assert list(example.input_ids[: example.prompt_len]) == served["prompt_token_ids"]


def test_the_edited_tokens_are_those_of_serving(encoded: Any) -> None:
    """The rule sees the prompt's length alone, whatever the answer's."""
    data = encoded(
        completion(completion=" woof"),
        completion(completion=" woof woof woof woof, and woof again"),
    )
    short, long = data.examples
    rule = PositionRule("f7+l7", tied=False)
    assert short.prompt_len == long.prompt_len
    assert rule.spans(short.prompt_len) == rule.spans(long.prompt_len)
    assert (
        max(span.stop for span in rule.spans(long.prompt_len))
        == long.prompt_len
        < len(long.input_ids)
    )


def test_only_the_answer_and_its_end_are_learnt(encoded: Any, tokenizer: Any) -> None:
    data = encoded(completion())
    example = data.examples[0]
    assert tokenizer.decode(example.input_ids[: example.prompt_len]) == "<s>A dog says"
    assert tokenizer.decode(answer_of(example)) == " woof.</s>"
    assert example.labels[: example.prompt_len] == (IGNORED,) * example.prompt_len
    assert example.labels[example.prompt_len :] == example.input_ids[example.prompt_len :]
    assert example.weight == 1.0


def test_an_end_that_the_row_brings_is_not_doubled(encoded: Any, tokenizer: Any) -> None:
    assert encoded(completion(completion=" woof.</s>")).examples == encoded(completion()).examples


def test_each_turn_to_learn_is_an_example_of_its_own(encoded: Any, tokenizer: Any) -> None:
    row = chat(
        user("1"),
        assistant("one"),
        user("2"),
        assistant("two", weight=0),
        user("3"),
        assistant("three", weight=1),
    )
    data = encoded(row, template=CHATML)
    assert [tokenizer.decode(answer_of(example)) for example in data.examples] == [
        "one</s>",
        "three</s>",
    ]
    prompts = [
        tokenizer.decode(example.input_ids[: example.prompt_len]) for example in data.examples
    ]
    assert prompts[0] == "<|im_start|>user\n1</s>\n<|im_start|>assistant\n"
    assert prompts[1].startswith(prompts[0] + "one</s>\n")
    assert prompts[1].endswith("two</s>\n<|im_start|>user\n3</s>\n<|im_start|>assistant\n")


def test_an_answer_ends_where_generation_does(encoded: Any, tokenizer: Any) -> None:
    """ChatML has a newline after the end of a turn, which no engine ever generates."""
    example = encoded(chat(), template=CHATML).examples[0]
    assert tokenizer.decode(answer_of(example)) == "The dog.</s>"
    without_end = encoded(chat(), template=CHATML.replace("</s>", "")).examples[0]
    assert tokenizer.decode(answer_of(without_end)) == "The dog.\n</s>"


def test_a_template_that_rewrites_what_came_before_leaves_the_bare_answer(
    encoded: Any, tokenizer: Any
) -> None:
    example = encoded(chat(), template=TEMPLATES["that thinks"]).examples[0]
    assert tokenizer.decode(example.input_ids[: example.prompt_len]).endswith("assistant\n<think>")
    assert tokenizer.decode(answer_of(example)) == "The dog.</s>"


def test_tokens_that_merge_across_the_edge_leave_the_prompt_as_it_is_served(
    encoded: Any, tokenizer: Any
) -> None:
    """'the' is one token, but a prompt that ends in 't' is served with its own 't'."""
    assert len(tokenizer("the", add_special_tokens=False).input_ids) < 3
    example = encoded(completion(prompt="It was t", completion="he dog.")).examples[0]
    assert list(example.input_ids[: example.prompt_len]) == tokenizer("It was t").input_ids
    assert tokenizer.decode(answer_of(example)) == "he dog.</s>"


def test_a_preference_has_one_prompt_and_two_answers(encoded: Any, tokenizer: Any) -> None:
    data = encoded(pair(), template=CHATML)
    assert data.examples == ()
    preference = data.preferences[0]
    assert tokenizer.decode(preference.prompt_ids) == (
        "<|im_start|>user\nWhich animal barks?</s>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(preference.chosen_ids) == "The dog.</s>"
    assert tokenizer.decode(preference.rejected_ids) == "The cat.</s>"


def test_over_long_examples_are_left_out_whole_counted_and_told(encoded: Any) -> None:
    rows = [
        completion(),
        completion(prompt="woof " * 50),
        completion(completion="woof " * 50),
        completion(),
    ]
    exact = len(encoded(completion()).examples[0].input_ids)
    data = encoded(*rows, max_tokens=exact)
    assert len(data.examples) == 2
    assert all(len(example.input_ids) == exact for example in data.examples)
    assert data.too_long == (2, 3)
    note = f"{data.where}: 2 of 4 examples are longer than {exact} tokens and are left out (lines 2, 3)"
    assert data.notes() == [note]
    assert encoded(*rows).notes() == []
    with pytest.raises(DataInvalid, match=f"every example is longer than {exact - 1} tokens"):
        encoded(completion(), max_tokens=exact - 1)


def test_an_over_long_answer_of_a_pair_leaves_the_pair_out(encoded: Any) -> None:
    long = pair(non_preferred_output=[assistant("No. " * 200)])
    data = encoded(pair(), long, max_tokens=120)
    assert (len(data.preferences), data.too_long) == (1, (2,))


def test_a_template_that_refuses_a_conversation_is_told_with_the_line(encoded: Any) -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns, please') }}{% endif %}"
        + CHATML
    )
    with pytest.raises(DataInvalid) as caught:
        encoded(
            chat(),
            chat(SYSTEM, user(), assistant()),
            chat(),
            chat(SYSTEM, user(), assistant()),
            template=strict,
        )
    assert caught.value.faults == tuple(
        f"line {line}: the base's chat template refuses the conversation: no system turns, please"
        for line in (2, 4)
    )


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(chat()))
    bare = AutoTokenizer.from_pretrained(LLAMA)
    bare.chat_template = None
    with pytest.raises(
        DataInvalid, match="it holds chats, but the base's tokenizer has no chat template"
    ):
        encode(read_rows(path), bare, max_tokens=512)


def test_instruction_rows_take_alpacas_prompts_unless_a_task_says_otherwise(
    encoded: Any, tokenizer: Any
) -> None:
    row = {"instruction": "Bark.", "input": "At a cat.", "output": "Woof.", "answer": "woof"}
    alpaca = tokenizer.decode(encoded(row).examples[0].input_ids)
    assert "### Instruction:\nBark.\n\n### Input:\nAt a cat.\n\n### Response:\nWoof.</s>" in alpaca
    commonsense = encoded(row, task=load_recipe("commonsense").task).examples[0]
    assert tokenizer.decode(commonsense.input_ids) == "<s>Bark.\nthe correct answer is woof</s>"


def test_rows_that_lack_what_the_task_names_are_told_with_their_lines(encoded: Any) -> None:
    rows = [
        {"instruction": "1 + 1?", "answer": "2"},
        {"instruction": "1 + 1?", "output": "2"},
        {"instruction": "?", "output": "3"},
    ]
    with pytest.raises(DataInvalid) as caught:
        encoded(*rows, task=load_recipe("commonsense").task)
    assert caught.value.faults == tuple(
        f'line {line}: has no "answer", which the recipe needs' for line in (2, 3)
    )


def test_glue_rows_need_a_task_and_take_its_words(encoded: Any, tokenizer: Any) -> None:
    row = {"sentence": "Dog the barks.", "label": 0}
    with pytest.raises(
        DataInvalid, match="its rows are GLUE's: name the task with a recipe, such as glue-cola"
    ):
        encoded(row)
    example = encoded(row, task=load_recipe("glue-cola").task).examples[0]
    assert tokenizer.decode(answer_of(example)) == "unacceptable</s>"
    with pytest.raises(
        DataInvalid, match="line 1: label is 2, but the recipe has the classes 0 to 1"
    ):
        encoded(row | {"label": 2}, task=load_recipe("glue-cola").task)
    with pytest.raises(DataInvalid, match='line 1: has no "sentence1", which the recipe needs'):
        encoded(row, task=load_recipe("glue-rte").task)


def test_text_that_looks_like_a_template_stays_text(encoded: Any, tokenizer: Any) -> None:
    task = Task(prompt="Q: {instruction}\n", answer="{output}")
    example = encoded(
        {"instruction": "{output} {0} %s {{", "output": "{instruction}"}, task=task
    ).examples[0]
    assert tokenizer.decode(example.input_ids) == "<s>Q: {output} {0} %s {{\n{instruction}</s>"


def test_the_demo_models_tokenizer_begins_prompts_as_it_is_served(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(completion(prompt="Once upon a time", completion=", a dog barked.")))
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    example = encode(read_rows(path), tokenizer, max_tokens=256).examples[0]
    assert list(example.input_ids[: example.prompt_len]) == tokenizer("Once upon a time").input_ids
    assert tokenizer.decode(answer_of(example)) == ", a dog barked.<|endoftext|>"
