"""An adapter in training: built fresh for a base model after a plan, and written as a version that
can be served.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import Adapter, publish, read_adapter
from reft_serve.adapters.head import HeadSpec
from reft_serve.adapters.manifest import BaseFacts, InterventionSpec, Manifest
from reft_serve.adapters.manifest import Part as PartName
from reft_serve.config import compiler
from reft_serve.errors import AdapterUnsupported, BaseModelInvalid, ClientError
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.model import cpu_fusion, lora
from reft_serve.training.model.classifier import ClassifierHead, ClassifierModel, trunk_of
from reft_serve.training.model.edited_model import Edit, EditedModel
from reft_serve.training.model.parent import Parent
from reft_serve.training.model.processes import keep_freed_memory, this_process
from reft_serve.training.plan import AdapterPlan, DType, Plan

__all__ = ["build", "publish_version", "restore"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Architectures of transformers whose last layer is not the next token's.
_OTHER_HEADS = ("Classification", "ForMaskedLM", "ForQuestionAnswering", "ForMultipleChoice")
_PARTS: dict[Part, PartName] = {Part.PREFIX: "prefix", Part.SUFFIX: "suffix"}


def build(base: Path, plan: Plan, parent: Parent | None = None) -> EditedModel | ClassifierModel:
    """The base model in the plan's dtype, with interventions (and a LoRA) as the plan's seed draws
    them, or as the parent has them, whose structure the plan then is.

    Raises:
        ClientError: float16 without a GPU, compiling without a compiler, or layers that the base
            has not.
        BaseModelInvalid: the base is not a language model (a classification head, say), or none
            that can be edited.
    """
    device = this_process().device
    if device.type == "cpu":
        keep_freed_memory()
    if plan.dtype == "float16" and device.type == "cpu":
        raise ClientError(
            "float16 needs a GPU, whose loss scaling keeps small gradients from vanishing; choose "
            "bfloat16 or float32"
        )
    if plan.compile and device.type == "cpu" and shutil.which(compiler()) is None:
        raise ClientError(
            f"compiling needs a C++ compiler and {compiler()} is not found: install one, or leave "
            "out --compile"
        )
    facts = read_base_model(base)
    if plan.head is not None:
        trunk = trunk_of(base, facts, _DTYPES[plan.dtype])
        set_seed(plan.seed)
        edits = _edits(plan.adapter, facts)
        return ClassifierModel(trunk, edits, ClassifierHead(plan.head, facts.hidden_size)).to(
            device
        )
    lm = _language_model(base, facts, plan.dtype)
    set_seed(plan.seed)
    edits = _edits(plan.adapter, facts) if parent is None else parent.edits(plan.adapter.dropout)
    if plan.lora is not None:
        lm = (
            lora.wrap(lm, plan.lora)
            if parent is None
            else lora.attach(lm, parent.path, trained=True)
        )
    model = EditedModel(
        lm, edits, gradient_checkpointing=plan.gradient_checkpointing, compiled=plan.compile
    )
    if device.type == "cpu" and not plan.compile:
        cpu_fusion.fuse(model.lm)
    return model.to(device)


def restore(base: Path, path: Path, dtype: DType = "float32") -> tuple[EditedModel, PositionRule]:
    """A published adapter on its base model, to be evaluated as the trainer does it.

    Raises:
        AdapterNotFound, AdapterInvalid: it cannot be read. AdapterUnsupported: it edits something
            that is not trained here.
    """
    adapter = read_adapter(path)
    parts = {name: part for part, name in _PARTS.items()} | {"both": Part.PREFIX}
    others = {spec.component for spec in adapter.manifest.interventions} - {"block_output"}
    halves = [spec.part for spec in adapter.manifest.interventions]
    if others or ("both" in halves and not adapter.manifest.positions.tied):
        raise AdapterUnsupported(
            str(path), [f"it edits {', '.join(sorted(others) or ['both halves at once'])}"]
        )
    lm = _language_model(base, read_base_model(base), dtype)
    if adapter.lora is not None:
        lm = lora.attach(lm, path)
    edits = [
        Edit(spec.layer, parts[spec.part], Intervention.of(weights))
        for spec, weights in zip(adapter.manifest.interventions, adapter.weights, strict=True)
    ]
    return EditedModel(lm, edits).to(this_process().device).eval(), adapter.manifest.positions


def publish_version(
    path: Path,
    model: EditedModel | ClassifierModel,
    plan: Plan,
    base: BaseFacts,
    provenance: Mapping[str, str | int | float | bool | None],
) -> Adapter:
    """Write the adapter as it is now.

    Raises:
        AdapterInvalid: training has diverged, so that the adapter holds NaN or Inf. AdapterExists:
            `path` is taken.
    """
    shape = plan.adapter
    specs = tuple(
        InterventionSpec(
            layer=edit.layer,
            component="block_output",
            kind=shape.kind,
            rank=shape.rank,
            activation=shape.activation,
            part="both" if shape.rule.tied else _PARTS[edit.part],
        )
        for edit in model.edits
    )
    head = None if plan.head is None else HeadSpec(**asdict(plan.head))
    manifest = Manifest(
        base_model=base,
        interventions=specs,
        positions=shape.rule,
        head=head,
        provenance=dict(provenance),
    )
    weights = [_on_cpu(edit.module.weights()) for edit in model.edits]
    half = None if plan.lora is None else lora.lora_weights(model.lm, str(path))
    learnt = model.head.weights() if isinstance(model, ClassifierModel) else None
    return publish(path, manifest, weights, half, learnt)


def _language_model(base: Path, facts: BaseFacts, dtype: DType) -> Any:
    """The base, whole. transformers would make up the weights that a model of another sort
    lacks.
    """
    remedy = (
        "use the causal language model of its family as --base; for classification, let the "
        "answer name the class, as the GLUE recipes do (glue-cola)"
    )
    if facts.architecture.endswith(_OTHER_HEADS):
        raise BaseModelInvalid(
            f"{facts.name} is a {facts.architecture}: its head classifies or fills in tokens and "
            f"generates no text, so the engine could not serve an adapter trained on it; {remedy}"
        )
    lm, loading = AutoModelForCausalLM.from_pretrained(
        base, dtype=_DTYPES[dtype], output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise BaseModelInvalid(
            f"{facts.name} ({facts.architecture}) lacks {len(missing)} tensors of a language "
            f"model, {missing[0]} first; {remedy}"
        )
    return lm


def _on_cpu(weights: Weights) -> Weights:
    tensors = {name: tensor.cpu() for name, tensor in weights.tensors().items()}
    return Weights.of(weights.kind, tensors, weights.activation)


def _edits(shape: AdapterPlan, base: BaseFacts) -> list[Edit]:
    layers = range(base.num_hidden_layers) if shape.layers is None else shape.layers
    wrong = [layer for layer in layers if not 0 <= layer < base.num_hidden_layers]
    if wrong:
        raise ClientError(
            f"there is no layer {wrong[0]}: the base model has 0 to {base.num_hidden_layers - 1}"
        )
    if shape.rank > base.hidden_size:
        raise ClientError(
            f"rank {shape.rank} is larger than the base's hidden size {base.hidden_size}"
        )
    parts = (Part.PREFIX,) if shape.rule.tied else tuple(Part)
    return [
        Edit(
            layer,
            part,
            Intervention(shape.kind, base.hidden_size, shape.rank, shape.activation, shape.dropout),
        )
        for part in parts
        for layer in layers
    ]
