"""Classifier heads in the pooling step: each request of a batch goes through the head of its own
adapter.

The model's own pooler stays and answers all other requests. A request's pooling parameters name its
head, so the order of a batch does not matter. A version's head stays on the device as long as the
version is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.v1.pool.metadata import PoolingCursor, PoolingMetadata

from reft_serve.adapters.head import HeadSpec
from reft_serve.errors import AdapterUnsupported
from reft_serve.interventions.heads import Head, scores_of
from reft_serve.interventions.vocabulary import Read

__all__ = ["HEAD_KEY", "HeadPooler", "Heads", "head_of_params", "with_heads"]

HEAD_KEY = "reft_head"
_CLASSIFY = "classify"


class Heads:
    """The heads of the versions that a worker holds, by digest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, tuple[HeadSpec, Head]] = {}
        #: Width of what the model passes to its pooler; None before the first step, which vLLM
        #: runs at start.
        self.width: int | None = None

    def hold(self, digest: str, path: str, spec: HeadSpec, head: Head) -> None:
        """Keep a version's head until `release`.

        Raises:
            AdapterUnsupported: the model passes something other than its hidden states to its
                pooler.
        """
        if digest in self._held:
            return
        width = head.out.shape[1]
        if self.width not in (None, width):
            raise AdapterUnsupported(
                path,
                [
                    f"its head reads hidden states of {width} numbers, and this base model's "
                    f"outputs have {self.width}: serve the base without its own output layer"
                ],
            )
        self._held[digest] = spec, head.to(self._device)

    def release(self, digest: str) -> None:
        """Forget a version's head, if it is held."""
        self._held.pop(digest, None)

    def __getitem__(self, digest: str) -> tuple[HeadSpec, Head]:
        return self._held[digest]


def head_of_params(params: Any) -> str | None:
    """The digest of the version whose head answers a request; None for the model's own pooler."""
    digest: str | None = (params.extra_kwargs or {}).get(HEAD_KEY)
    return digest


def with_heads(model: nn.Module, heads: Heads) -> None:
    """Add the heads to the model's own pooler. A model that generates has no pooler."""
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, Pooler):
        return
    if any(kind.__name__ == "BertForMaskedLM" for kind in type(model).__mro__):
        # Its forward ends with the scores of the vocabulary; a head needs the states below them.
        pooler = _Projected(model.mlm_head, pooler)
        model.mlm_head = nn.Identity()
    # Assigning over a module replaces it in the model's list of modules.
    model.pooler = HeadPooler(pooler, heads)


class _Projected(Pooler):  # type: ignore[misc]  # vllm is not type-checked
    """A pooler that applies the model's output layer first."""

    def __init__(self, output_layer: Any, own: Pooler) -> None:
        super().__init__()
        self.output_layer = output_layer
        self.own = own

    def get_supported_tasks(self) -> set[Any]:
        return set(self.own.get_supported_tasks())

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        return self.own.get_pooling_updates(task)

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Any:
        return self.own(self.output_layer(hidden_states), pooling_metadata)


class HeadPooler(Pooler):  # type: ignore[misc]  # vllm is not type-checked
    """The model's pooler, and `classify` by the heads of adapters."""

    def __init__(self, own: Pooler, heads: Heads) -> None:
        super().__init__()
        self.own = own
        self._heads = heads

    def get_supported_tasks(self) -> set[Any]:
        """The tasks of the model, and classify."""
        return {*self.own.get_supported_tasks(), _CLASSIFY}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """What the model's own pooler needs. A head needs nothing."""
        return (
            self.own.get_pooling_updates(task)
            if task in self.own.get_supported_tasks()
            else PoolingParamsUpdate()
        )

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Any:
        """One tensor per request; those of different heads have different lengths."""
        self._heads.width = hidden_states.shape[-1]
        params = pooling_metadata.pooling_params
        digests = [head_of_params(each) for each in params]
        known = self.own.get_supported_tasks()
        # Only vLLM's dummy run at start has requests without a head for a task that the model does
        # not support.
        own = [k for k, digest in enumerate(digests) if digest is None and params[k].task in known]
        if len(own) == len(params):
            return self.own(hidden_states, pooling_metadata)
        unanswered = hidden_states.new_full((1,), torch.nan, dtype=torch.float32)
        answers: list[Tensor] = [unanswered] * len(params)
        for start, stop in _runs(own):
            rows, part = _part(hidden_states, pooling_metadata, start, stop)
            answers[start:stop] = list(self.own(rows, part))
        members: dict[str, list[int]] = {}
        for k, digest in enumerate(digests):
            if digest is not None:
                members.setdefault(digest, []).append(k)
        cursor = pooling_metadata.get_pooling_cursor()
        for digest, at in members.items():
            spec, head = self._heads[digest]
            logits = head.logits(_read(hidden_states, cursor, at, spec.reads))
            scores = scores_of(logits, spec.problem_type)
            for row, k in enumerate(at):
                answers[k] = logits[row] if params[k].use_activation is False else scores[row]
        return answers


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs [start, stop)."""
    start = 0
    for k, number in enumerate(indices):
        if k + 1 == len(indices) or indices[k + 1] != number + 1:
            yield indices[start], number + 1
            start = k + 1


def _part(
    hidden_ND: Tensor, metadata: PoolingMetadata, start: int, stop: int
) -> tuple[Tensor, PoolingMetadata]:
    """The tokens of the requests [start, stop), and vLLM's metadata of them, counted from their
    first token.
    """
    part = metadata[start:stop]
    scheduled = metadata.get_pooling_cursor().num_scheduled_tokens_cpu
    before, count = int(scheduled[:start].sum()), int(scheduled[start:stop].sum())
    cursor = part.get_pooling_cursor()
    moved = replace(
        cursor,
        first_token_indices_gpu=cursor.first_token_indices_gpu - before,
        last_token_indices_gpu=cursor.last_token_indices_gpu - before,
    )
    return hidden_ND[before : before + count], replace(part, pooling_cursor=moved)


def _read(hidden_ND: Tensor, cursor: PoolingCursor, at: list[int], reads: Read) -> Tensor:
    """What a head reads of the requests `at`: (len(at), D). The row of a request whose prompt
    continues in the next step is not used.
    """
    if reads == "mean":
        ends = cursor.num_scheduled_tokens_cpu.cumsum(0).tolist()
        counts = cursor.num_scheduled_tokens_cpu.tolist()
        return torch.stack(
            [hidden_ND[ends[k] - counts[k] : ends[k]].float().mean(dim=0) for k in at]
        )
    rows = cursor.first_token_indices_gpu if reads == "first" else cursor.last_token_indices_gpu
    return hidden_ND[rows[at]]
