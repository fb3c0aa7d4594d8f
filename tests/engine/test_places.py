"""Where a model's edits act is found by its structure; what is not the tensor that pyreft means is refused."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reft_serve.engine.worker import hook_points
from reft_serve.engine.worker.edits import Edits, attach_edits
from reft_serve.engine.worker.hook_points import decoder_layers, install_hooks, places_of
from reft_serve.errors import EngineUnsupported
from reft_serve.interventions.batched import UnitPool
from reft_serve.interventions.kinds import Unit

EVERYWHERE = {"block", "mlp_output", "attention_output"}


class Layer(nn.Module):
    """A decoder layer by its parts; `answer` makes its output."""

    def __init__(self, answer: Any = None, **parts: nn.Module) -> None:
        super().__init__()
        self.answer = answer
        for name, part in ({"self_attn": nn.Linear(4, 4)} | parts).items():
            setattr(self, name, part)

    def forward(self, hidden_states: Tensor) -> Any:
        return self.answer(hidden_states)


class StablelmDecoderLayer(Layer):
    """By its name a layer that returns its residual too, though it has added it."""


class BloomBlock(Layer):
    """By its name a layer whose parts are not Hugging Face's."""


@pytest.fixture
def engine() -> int:
    """The number of an engine that adds 1 to the first token at each of its places."""
    pool = UnitPool(units=1, rank=1, width=4)
    pool.write(1, Unit(A=torch.zeros(1, 4), b=torch.ones(1), B=torch.ones(1, 4)))
    edits = Edits(pool, torch.ones(8, 1, 1, dtype=torch.int32), max_tokens=8)
    edits.set_rows(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32))
    return attach_edits(edits)


def hooked(layer: Layer, components: set[str], engine: int) -> Layer:
    layers = decoder_layers(nn.Sequential(nn.ModuleList([layer])), 1)
    install_hooks(layers, places_of(layers, components), engine)
    return layer


def ones(*shape: int) -> Tensor:
    return torch.ones(shape or (3, 4))


@pytest.mark.parametrize(
    ("layer", "hidden", "residual"),
    [
        (Layer(lambda h: ones()), 2, None),
        (Layer(lambda h: (ones(), None)), 2, None),
        (Layer(lambda h: (ones(),)), 2, None),
        (Layer(lambda h: (ones(), ones())), 3, 0),
        (StablelmDecoderLayer(lambda h: (ones(), ones())), 2, 1),
    ],
    ids=[
        "one tensor",
        "and no residual",
        "in a tuple",
        "a residual to add",
        "a residual that is added",
    ],
)
def test_the_stream_is_what_the_layer_says_it_is(
    layer: Layer, hidden: int, residual: int | None, engine: int
) -> None:
    entering = ones()
    output = hooked(layer, {"block"}, engine)(entering)
    first, *others = output if isinstance(output, tuple) else (output,)
    assert entering[:, 0].tolist() == [2, 1, 1]
    assert first[:, 0].tolist() == [hidden, 1, 1]
    if residual is not None:
        assert others[0][:, 0].tolist() == [residual, 1, 1]


def test_a_batch_of_one_around_the_tokens_is_edited_in_place(engine: int) -> None:
    entering = ones(1, 3, 4)
    leaving = hooked(Layer(lambda h: ones(1, 3, 4)), {"block"}, engine)(entering)
    assert entering[0, :, 0].tolist() == leaving[0, :, 0].tolist() == [2, 1, 1]


@pytest.mark.parametrize("shape", [(2, 3, 4), (12,), (1, 1, 3, 4)])
def test_streams_of_other_shapes_are_refused(shape: tuple[int, ...], engine: int) -> None:
    layer = hooked(Layer(lambda h: ones(*shape)), {"block"}, engine)
    with pytest.raises(
        EngineUnsupported, match=rf"Layer holds hidden states of {len(shape)} dimensions"
    ):
        layer(ones())


@pytest.mark.parametrize(
    "answer", [{"hidden": ones()}, (ones(), ones(), ones()), (ones(), (ones(),)), (None, ones())]
)
def test_a_layer_that_does_not_return_the_stream_is_refused(answer: Any, engine: int) -> None:
    layer = hooked(Layer(lambda h: answer), {"block"}, engine)
    with pytest.raises(EngineUnsupported, match="neither its hidden states nor"):
        layer(ones())


class Part(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self) -> Any:
        return self.answer


@pytest.mark.parametrize("form", ["tensor", "and no bias", "batch of one"])
@pytest.mark.parametrize("name", ["mlp", "block_sparse_moe", "fc2"])
def test_the_output_of_a_part_is_its_first_tensor(name: str, form: str, engine: int) -> None:
    hidden = ones()
    answer = {"tensor": hidden, "and no bias": (hidden, None), "batch of one": hidden[None]}[form]
    layer = hooked(Layer(**{name: Part(answer)}), {"mlp_output"}, engine)
    getattr(layer, name)()
    assert hidden[:, 0].tolist() == [2, 1, 1]


