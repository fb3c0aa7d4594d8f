"""Tiny random encoders and classifiers, adapters with heads for them, and a reference in plain Hugging Face with hooks.

The reference shares nothing with the product but the adapter's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import publish
from reft_serve.adapters.head import HeadSpec
from reft_serve.adapters.manifest import InterventionSpec, Manifest
from reft_serve.interventions.heads import Head
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, Read

VOCABULARY, WIDTH, LAYERS, RANK = 160, 64, 3, 2
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "max_position_embeddings": 130, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = _ENCODER | {"num_key_value_heads": 1, "tie_word_embeddings": False}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 96, "n_layers": LAYERS, "n_heads": 2,
    "max_position_embeddings": 130, "pad_token_id": 0,
}  # fmt: skip
RULES = ("f1", "first", "f3", "all", "l2", "f2+l2")


@dataclass(frozen=True)
class Base:
    """One base model: `auto` loads what is saved, `layers` is where its layers are below the model without its head."""

    config: str
    options: Mapping[str, Any]
    auto: str = "AutoModel"
    layers: str = "encoder.layer"
    reads: Read = "first"

    def build(self, folder: Path) -> None:
        """Save a random model with every tensor away from its default."""
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, self.auto).from_config(
            getattr(transformers, self.config)(**self.options)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(
                    scale * torch.randn_like(parameter) + (parameter if parameter.dim() == 1 else 0)
                )
        model.eval().save_pretrained(folder)
        write_tokenizer(folder, VOCABULARY)

    def trunk(self, folder: Path) -> nn.Module:
        """The model without its head, in eval mode."""
        import transformers

        found: nn.Module = transformers.AutoModel.from_pretrained(
            folder, attn_implementation="eager"
        ).eval()
        return found


BASES: dict[str, Base] = {
    "bert": Base("BertConfig", _ENCODER),
    "bert masked": Base("BertConfig", _ENCODER, "AutoModelForMaskedLM"),
    "bert classifier": Base("BertConfig", _ENCODER | {"num_labels": 3}, "AutoModelForSequenceClassification"),
    "roberta": Base("RobertaConfig", _ENCODER, "AutoModelForMaskedLM"),
    "roberta classifier": Base("RobertaConfig", _ENCODER | {"num_labels": 3}, "AutoModelForSequenceClassification"),
    "distilbert": Base("DistilBertConfig", _DISTILBERT, "AutoModelForMaskedLM", "transformer.layer"),
    "llama": Base("LlamaConfig", _DECODER, "AutoModelForCausalLM", "layers", "last"),
    "llama classifier": Base(
        "LlamaConfig", _DECODER | {"num_labels": 3}, "AutoModelForSequenceClassification", "layers", "last"
    ),
    "qwen2": Base("Qwen2Config", _DECODER, "AutoModelForCausalLM", "layers", "last"),
}  # fmt: skip


def write_tokenizer(folder: Path, size: int) -> None:
    """Words w0, w1 and so on: vLLM pools only where there is a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(size)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w3").save_pretrained(
        folder
    )


@dataclass(frozen=True)
class Classifier:
    """One adapter with its head."""

    path: Path
    rule: str
    spec: HeadSpec
    head: Head
    edits: Mapping[int, Mapping[str, Tensor]]

    def indices(self, length: int) -> list[int]:
        """The edited tokens, by hand."""
        half = length // 2
        return {
            "f1": list(range(min(1, half))), "first": [0], "f3": list(range(min(3, half))), "all": list(range(length)),
            "l2": list(range(length - min(2, half), length)),
            "f2+l2": [*range(min(2, half)), *range(length - min(2, half), length)],
        }[self.rule]  # fmt: skip


def make_classifiers(
    folder: Path, base: Path, reads: Read, count: int, width: int, layers: int
) -> list[Classifier]:
    """Adapters with different rules, ranks of layers, numbers of labels, sorts of problem and forms of head."""
    random = torch.Generator().manual_seed(11)
    kinds = ("single_label_classification", "multi_label_classification", "regression")
    made = []
    for k in range(count):
        problem: Any = kinds[k % 3]
        outputs = 1 if problem == "regression" else 2 + k % 4
        activation = (None, "tanh", "relu")[k % 3 if k % 2 else 1]
        read: Read = reads if reads == "last" or k % 4 else "mean"
        spec = HeadSpec(
            problem_type=problem,
            labels=tuple(f"label {k}.{c}" for c in range(outputs)),
            reads=read,
            activation=activation,
        )
        named = {"out.weight": torch.randn(outputs, width, generator=random) * width**-0.5}
        if k % 2 == 0:
            named["out.bias"] = torch.randn(outputs, generator=random)
        if activation is not None:
            named["dense.weight"] = torch.randn(width, width, generator=random) * width**-0.5
            named["dense.bias"] = torch.randn(width, generator=random)
        head = Head.of(named, ACTIVATION_CODES[activation or "linear"])
        rule = RULES[k % len(RULES)]
        edits = {layer: _loreft(random, width) for layer in range(layers) if (layer + k) % 2 == 0}
        manifest = Manifest(
            base_model=read_base_model(base),
            interventions=tuple(
                InterventionSpec(layer=layer, component="block_output", kind="loreft", rank=RANK)
                for layer in edits
            ),
            positions=PositionRule(rule),
            head=spec,
        )
        path = folder / f"classifier{k}"
        publish(
            path, manifest, [Weights.of("loreft", dict(edit)) for edit in edits.values()], head=head
        )
        made.append(Classifier(path, rule, spec, head, edits))
    return made


def _loreft(random: torch.Generator, width: int) -> dict[str, Tensor]:
    R = torch.linalg.qr(torch.randn(width, RANK, generator=random))[0].mT.contiguous()
    return {
        "R": R, "W": torch.randn(RANK, width, generator=random) * width**-0.5, "b": torch.randn(RANK, generator=random),
    }  # fmt: skip


def reference_logits(
    trunk: Any,
    layers: str,
    classifier: Classifier,
    tokens: Sequence[int],
    token_types: Sequence[int] | None = None,
) -> Tensor:
    """Logits of one text: Hugging Face with forward hooks, and the head written out."""
    at = classifier.indices(len(tokens))
    handles = []
    for number, edit in classifier.edits.items():

        def change(
            _module: nn.Module, _inputs: object, output: Any, edit: Mapping[str, Tensor] = edit
        ) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            x = h[0, at]
            h[0, at] = x + (x @ edit["W"].T + edit["b"] - x @ edit["R"].T) @ edit["R"]
            return output

        handles.append(trunk.get_submodule(layers)[number].register_forward_hook(change))
    inputs = {"input_ids": torch.tensor([list(tokens)])}
    if token_types is not None:
        inputs["token_type_ids"] = torch.tensor([list(token_types)])
    with torch.no_grad():
        h = trunk(**inputs).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    read = {"first": h[0], "last": h[-1], "mean": h.mean(dim=0)}[classifier.spec.reads]
    head = classifier.head
    if head.dense is not None:
        act = {"tanh": torch.tanh, "relu": torch.relu}[classifier.spec.activation or ""]
        read = act(head.dense @ read + head.dense_bias)
    return head.out @ read + (0 if head.out_bias is None else head.out_bias)


def reference_scores(logits: Tensor, problem: str) -> Tensor:
    """What is answered for them."""
    if problem == "regression":
        return logits
    return logits.softmax(-1) if problem == "single_label_classification" else logits.sigmoid()
