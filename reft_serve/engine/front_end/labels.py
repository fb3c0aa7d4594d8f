"""The labels in an answer of `/classify`: those of the adapter that answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from vllm.exceptions import RetryableRequestError, VLLMValidationError

from reft_serve.adapters.head import HeadSpec
from reft_serve.engine.front_end.binding import binder_of
from reft_serve.engine.worker.heads import head_of_params

__all__ = ["label_of", "wrap_build_response"]


def wrap_build_response(original: Any) -> Callable[..., Any]:
    """Around `ServingClassification._build_response`: the labels of the adapter that answered.

    Raises:
        RetryableRequestError: the adapter was unloaded or replaced while the request ran.
        VLLMValidationError: a score is NaN or infinite, as a head with huge weights gives.
    """

    def build_response(self: Any, ctx: Any) -> Any:
        digests = {head_of_params(each["params"]) for each in ctx.engine_inputs}
        if digests == {None}:
            return original(self, ctx)
        binder = binder_of(self.engine_client)
        heads = [binder.head_of(ctx.lora_request.lora_int_id, digest or "") for digest in digests]
        if len(heads) > 1 or heads[0] is None:
            raise RetryableRequestError(
                "the adapter was unloaded or replaced while the request ran; try again"
            )
        try:
            response = original(self, ctx)
        except ValueError as exc:  # JSON has no NaN
            raise VLLMValidationError(
                "the adapter's scores of a text are not finite numbers", parameter="model"
            ) from exc
        body = json.loads(response.body)
        for item in body["data"]:
            item["label"] = label_of(heads[0], item["probs"])
        return type(response)(content=body)

    return build_response


def label_of(spec: HeadSpec, scores: Sequence[float]) -> str | None:
    """The label with the highest score; None in a regression, whose numbers are the answer."""
    if spec.task == "regression":
        return None
    return spec.labels[max(range(len(scores)), key=scores.__getitem__)]