def test_a_part_that_keeps_its_bias_apart_is_refused(engine: int) -> None:
    layer = hooked(Layer(mlp=Part((ones(), ones()))), {"mlp_output"}, engine)
    with pytest.raises(
        EngineUnsupported,
        match=r"Part does not return one tensor, so mlp_output .* REFT_COMPONENTS",
    ):
        layer.mlp()


@pytest.mark.parametrize(
    ("size", "reduced", "refused"), [(2, False, True), (2, True, False), (1, False, False)]
)
def test_a_part_that_leaves_the_sum_over_ranks_to_its_layer_is_refused(
    size: int, reduced: bool, refused: bool, engine: int
) -> None:
    attention = Part(None)
    attention.o_proj = nn.Linear(4, 4)
    for name, value in {
        "input_is_parallel": True,
        "tp_size": size,
        "reduce_results": reduced,
    }.items():
        setattr(attention.o_proj, name, value)
    if not refused:
        hooked(Layer(self_attn=attention), EVERYWHERE, engine)
        return
    with pytest.raises(EngineUnsupported, match="only this rank's share of attention_output"):
        hooked(Layer(self_attn=attention), EVERYWHERE, engine)


def test_parts_that_hugging_face_cuts_elsewhere_are_no_places() -> None:
    parts = {"self_attention": Part(None), "mlp": Part(None)}
    assert set(places_of({0: Layer(**parts)}, EVERYWHERE)) == {
        (0, "block"), (1, "block"), (0, "mlp_output"), (0, "attention_output"),
    }  # fmt: skip
    assert set(places_of({0: BloomBlock(**parts)}, EVERYWHERE)) == {(0, "block"), (1, "block")}


def test_layers_are_found_in_the_language_model_of_a_model_with_towers() -> None:
    model = nn.Module()
    model.tower, model.text = (nn.ModuleList([Layer(), Layer()]) for _ in range(2))
    assert decoder_layers(model, 2)[0] is model.tower[0]
    model.get_language_model = lambda: model.text  # type: ignore[assignment]
    assert decoder_layers(model, 2)[0] is model.text[0]


def test_a_rank_of_a_pipeline_has_the_layers_that_it_holds() -> None:
    last = Layer()
    assert decoder_layers(nn.Sequential(nn.ModuleList([nn.Identity(), last])), 2) == {1: last}


@pytest.mark.parametrize(
    "attention", [None, nn.ModuleList([nn.Linear(4, 4)])], ids=["none", "a list of two"]
)
def test_a_model_with_other_layers_than_attention_is_refused(attention: nn.Module | None) -> None:
    other = Layer(mixer=nn.Linear(4, 4))
    other.self_attn = attention  # type: ignore[assignment]
    with pytest.raises(
        EngineUnsupported, match="has no attention in layer 1, so ReFT cannot act on all its layers"
    ):
        decoder_layers(nn.Sequential(nn.ModuleList([Layer(), other])), 2)
    with pytest.raises(EngineUnsupported, match=r"no list of 1 decoder layers .* VLLM_PLUGINS=''"):
        decoder_layers(nn.Sequential(nn.ModuleList([other])), 1)


@pytest.mark.parametrize("flag", ["has_inner_state", "is_hybrid"])
def test_a_model_with_recurrent_states_is_refused_even_where_all_layers_have_attention(
    flag: str,
) -> None:
    model = nn.Sequential(nn.ModuleList([Layer()]))
    setattr(model, flag, True)
    with pytest.raises(
        EngineUnsupported, match="Sequential keeps states other than keys and values"
    ):
        decoder_layers(model, 1)


# Drafts, and hybrids that are refused anyway.
_NOT_SERVED = {
    *("NemotronHMTPAttentionDecoderLayer", "NemotronHMTPMoEDecoderLayer"),
    *("GraniteMoeHybridMambaDecoderLayer", "GraniteMoeHybridAttentionDecoderLayer"),
}


def test_the_layers_that_add_their_residual_are_those_of_this_vllm() -> None:
    """`(hidden, residual)` alone does not tell; so read every layer of vLLM that returns it, and look for the addition."""
    found = {
        name
        for name, forward in _layers_of_vllm()
        if _returns_residual(forward) and _adds_residual(forward)
    }
    assert found - _NOT_SERVED == hook_points._ADDED_ALREADY


def _layers_of_vllm() -> Iterator[tuple[str, ast.FunctionDef]]:
    import vllm

    root = Path(inspect.getfile(vllm)).parent
    for file in [*root.glob("model_executor/models/**/*.py"), *root.glob("models/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Layer", "Block")):
                yield from (
                    (node.name, f)
                    for f in node.body
                    if isinstance(f, ast.FunctionDef) and f.name == "forward"
                )


def _returns_residual(forward: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Return)
        and isinstance(node.value, ast.Tuple)
        and [getattr(element, "id", None) for element in node.value.elts]
        == ["hidden_states", "residual"]
        for node in ast.walk(forward)
    )


def _adds_residual(forward: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add)
        and "residual" in (getattr(node.left, "id", None), getattr(node.right, "id", None))
        for node in ast.walk(forward)
    )
