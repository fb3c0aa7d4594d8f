"""Find a model's decoder layers by their structure and let each call the edit op where interventions act.

vLLM's layers return `(hidden, residual)`, whose sum is the block's output, or the block's output alone. The stream that
leaves layer k is the one that enters layer k + 1, so `block_output` of k and `block_input` of k + 1 are one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft_serve.errors import EngineUnsupported

__all__ = ["Place", "decoder_layers", "places_of", "watch"]

# (boundary, "block") or (layer, "mlp_output" | "attention_output"), as adapters.manifest.place_of names them.
Place = tuple[int, str]

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_PARTS = {"attention_output": _ATTENTION, "mlp_output": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")}


def decoder_layers(model: nn.Module, count: int) -> dict[int, nn.Module]:
    """The decoder layers that this process holds, by their number in the model.

    Raises:
        EngineUnsupported: no list of `count` modules whose members contain attention was found.
    """
    for _, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            own = {k: layer for k, layer in enumerate(module) if _child(layer, _ATTENTION) is not None}
            if own:
                return own
    raise EngineUnsupported(
        f"{type(model).__name__} has no list of {count} decoder layers with attention inside, so ReFT cannot act on it; "
        "start this model without --enable-lora"
    )


def places_of(layers: Mapping[int, nn.Module], components: Iterable[str]) -> dict[Place, int]:
    """The places where this process can edit, numbered. Boundary 0, the embeddings, belongs to the first layer's owner."""
    places: list[Place] = []
    for number, layer in layers.items():
        if "block" in components:
            places += [(0, "block")] if number == 0 else []
            places.append((number + 1, "block"))
        places += [(number, name) for name, names in _PARTS.items() if name in components and _child(layer, names)]
    return {place: number for number, place in enumerate(places)}


def watch(layers: Mapping[int, nn.Module], places: Mapping[Place, int], engine: int) -> None:
    """Hook the layers, so that each place calls the op with the number of its engine and its own.

    Raises:
        EngineUnsupported: a layer that takes no hidden_states. One that returns something other than the stream is refused
            in the first forward, which happens at start.
    """
    for (layer, name), number in places.items():
        if name == "block" and layer == 0:
            _hook_input(layers[0], engine, number)
        elif name == "block":
            layers[layer - 1].register_forward_hook(_block_hook(engine, number))
        else:
            part = _child(layers[layer], _PARTS[name])
            assert part is not None, "places_of names only parts that are there"
            part.register_forward_hook(_part_hook(engine, number, name))


def _child(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(layer.named_children())
    return next((children[name] for name in names if name in children), None)


def _hook_input(layer: nn.Module, engine: int, place: int) -> None:
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise EngineUnsupported(
            f"{type(layer).__name__}.forward has no hidden_states; leave block out of REFT_COMPONENTS"
        )
    index = names.index("hidden_states")

    def edit_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[index] if index < len(args) else kwargs["hidden_states"]
        torch.ops.reft_serve.edit(hidden, engine, place)

    layer.register_forward_pre_hook(edit_input, with_kwargs=True)


def _block_hook(engine: int, place: int) -> Callable[[nn.Module, Any, Any], None]:
    def edit_output(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            torch.ops.reft_serve.edit(output, engine, place)
        elif isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Tensor) for part in output):
            torch.ops.reft_serve.edit_stream(output[0], output[1], engine, place)
        else:
            raise EngineUnsupported(
                f"{type(layer).__name__} returns neither its hidden states nor (hidden, residual), so its output cannot be "
                "edited; start this model without --enable-lora"
            )

    return edit_output


def _part_hook(engine: int, place: int, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def edit_output(part: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise EngineUnsupported(
                f"{type(part).__name__} does not return one tensor, so {name} cannot be edited; leave it out of "
                "REFT_COMPONENTS"
            )
        torch.ops.reft_serve.edit(output, engine, place)

    return edit_output
