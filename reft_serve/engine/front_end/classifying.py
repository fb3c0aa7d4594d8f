"""The front end's part of classification: which head answers a request, and an engine that
classifies and embeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from reft_serve.adapters.head import HeadSpec
from reft_serve.engine.adapter_ref import AdapterRef
from reft_serve.engine.worker.heads import HEAD_KEY

__all__ = [
    "choose_head",
    "head_engine_faults",
    "wrap_init_pooling_io_processors",
    "wrap_init_pooling_state",
    "wrap_verify_pooling_task",
]

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")
_BOTH = ("embed", "classify")


def head_engine_faults(spec: HeadSpec | None, config: VllmConfig) -> list[str]:
    """Why an engine that pools cannot use a head. An engine that generates ignores it."""
    model = config.model_config
    if (
        spec is None
        or model.runner_type != "pooling"
        or spec.reads == "last"
        or model.attn_type == "encoder_only"
    ):
        return []
    return [
        f"its head reads the {spec.reads} of the text's tokens, but in this model a token sees "
        "only the tokens before it, so only the last token has seen the whole text: train a head "
        "that reads the last token"
    ]


def choose_head(identity: AdapterRef | None, params: Any, config: VllmConfig) -> None:
    """Name the version whose head answers a request in its pooling parameters, or nothing if the
    base's own pooler does.

    Raises:
        VLLMValidationError: the request is a classification, and neither the adapter nor the base
            has a head.
    """
    task = getattr(params, "task", None)
    if task is None:  # a request that generates
        return
    others = {name: v for name, v in (params.extra_kwargs or {}).items() if name != HEAD_KEY}
    if task == "classify" and identity is not None and identity.head:
        others[HEAD_KEY] = identity.digest
    elif task == "classify" and not _classifies(config):
        lacking = (
            "the base model has no classifier"
            if identity is None
            else "neither the adapter nor the base model has a classifier"
        )
        raise VLLMValidationError(
            f"{lacking}: name an adapter that was trained for classification or regression",
            parameter="model",
        )
    params.extra_kwargs = others or None


def _classifies(config: VllmConfig) -> bool:
    """True if the base model has a classifier of its own."""
    model = config.model_config
    return model.convert_type == "classify" or any(
        name.endswith(_CLASSIFIERS) for name in model.architectures
    )


def wrap_init_pooling_state(original: Any) -> Callable[..., None]:
    """Around `init_pooling_state`, which sets up one task of the model: sets up embeddings and
    classification.
    """

    def init(
        engine_client: Any, state: Any, args: Any, request_logger: Any, supported_tasks: Any
    ) -> None:
        original(engine_client, state, args, request_logger, supported_tasks)
        config = engine_client.model_config
        pooler = getattr(config, "pooler_config", None)
        if (
            engine_client.vllm_config.lora_config is None
            or pooler is None
            or pooler.task is not None
        ):
            return
        chosen, others = config.get_pooling_task(supported_tasks), {}
        for task in _BOTH:
            if task in supported_tasks and task != chosen:
                # Called again with the other task as the chosen one; only that task's handler is
                # used.
                other = type(state)()
                other.openai_serving_models = state.openai_serving_models
                pooler.task = task
                try:
                    original(engine_client, other, args, request_logger, supported_tasks)
                finally:
                    pooler.task = None
                others[task] = other
        if "classify" in others:
            state.serving_classification = others["classify"].serving_classification
        if "embed" in others:
            state.serving_embedding = others["embed"].serving_embedding

    return init


def wrap_init_pooling_io_processors(original: Any) -> Callable[..., Any]:
    """Around `init_pooling_io_processors`: one for each of the two tasks."""

    def init(
        supported_tasks: Any, vllm_config: VllmConfig, renderer: Any, chat_template_config: Any
    ) -> Any:
        processors = original(supported_tasks, vllm_config, renderer, chat_template_config)
        pooler = vllm_config.model_config.pooler_config
        if vllm_config.lora_config is None or pooler is None or pooler.task is not None:
            return processors
        for task in _BOTH:
            if task in supported_tasks and task not in processors:
                pooler.task = task
                try:
                    processors |= original(
                        supported_tasks, vllm_config, renderer, chat_template_config
                    )
                finally:
                    pooler.task = None
        return processors

    return init


def wrap_verify_pooling_task(original: Any) -> Callable[..., None]:
    """Around `LLM._verify_pooling_task`, which accepts only the task that vLLM has chosen for the
    model.
    """

    def verify(self: Any, pooling_task: Any) -> None:
        if pooling_task in _BOTH and pooling_task in self.pooling_io_processors:
            return
        original(self, pooling_task)

    return verify
