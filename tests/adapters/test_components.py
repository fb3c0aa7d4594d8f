"""pyreft's names of places mean one of ours, or are refused by name."""

from __future__ import annotations

import pytest

from reft_serve.adapters.importers.components import ComponentUnknown, resolve_component
from reft_serve.interventions.vocabulary import COMPONENTS

LLAMA = "LlamaForCausalLM"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_of_ours_keeps_its_layer(component: str) -> None:
    assert resolve_component(component, 3, LLAMA) == (3, component)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers[2].output", (2, "block_output")),
        ("model.layers[2].input", (2, "block_input")),
        ("layers[2].output", (2, "block_output")),
        ("base_model.model.model.layers[15].output", (15, "block_output")),
        ("model.layers[1].mlp.output", (1, "mlp_output")),
        ("model.layers[1].mlp.down_proj.output", (1, "mlp_output")),
        ("model.layers[1].mlp.fc2.output", (1, "mlp_output")),
        ("model.layers[1].block_sparse_moe.output", (1, "mlp_output")),
        ("model.layers[1].self_attn.output", (1, "attention_output")),
        ("model.layers[1].self_attn.o_proj.output", (1, "attention_output")),
        ("model.layers[1].self_attn.dense.output", (1, "attention_output")),
        ("transformer.h[1].output", (1, "block_output")),
        ("transformer.h[1].attn.resid_dropout.output", (1, "attention_output")),
        ("transformer.h[1].attn.c_proj.output", (1, "attention_output")),
        ("transformer.h[1].mlp.c_proj.output", (1, "mlp_output")),
        ("transformer.h[1].mlp.dropout.output", (1, "mlp_output")),
        ("gpt_neox.layers[7].output", (7, "block_output")),
        ("gpt_neox.layers[7].attention.dense.output", (7, "attention_output")),
        ("gpt_neox.layers[7].mlp.dense_4h_to_h.output", (7, "mlp_output")),
        ("model.decoder.layers[4].output", (4, "block_output")),
        ("model.decoder.layers[4].fc2.output", (4, "mlp_output")),
        ("model.decoder.layers[4].self_attn.out_proj.output", (4, "attention_output")),
        ("model.language_model.layers[4].output", (4, "block_output")),
        ("model.embed_tokens.output", (0, "block_input")),
        ("roberta.encoder.layer[5].output", (5, "block_output")),
        ("base_model.model.roberta.encoder.layer[5].input", (5, "block_input")),
        ("encoder.layer[5].attention.output", (5, "attention_output")),
        ("distilbert.transformer.layer[2].output", (2, "block_output")),
    ],
)
def test_a_path_says_its_layer_itself_and_the_field_beside_it_is_ignored(
    path: str, place: tuple[int, str]
) -> None:
    assert resolve_component(path, "nonsense", LLAMA) == place


@pytest.mark.parametrize(
    "component",
    [
        *(
            "mlp_activation",
            "mlp_input",
            "attention_input",
            "query_output",
            "head_query_output",
            "",
            "block",
        ),
        *(
            "model.norm.output",
            "lm_head.output",
            "model.layers[1].mlp.down_proj.input",
            "model.layers[1].mlp.act_fn.output",
        ),
        *(
            "model.layers[1]",
            "model.layers[-1].output",
            "model.layers[x].output",
            "model.layers[1].self_attn.input",
        ),
        *(
            "esm.encoder.layer[1].output",
            "a.model.layers[1].output",
            "model.layers[1].output.0",
            "../../output",
        ),
        *("model.embed_tokens.input", "model.layers[1].self_attn.q_proj.output"),
    ],
)
def test_any_other_place_is_refused_by_name(component: str) -> None:
    with pytest.raises(ComponentUnknown, match="is not an editable component") as refused:
        resolve_component(component, 1, LLAMA)
    assert repr(component) in str(refused.value)


@pytest.mark.parametrize("layer", [-1, None, "1", 1.0, True, [1]])
def test_a_component_without_a_layer_number_is_refused(layer: object) -> None:
    with pytest.raises(ComponentUnknown, match="is not a layer number"):
        resolve_component("block_output", layer, LLAMA)


@pytest.mark.parametrize(
    ("path", "architecture"),
    [
        ("transformer.wte.output", "GPT2LMHeadModel"),
        ("wte.output", "GPT2LMHeadModel"),
        ("model.decoder.embed_tokens.output", "OPTForCausalLM"),
        ("model.embed_tokens.output", "Gemma2ForCausalLM"),
        ("model.embed_tokens.output", "GraniteForCausalLM"),
        ("model.embed_tokens.output", "NobodyKnowsForCausalLM"),
    ],
)
def test_embeddings_that_layer_0_does_not_read_as_they_are_are_refused(
    path: str, architecture: str
) -> None:
    with pytest.raises(ComponentUnknown, match=f"is not the input of layer 0 of a {architecture}"):
        resolve_component(path, 0, architecture)


@pytest.mark.parametrize(
    ("path", "architecture"),
    [
        ("model.embed_tokens.output", "Qwen2ForCausalLM"),
        ("model.embed_tokens.output", "LlamaForSequenceClassification"),
        ("base_model.model.model.embed_tokens.output", "MistralForCausalLM"),
        ("gpt_neox.embed_in.output", "GPTNeoXForCausalLM"),
    ],
)
def test_plain_embeddings_are_the_input_of_layer_0(path: str, architecture: str) -> None:
    assert resolve_component(path, 5, architecture) == (0, "block_input")
