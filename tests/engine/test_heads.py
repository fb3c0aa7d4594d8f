"""Heads beside a model's own pooler: each request of a mixed step gets its own, whatever its neighbours ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from vllm import PoolingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.pooler import Pooler
from vllm.renderers import TokenizeParams
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from reft_serve.adapters.head import HeadSpec
from reft_serve.engine.front_end.pairs import _tokenise
from reft_serve.engine.worker.heads import HEAD_KEY, HeadPooler, Heads
from reft_serve.errors import AdapterUnsupported
from reft_serve.interventions.heads import Head
from tests.support.training.classifiers import tiny_bert

WIDTH = 8
LENGTHS = [3, 1, 4, 2, 5, 2]


class First(Pooler):  # type: ignore[misc]  # vllm is not type-checked
    """A model's own pooler: the first token of each request, as vLLM's finds it."""

    def get_supported_tasks(self) -> set[Any]:
        return {"embed"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> Any:
        cursor = pooling_metadata.get_pooling_cursor()
        assert len(hidden_states) == int(cursor.num_scheduled_tokens_cpu.sum())
        return hidden_states[cursor.first_token_indices_gpu]


def metadata(asked: list[tuple[str, str | None]]) -> PoolingMetadata:
    params = [
        PoolingParams(task=task, extra_kwargs=None if digest is None else {HEAD_KEY: digest})  # type: ignore[arg-type]
        for task, digest in asked
    ]
    lengths = torch.tensor(LENGTHS[: len(asked)])
    made = PoolingMetadata(lengths, None, None, params, [PoolingStates() for _ in params])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    made.build_pooling_cursor(
        np.array(lengths), lengths, device=torch.device("cpu"), query_start_loc_gpu=starts
    )
    return made


def pooler() -> tuple[HeadPooler, dict[str, Head]]:
    torch.manual_seed(0)
    heads, made = Heads(torch.device("cpu")), {}
    for digest, reads, outputs in (("a", "first", 2), ("b", "last", 3), ("c", "mean", 1)):
        problem: Any = "regression" if outputs == 1 else "single_label_classification"
        spec = HeadSpec(problem_type=problem, labels=tuple(map(str, range(outputs))), reads=reads)  # type: ignore[arg-type]
        made[digest] = Head(torch.randn(outputs, WIDTH), torch.randn(outputs))
        heads.hold(digest, f"path/of/{digest}", spec, made[digest])
    return HeadPooler(First(), heads), made


def test_each_request_of_a_step_gets_its_own_head() -> None:
    mixed, heads = pooler()
    asked: list[tuple[str, str | None]] = [
        ("embed", None), ("classify", "b"), ("embed", None), ("embed", None), ("classify", "c"), ("classify", "a"),
    ]  # fmt: skip
    hidden = torch.randn(sum(LENGTHS), WIDTH)
    rows = torch.split(hidden, LENGTHS)
    answers = mixed(hidden, metadata(asked))
    expected = [
        rows[0][0],
        heads["b"].logits(rows[1][-1:])[0].softmax(-1),
        rows[2][0],
        rows[3][0],
        heads["c"].logits(rows[4].mean(0, keepdim=True))[0],
        heads["a"].logits(rows[5][:1])[0].softmax(-1),
    ]
    for ours, theirs in zip(answers, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert mixed.get_supported_tasks() == {"embed", "classify"}


def test_a_step_without_heads_is_the_models_own() -> None:
    mixed, _ = pooler()
    hidden = torch.randn(sum(LENGTHS[:3]), WIDTH)
    answers = mixed(hidden, metadata([("embed", None)] * 3))
    assert isinstance(answers, torch.Tensor)
    torch.testing.assert_close(answers, hidden[[0, 3, 4]])


def test_the_dummy_run_at_the_start_needs_no_head() -> None:
    mixed, _ = pooler()
    answers = mixed(torch.randn(sum(LENGTHS[:2]), WIDTH), metadata([("classify", None)] * 2))
    assert [answer.shape for answer in answers] == [(1,), (1,)]


def test_a_head_of_another_width_than_the_models_is_refused() -> None:
    mixed, _ = pooler()
    mixed(torch.randn(sum(LENGTHS[:2]), WIDTH), metadata([("embed", None)] * 2))
    spec = HeadSpec(problem_type="regression", labels=("x",), reads="last")
    with pytest.raises(AdapterUnsupported, match=r"reads hidden states of 9 numbers, .* have 8"):
        mixed._heads.hold("d", "a/path", spec, Head(torch.randn(1, WIDTH + 1)))


def test_a_pair_is_tokenised_as_a_pair_and_refused_if_it_is_too_long(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path))
    tokenizer.max_chars_per_token = 5
    limits = TokenizeParams(max_total_tokens=64)
    ids, starts = _tokenise(tokenizer, limits, ["the cat", "a"], ["is good", ""])
    assert ids == [tokenizer("the cat", "is good")["input_ids"], [2, 6, 3, 3]]
    assert starts == [4, 3]
    with pytest.raises(VLLMValidationError, match="64"):
        _tokenise(tokenizer, limits, ["cat " * 50], ["dog " * 50])


def test_a_released_head_is_gone() -> None:
    mixed, _ = pooler()
    mixed._heads.release("a")
    with pytest.raises(KeyError):
        mixed(torch.randn(3, WIDTH), metadata([("classify", "a")]))
