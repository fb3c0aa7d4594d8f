"""Find a model's decoder layers by their structure and let each call the edit op where
interventions act.

Most of vLLM's layers return `(hidden, residual)`, whose sum is the block's output, others the
block's output alone. The stream that leaves layer k is the one that enters layer k + 1, so
`block_output` of k and `block_input` of k + 1 are one place. The results were compared with Hugging
Face's tensors family by family: docs/compatibility.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft_serve.errors import EngineUnsupported
from reft_serve.interventions.layers import ATTENTION, attention_of, child_of, lists_of

__all__ = ["HookPoint", "decoder_layers", "install_hooks", "places_of"]

# (boundary, "block") or (layer, "mlp_output" | "attention_output"), as adapters.manifest.place_of
# names them.
HookPoint = tuple[int, str]

_PARTS = {
    "attention_output": ATTENTION,
    # OPT has no module around its two linear layers; the last one's output is what leaves them.
    "mlp_output": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2"),
}
# Layers that return (hidden, residual) with the residual added to hidden already; read in vLLM
# 0.32.
_ADDED_ALREADY = frozenset(
    {
        *(
            "CohereDecoderLayer",
            "Cohere2MoeDecoderLayer",
            "CohereCompassDecoderLayer",
            "Exaone4DecoderLayer",
        ),
        *("HyperCLOVAXDecoderLayer", "MolmoDecoderNormAfterLayer", "Molmo2DecoderNormAfterLayer"),
        *("MuseGlimmerDecoderLayer", "PhiMoEDecoderLayer", "StablelmDecoderLayer"),
    }
)
# Hugging Face's attention and MLP of these add the residual inside, so their outputs are other
# tensors than vLLM's.
_OTHER_PARTS = frozenset({"BloomBlock", "DistilBertLayer"})
_WITHOUT_US = "start this model without --enable-lora, or for LoRA alone with VLLM_PLUGINS=''"


def decoder_layers(model: nn.Module, count: int) -> dict[int, nn.Module]:
    """The decoder layers that this process holds, by their number in the model.

    Raises:
        EngineUnsupported: no list of `count` modules that all contain attention was found, or the
            model has recurrent states too.
    """
    name = type(model).__name__
    if any(
        getattr(model, flag, False)
        for flag in ("has_inner_state", "is_hybrid", "is_attention_free")
    ):
        raise EngineUnsupported(
            f"{name} keeps states other than keys and values (state-space, linear-attention or "
            f"convolution layers), on which ReFT is not tested; {_WITHOUT_US}"
        )
    # An image or audio tower may have as many layers.
    language_model: nn.Module = getattr(model, "get_language_model", lambda: model)()
    for module in lists_of(language_model, count):
        # A rank of a pipeline has placeholders, without children, for the layers of the others.
        own = {k: layer for k, layer in enumerate(module) if any(layer.children())}
        without = [k for k, layer in own.items() if attention_of(layer) is None]
        if own and not without:
            return own
        if len(without) < len(own):
            raise EngineUnsupported(
                f"{name} has no attention in layer {without[0]}, so ReFT cannot act on all its "
                f"layers; {_WITHOUT_US}"
            )
    raise EngineUnsupported(
        f"{name} has no list of {count} decoder layers with attention inside, so ReFT cannot act "
        f"on it; {_WITHOUT_US}"
    )


def places_of(layers: Mapping[int, nn.Module], components: Iterable[str]) -> dict[HookPoint, int]:
    """The places where this process can edit, numbered. Boundary 0, the embeddings, belongs to the
    first layer's owner.
    """
    places: list[HookPoint] = []
    for number, layer in layers.items():
        if "block" in components:
            places += [(0, "block")] if number == 0 else []
            places.append((number + 1, "block"))
        if type(layer).__name__ not in _OTHER_PARTS:
            places += [
                (number, name)
                for name, names in _PARTS.items()
                if name in components and child_of(layer, names)
            ]
    return {place: number for number, place in enumerate(places)}


def install_hooks(
    layers: Mapping[int, nn.Module], places: Mapping[HookPoint, int], engine: int
) -> None:
    """Hook the layers, so that each place calls the op with the number of its engine and its own.

    Raises:
        EngineUnsupported: a layer that takes no hidden_states, or a part whose output is only this
            rank's share. One that returns something other than the stream is refused in the first
            forward, which happens at start.
    """
    for (layer, name), number in places.items():
        if name == "block" and layer == 0:
            _hook_input(layers[0], engine, number)
        elif name == "block":
            layers[layer - 1].register_forward_hook(_block_hook(engine, number))
        else:
            part = child_of(layers[layer], _PARTS[name])
            assert part is not None, "places_of names only parts that are there"
            _check_whole(part, name)
            part.register_forward_hook(_part_hook(engine, number, name))


def _check_whole(part: nn.Module, name: str) -> None:
    """Refuse a part that leaves the sum over tensor-parallel ranks to its layer."""
    for child in (part, *part.children()):
        linear: Any = getattr(child, "base_layer", child)  # LoRA's wrapper has it inside
        if (
            getattr(linear, "input_is_parallel", False)
            and linear.tp_size > 1
            and not linear.reduce_results
        ):
            raise EngineUnsupported(
                f"{type(part).__name__} returns only this rank's share of {name} under tensor "
                "parallelism, so it cannot be edited; leave it out of REFT_COMPONENTS"
            )


def _hook_input(layer: nn.Module, engine: int, place: int) -> None:
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise EngineUnsupported(
            f"{type(layer).__name__}.forward has no hidden_states; leave block out of "
            "REFT_COMPONENTS"
        )
    index = names.index("hidden_states")

    def edit_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[index] if index < len(args) else kwargs["hidden_states"]
        torch.ops.reft_serve.edit(_rows(hidden, layer), engine, place)

    layer.register_forward_pre_hook(edit_input, with_kwargs=True)


def _block_hook(engine: int, place: int) -> Callable[[nn.Module, Any, Any], None]:
    def edit_output(layer: nn.Module, _: Any, output: Any) -> None:
        hidden, residual = _first(output)
        if hidden is None or not (residual is None or isinstance(residual, Tensor)):
            raise EngineUnsupported(
                f"{type(layer).__name__} returns neither its hidden states nor (hidden, "
                f"residual), so its output cannot be edited; {_WITHOUT_US}"
            )
        if residual is None or type(layer).__name__ in _ADDED_ALREADY:
            torch.ops.reft_serve.edit(_rows(hidden, layer), engine, place)
        else:
            torch.ops.reft_serve.edit_stream(
                _rows(hidden, layer), _rows(residual, layer), engine, place
            )

    return edit_output


def _part_hook(engine: int, place: int, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def edit_output(part: nn.Module, _: Any, output: Any) -> None:
        hidden, bias = _first(output)
        if hidden is None or bias is not None:
            raise EngineUnsupported(
                f"{type(part).__name__} does not return one tensor, so {name} cannot be edited; "
                "leave it out of REFT_COMPONENTS"
            )
        torch.ops.reft_serve.edit(_rows(hidden, part), engine, place)

    return edit_output


def _first(output: Any) -> tuple[Tensor | None, Any]:
    """A module's output as (its first tensor, what else it returns or None); no tensor if it has
    another form.
    """
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and 1 <= len(output) <= 2 and isinstance(output[0], Tensor):
        return output[0], output[1] if len(output) == 2 else None
    return None, None


def _rows(hidden: Tensor, module: nn.Module) -> Tensor:
    """The step's tokens as rows, sharing memory. Models of transformers' own code have a batch of
    one around them.
    """
    if hidden.dim() == 3 and hidden.shape[0] == 1:
        return hidden[0]
    if hidden.dim() != 2:
        raise EngineUnsupported(
            f"{type(module).__name__} holds hidden states of {hidden.dim()} dimensions, not one "
            f"row per token, so ReFT cannot act on it; {_WITHOUT_US}"
        )
    return hidden
