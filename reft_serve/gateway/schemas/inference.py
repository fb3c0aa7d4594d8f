"""Request schemas of inference: OpenAI's fields, and those of vLLM's sampling fields that affect
only the request itself.

A field that is neither here nor among the ignored ones (`client_fields`) is refused, so that
nothing reaches an engine unseen (templates, other requests' ids, priorities, transfers, media to
fetch). Ranges and meanings are the engine's to judge.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from reft_serve.gateway.schemas.client_fields import ignored_in
from reft_serve.gateway.schemas.fields import JsonInteger
from reft_serve.gateway.schemas.messages import (
    ChatMessage,
    ChatTool,
    ChatToolChoice,
    InputItem,
    ResponseTool,
    ResponseToolChoice,
)
from reft_serve.gateway.schemas.request_model import NULLS_ARE_ABSENT, FreeObject, RequestModel

__all__ = [
    "MAX_STRENGTH",
    "MAX_TEMPLATE_ARGUMENTS",
    "MAX_TEMPLATE_VALUE",
    "ChatBody",
    "ClassifyBody",
    "CompletionBody",
    "EmbeddingBody",
    "InferenceBody",
    "ResponseBody",
]

MAX_STRENGTH = 100.0
"""The range that engines accept, in both directions."""
MAX_TEMPLATE_ARGUMENTS = 16
MAX_TEMPLATE_VALUE = 256
"""Largest number of characters in one chat template argument."""

# Lists stop at their first fault: an error for each element of each branch of a union would take
# gigabytes.
_FIRST = Field(fail_fast=True)
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Count = Annotated[int, Field(ge=1, le=1 << 24), JsonInteger]
# Whole numbers beyond 2**53 are not the same to every JSON reader.
_Seed = Annotated[int, Field(ge=-(1 << 53), le=1 << 53), JsonInteger]
_Token = Annotated[int, Field(ge=0, lt=1 << 31), JsonInteger]
_Stop = str | Annotated[list[str], Field(max_length=16), _FIRST]
_Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
_Scalar = bool | int | float | Annotated[str, Field(max_length=MAX_TEMPLATE_VALUE)]
_TemplateArguments = Annotated[
    dict[Annotated[str, Field(max_length=64)], _Scalar],
    Field(
        max_length=MAX_TEMPLATE_ARGUMENTS,
        json_schema_extra={"propertyNames": {"enum": ["enable_thinking", "thinking"]}},
    ),
    *NULLS_ARE_ABSENT,
]


class InferenceBody(RequestModel):
    """Fields of every inference request."""

    ignored = ignored_in("request")

    model: _Name
    user: Annotated[str, Field(max_length=512)] | None = None


class _StreamOptions(RequestModel):
    ignored = ignored_in("stream_options")

    include_usage: bool = False


class _Sampling(InferenceBody):
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(json_schema_extra={"additionalProperties": False}),
            *NULLS_ARE_ABSENT,
        ]
        | None
    ) = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), JsonInteger] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=128), _FIRST] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    metadata: Annotated[dict[str, str], Field(max_length=16), *NULLS_ARE_ABSENT] | None = None
    reft_strength: _Strength | None = None


class _Generation(_Sampling):
    n: Annotated[int, Field(ge=1, le=1024), JsonInteger] | None = None
    stream_options: _StreamOptions | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 24), JsonInteger] = 0
    response_format: FreeObject | None = None
    structured_outputs: FreeObject | None = None


class CompletionBody(_Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64), _FIRST]
        | Annotated[list[_Token], Field(min_length=1), _FIRST]
        | Annotated[
            list[Annotated[list[_Token], Field(min_length=1), _FIRST]],
            Field(min_length=1, max_length=64),
            _FIRST,
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1 << 24), JsonInteger] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), JsonInteger] | None = None
    suffix: str | None = None
    add_special_tokens: bool = True
    best_of: Annotated[int, Field(ge=1, le=1), JsonInteger] | None = Field(
        default=None, exclude=True
    )
    reft_prompt_tokens: (
        _Count | Annotated[list[_Count], Field(min_length=1, max_length=64), _FIRST] | None
    ) = None


class ChatBody(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096), _FIRST]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), JsonInteger] | None = None
    tools: Annotated[list[ChatTool], Field(max_length=256), _FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: _TemplateArguments | None = None
    modalities: Annotated[list[Literal["text"]], _FIRST] | None = Field(default=None, exclude=True)


class _Reasoning(RequestModel):
    ignored = ignored_in("reasoning")

    effort: str | None = None


class _Text(RequestModel):
    ignored = ignored_in("text")

    format: FreeObject | None = None


class ResponseBody(_Sampling):
    """POST /v1/responses. Nothing is stored, so there is no `previous_response_id`."""

    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=4096), _FIRST, Tag("items")],
        Discriminator(lambda given: "text" if isinstance(given, str) else "items"),
    ]
    instructions: str | None = None
    max_output_tokens: _Count | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=256), _FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: _Reasoning | None = None
    text: _Text | None = None
    chat_template_kwargs: _TemplateArguments | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), JsonInteger] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: Annotated[list[str], Field(max_length=64), _FIRST] | None = None
    max_tool_calls: _Count | None = None
    background: Literal[False] | None = Field(default=None, exclude=True)
    stream_options: _StreamOptions | None = Field(default=None, exclude=True)


class EmbeddingBody(InferenceBody):
    """POST /v1/embeddings."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048), _FIRST]
        | Annotated[list[_Token], Field(min_length=1), _FIRST]
        | Annotated[
            list[Annotated[list[_Token], _FIRST]], Field(min_length=1, max_length=2048), _FIRST
        ]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Count | None = None


class ClassifyBody(InferenceBody):
    """POST /v1/classify. `text_pair`: the second text of each, where the adapter was trained on
    pairs.
    """

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048), _FIRST]
        | Annotated[list[_Token], Field(min_length=1), _FIRST]
        | Annotated[
            list[Annotated[list[_Token], _FIRST]], Field(min_length=1, max_length=2048), _FIRST
        ]
    )
    text_pair: str | Annotated[list[str], Field(min_length=1, max_length=2048), _FIRST] | None = (
        None
    )
    use_activation: bool | None = Field(
        default=None, description="false: logits in place of scores."
    )

    @model_validator(mode="after")
    def _paired(self) -> ClassifyBody:
        if self.text_pair is None:
            return self
        firsts = [self.input] if isinstance(self.input, str) else self.input
        seconds = [self.text_pair] if isinstance(self.text_pair, str) else self.text_pair
        if isinstance(self.input, str) != isinstance(self.text_pair, str) or len(firsts) != len(
            seconds
        ):
            raise ValueError(
                "text_pair must be a text where input is one, or a list of as many texts"
            )
        if not all(isinstance(text, str) for text in firsts):
            raise ValueError(
                "text_pair needs texts as input, not tokens: tokens are a pair already"
            )
        return self
