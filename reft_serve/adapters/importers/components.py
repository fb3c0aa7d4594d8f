"""Places of a model in pyreft's words, turned into ours. No torch.

pyreft names a place by a component and a layer (`block_output`, 15), or by the path of a module and
one of its sides (`model.layers[15].output`, pyvene `models/intervenable_modelcard.py`); a path says
everything, so the layer next to it is ignored.
"""

from __future__ import annotations

import re

from reft_serve.interventions.vocabulary import COMPONENTS, Component

__all__ = ["ComponentUnknown", "resolve_component"]


class ComponentUnknown(ValueError):
    """The place is none of those that we edit; the message names it."""


_LAYER = re.compile(
    r"(?:(?:model\.|transformer\.|gpt_neox\.)?(?:decoder\.|language_model\.)?(?:model\.)?"
    r"(?:layers|h))\[(\d{1,5})\]\.(.+)"
)
_ENCODER_LAYER = re.compile(
    r"(?:(?:bert|roberta|distilbert|xlm_roberta|electra)\.)?(?:encoder|transformer)\.layer\[(\d{1,5})\]\.(.+)"
)
_ENCODER_PLACES: dict[str, Component] = {
    "output": "block_output",
    "input": "block_input",
    "attention.output": "attention_output",
}
_SIDES: dict[str, Component] = {"output": "block_output", "input": "block_input"}
# The last module of each sub-layer, and the sub-layer itself if it does nothing after that module.
_MODULES: dict[Component, frozenset[str]] = {
    "mlp_output": frozenset(
        {
            "mlp",
            "mlp.down_proj",
            "mlp.c_proj",
            "mlp.dropout",
            "mlp.dense_4h_to_h",
            "mlp.fc2",
            "fc2",
            "block_sparse_moe",
        }
    ),
    "attention_output": frozenset(
        {
            *("self_attn", "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense"),
            *("attn", "attn.c_proj", "attn.resid_dropout", "attention", "attention.dense"),
        }
    ),
}
_EMBEDDINGS = re.compile(
    r"(?:model\.|gpt_neox\.)?(?:decoder\.|language_model\.)?(?:model\.)?"
    r"(?:embed_tokens|embed_in)\.output"
)
# Families if nothing is added to the embeddings, or multiplied with them, before layer 0.
_PLAIN_EMBEDDINGS = re.compile(
    r"(Llama|Mistral|Mixtral|Qwen2|Qwen2Moe|Qwen3|Qwen3Moe|Phi|Phi3|Olmo|Olmo2|StableLm|GPTNeoX)"
    r"(For\w+|Model)"
)


def resolve_component(component: str, layer: object, architecture: str) -> tuple[int, Component]:
    """(layer, component) in our words.

    Args:
        component: pyreft's component or module path.
        layer: the layer next to it; ignored where the component is a path.
        architecture: the base model's class, which decides whether its embeddings are what layer 0
            reads.

    Raises:
        ComponentUnknown: the place is not one that we edit, or not one at all.
    """
    if "." in component:
        return _resolve_path(component.removeprefix("base_model.model."), component, architecture)
    for ours in COMPONENTS:
        if component == ours:
            if type(layer) is not int or layer < 0:
                raise ComponentUnknown(
                    f"layer {str(layer)[:40]!r} of {component} is not a layer number"
                )
            return layer, ours
    raise ComponentUnknown(
        f"{component[:80]!r} is not an editable component ({', '.join(COMPONENTS)})"
    )


def _resolve_path(path: str, named: str, architecture: str) -> tuple[int, Component]:
    if (match := _ENCODER_LAYER.fullmatch(path)) and match[2] in _ENCODER_PLACES:
        return int(match[1]), _ENCODER_PLACES[match[2]]
    if match := _LAYER.fullmatch(path):
        layer = int(match[1])
        rest = match[2]
        if rest in _SIDES:
            return layer, _SIDES[rest]
        module, _, side = rest.rpartition(".")
        for component, modules in _MODULES.items():
            if side == "output" and module in modules:
                return layer, component
    if _EMBEDDINGS.fullmatch(path) or path.removeprefix("transformer.") in (
        "wte.output",
        "wpe.output",
    ):
        if _PLAIN_EMBEDDINGS.fullmatch(architecture) and "decoder." not in path:
            return 0, "block_input"
        raise ComponentUnknown(
            f"{named[:80]!r} is not the input of layer 0 of a {architecture} reads: it adds to "
            "the embeddings or scales them, or is not known not to"
        )
    raise ComponentUnknown(
        f"{named[:80]!r} is not an editable component (a layer's input or output, or the output "
        "of its MLP or attention)"
    )
