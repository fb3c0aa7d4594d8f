"""What inference requests may hold: OpenAI's fields, and vLLM's sampling fields that touch nobody else's request.

A field that is not here is refused, so that nothing reaches an engine unseen (templates, other requests' ids, priorities,
transfers, media to fetch). Ranges and meanings are the engine's to judge.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from reft_serve.gateway.numbers import WHOLE

__all__ = ["ChatBody", "CompletionBody", "EmbeddingBody", "InferenceBody", "ResponseBody"]

# Lists stop at their first fault: an error for each element of each branch of a union would take gigabytes.
_FIRST = Field(fail_fast=True)
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Count = Annotated[int, Field(ge=1, le=1 << 24), WHOLE]
# Whole numbers beyond 2**53 are not the same to every JSON reader.
_Seed = Annotated[int, Field(ge=-(1 << 53), le=1 << 53), WHOLE]
_Token = Annotated[int, Field(ge=0, lt=1 << 31), WHOLE]
_Stop = str | Annotated[list[str], Field(max_length=16), _FIRST]
_Object = dict[str, Any]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class InferenceBody(_Body):
    """What every inference request has."""

    model: _Name
    user: Annotated[str, Field(max_length=512)] | None = None


class _StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Sampling(InferenceBody):
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=128), _FIRST] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


class _Hints(_Body):
    """OpenAI's fields that ask for nothing here: taken, so that programs written for it run, and sent no further."""

    service_tier: Literal["auto", "default"] | None = Field(default=None, exclude=True)
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(default=None, exclude=True)
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = Field(default=None, exclude=True)


class _Generation(_Sampling):
    n: Annotated[int, Field(ge=1, le=1024), WHOLE] | None = None
    stream_options: _StreamOptions | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 24), WHOLE] = 0
    response_format: _Object | None = None
    structured_outputs: _Object | None = None


class CompletionBody(_Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64), _FIRST]
        | Annotated[list[_Token], Field(min_length=1), _FIRST]
        | Annotated[
            list[Annotated[list[_Token], Field(min_length=1), _FIRST]], Field(min_length=1, max_length=64), _FIRST
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1 << 24), WHOLE] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    suffix: str | None = None
    add_special_tokens: bool = True
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = Field(default=None, exclude=True)


class _TextPart(BaseModel):
    """A part of a message. Text alone: an engine would fetch what other kinds name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[_TextPart], _FIRST] | None = None


class ChatBody(_Generation, _Hints):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=4096), _FIRST]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: Annotated[list[_Object], Field(max_length=256), _FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | _Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    store: Literal[False] | None = Field(default=None, exclude=True)
    modalities: Annotated[list[Literal["text"]], _FIRST] | None = Field(default=None, exclude=True)


class _InputPart(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["input_text", "output_text", "refusal", "summary_text", "reasoning_text"]


class _InputItem(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    content: str | Annotated[list[_InputPart], _FIRST] | None = None


class ResponseBody(_Sampling, _Hints):
    """POST /v1/responses. Nothing is stored, so there is no `previous_response_id`."""

    input: str | Annotated[list[_InputItem], Field(min_length=1, max_length=4096), _FIRST]
    instructions: str | None = None
    max_output_tokens: _Count | None = None
    tools: Annotated[list[_Object], Field(max_length=256), _FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | _Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning: _Object | None = None
    text: _Object | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: Annotated[list[str], Field(max_length=64), _FIRST] | None = None
    max_tool_calls: _Count | None = None
    store: bool | None = None
    background: Literal[False] | None = Field(default=None, exclude=True)
    stream_options: _StreamOptions | None = Field(default=None, exclude=True)


class EmbeddingBody(InferenceBody):
    """POST /v1/embeddings."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048), _FIRST]
        | Annotated[list[_Token], Field(min_length=1), _FIRST]
        | Annotated[list[Annotated[list[_Token], _FIRST]], Field(min_length=1, max_length=2048), _FIRST]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Count | None = None
