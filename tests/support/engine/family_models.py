"""Tiny random models of many families, adapters for them, and a reference in plain Hugging Face with forward hooks.

The reference shares nothing with the product but the adapter's tensors: it writes out the published equations and the
position rules by hand, so that a mistake in one of them does not hide in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import publish
from reft_serve.adapters.manifest import InterventionSpec, Manifest
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import Component, Kind

VOCABULARY, WIDTH, LAYERS, RANK = 160, 128, 3, 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
_GROUPED = {**_COMMON, **_SIZES, "num_key_value_heads": 1, "head_dim": 64}
_WINDOWED = {"sliding_window": 24, "query_pre_attn_scalar": 64}
_EXPERTS = {
    "moe_intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    options: of its transformers configuration. layers: where its decoder layers are. attention, mlp: the modules of a
    layer whose outputs are attention_output and mlp_output; None where the engine must refuse that component. tolerance:
    largest difference of a log-probability.
    """

    config: str
    options: Mapping[str, Any]
    layers: str = "model.layers"
    attention: str | None = "self_attn"
    mlp: str | None = "mlp"
    tolerance: float = 1e-3

    def build(self, folder: Path) -> nn.Module:
        """A random model with every tensor away from its default, saved to `folder`; eval mode, float32."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms, and biases too: at their defaults of 1 and 0 many mistakes would not show.
                scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(
                    scale * torch.randn_like(parameter) + (parameter if parameter.dim() == 1 else 0)
                )
        model.save_pretrained(folder)
        return model  # type: ignore[no-any-return]

    @property
    def components(self) -> list[Component]:
        """Those that are served."""
        parts: list[Component] = ["block_output", "block_input"]
        parts += ["mlp_output"] if self.mlp else []
        return parts + (["attention_output"] if self.attention else [])


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", _GROUPED),
    "qwen2": Family("Qwen2Config", {k: v for k, v in _GROUPED.items() if k != "head_dim"}),
    "qwen3": Family("Qwen3Config", _GROUPED),
    "mistral": Family("MistralConfig", _GROUPED | {"sliding_window": 24}),
    "gemma": Family("GemmaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "gemma2": Family("Gemma2Config", _GROUPED | _WINDOWED | {"tie_word_embeddings": True}),
    "gemma3": Family(
        "Gemma3TextConfig",
        _GROUPED
        | _WINDOWED
        | {
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": Family("Phi3Config", {**_COMMON, **_SIZES, "num_key_value_heads": 1}),
    "gpt2": Family(
        "GPT2Config",
        _COMMON
        | {
            "tie_word_embeddings": True,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_positions": 256,
        },
        layers="transformer.h",
        attention="attn",
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        {**_COMMON, **_SIZES, "rotary_pct": 0.5},
        layers="gpt_neox.layers",
        attention="attention",
    ),
    "gpt_neox_sequential": Family(
        "GPTNeoXConfig",
        {**_COMMON, **_SIZES, "rotary_pct": 0.5, "use_parallel_residual": False},
        layers="gpt_neox.layers",
        attention="attention",
    ),
    "opt": Family(
        "OPTConfig",
        {
            **_COMMON,
            **_SIZES,
            "ffn_dim": 192,
            "word_embed_proj_dim": WIDTH,
            "tie_word_embeddings": True,
        },
        layers="model.decoder.layers",
        mlp="fc2",
    ),
    "opt_350m": Family(
        "OPTConfig",
        {
            **_COMMON,
            **_SIZES,
            "ffn_dim": 192,
            "word_embed_proj_dim": 64,
            "do_layer_norm_before": False,
            "tie_word_embeddings": True,
        },
        layers="model.decoder.layers",
        mlp="fc2",
    ),
    "mixtral": Family(
        "MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {
            **_COMMON,
            **_SIZES,
            "num_key_value_heads": 1,
            **_EXPERTS,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", _GROUPED | _EXPERTS),
    "phi": Family("PhiConfig", {**_COMMON, **_SIZES, "partial_rotary_factor": 0.5}),
    "olmo": Family("OlmoConfig", {**_COMMON, **_SIZES}),
    "olmo2": Family("Olmo2Config", {**_COMMON, **_SIZES}),
    "stablelm": Family(
        "StableLmConfig", {**_COMMON, **_SIZES, "num_key_value_heads": 1, "use_qkv_bias": True}
    ),
    "cohere": Family(
        "CohereConfig",
        {
            **_COMMON,
            **_SIZES,
            "num_key_value_heads": 1,
            "logit_scale": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "falcon": Family(
        "FalconConfig",
        {**_COMMON, **_SIZES, "parallel_attn": True, "bias": False, "tie_word_embeddings": True},
        layers="transformer.h",
        attention="self_attention",
    ),
    "bloom": Family(
        "BloomConfig",
        _COMMON
        | {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2, "tie_word_embeddings": True},
        layers="transformer.h",
        attention=None,
        mlp=None,
        tolerance=5e-3,  # Hugging Face approximates the GELU by tanh and vLLM does not, so the base differs too
    ),
    "gptj": Family(
        "GPTJConfig",
        _COMMON
        | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 256, "rotary_dim": 32},
        layers="transformer.h",
        attention="attn",
    ),
    "granite": Family(
        "GraniteConfig",
        {
            **_COMMON,
            **_SIZES,
            "num_key_value_heads": 1,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "starcoder2": Family("Starcoder2Config", {**_COMMON, **_SIZES, "num_key_value_heads": 1}),
    "glm4": Family("Glm4Config", _GROUPED | {"partial_rotary_factor": 0.5}),
}


@dataclass(frozen=True)
class Edit:
    """One intervention as the reference applies it. half: "both", or the half of an untied rule that it serves."""

    layer: int
    component: Component
    kind: Kind
    tensors: Mapping[str, Tensor]
    activation: str = "linear"
    half: str = "both"

    def __call__(self, h: Tensor) -> Tensor:
        """LoReFT h + R^T(Wh + b - Rh), or DiReFT h + W2^T(W1 h + b): arXiv 2404.03592, section 3.2."""
        act: Callable[[Tensor], Tensor] = {"linear": lambda x: x, "tanh": torch.tanh}[
            self.activation
        ]
        x = h.float()
        source = act(x @ self.tensors["W"].T + self.tensors["b"])
        if self.kind == "loreft":
            x = x + (source - x @ self.tensors["R"].T) @ self.tensors["R"]
        else:
            x = x + source @ self.tensors["W2"]
        return x.to(h.dtype)


@dataclass(frozen=True)
class TinyAdapter:
    name: str
    rule: str
    edits: Sequence[Edit]
    path: Path

    def indices(self, length: int) -> tuple[list[int], list[int]]:
        """The edited prompt tokens, prefix and suffix, by hand for the few rules used here."""
        everything = list(range(length))
        if self.rule == "all":
            return everything, []
        if self.rule == "last":
            return [], everything[-1:]
        count = min(2, length // 2)  # f2+l2
        return everything[:count], everything[length - count :]


def make_adapters(family: Family, base: Path, folder: Path) -> list[TinyAdapter]:
    """One adapter for each served component with a rule of its own, and one untied one that has them all."""
    rules = {
        "block_output": "f2+l2",
        "block_input": "all",
        "mlp_output": "last",
        "attention_output": "f2+l2",
    }
    random = torch.Generator().manual_seed(7)
    made = []
    for component in family.components:
        layers = range(LAYERS) if component != "block_input" else (0, LAYERS - 1)
        edits = [_loreft(random, layer, component) for layer in layers]
        made.append(_publish(component, rules[component], edits, base, folder))
    mixed = [
        _loreft(random, 0, "block_output", half="prefix"),
        _loreft(random, 1, "block_input", half="suffix"),
        *(_direft(random, 1, component, half="prefix") for component in family.components[2:]),
        _direft(random, LAYERS - 1, "block_output", half="suffix"),
    ]
    return [*made, _publish("mixed", "f2+l2", mixed, base, folder)]


def _loreft(random: torch.Generator, layer: int, component: Component, half: str = "both") -> Edit:
    R = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=random))[0].mT.contiguous()
    W = torch.randn(RANK, WIDTH, generator=random) * WIDTH**-0.5
    return Edit(
        layer,
        component,
        "loreft",
        {"R": R, "W": W, "b": torch.randn(RANK, generator=random)},
        half=half,
    )


def _direft(random: torch.Generator, layer: int, component: Component, half: str) -> Edit:
    W, W2 = (torch.randn(RANK, WIDTH, generator=random) * WIDTH**-0.5 for _ in range(2))
    tensors = {"W2": W2, "W": W, "b": torch.randn(RANK, generator=random)}
    return Edit(layer, component, "nodireft", tensors, "tanh", half)


def _publish(name: str, rule: str, edits: Sequence[Edit], base: Path, folder: Path) -> TinyAdapter:
    specs = tuple(
        InterventionSpec(
            layer=edit.layer, component=edit.component, kind=edit.kind, rank=RANK, activation=edit.activation,
            part=edit.half,  # type: ignore[arg-type]
        )
        for edit in edits
    )  # fmt: skip
    positions = PositionRule(rule, tied=all(edit.half == "both" for edit in edits))
    manifest = Manifest(base_model=read_base_model(base), interventions=specs, positions=positions)
    publish(folder / name, manifest, [Weights.of(e.kind, e.tensors, e.activation) for e in edits])
    return TinyAdapter(name, rule, edits, folder / name)


@contextmanager
def hooked(
    model: nn.Module, family: Family, adapter: TinyAdapter | None, prompt_len: int
) -> Iterator[None]:
    """The Hugging Face model with the adapter's edits at its modules, for one sequence at a time."""
    handles = []
    for edit in adapter.edits if adapter is not None else ():
        assert adapter is not None
        prefix, suffix = adapter.indices(prompt_len)
        at = {"both": prefix + suffix, "prefix": prefix, "suffix": suffix}[edit.half]
        layer = model.get_submodule(f"{family.layers}.{edit.layer}")
        paths = {"mlp_output": family.mlp, "attention_output": family.attention}
        module = layer.get_submodule(paths.get(edit.component) or "")
        if edit.component == "block_input":
            handles.append(
                module.register_forward_pre_hook(_input_hook(edit, at), with_kwargs=True)
            )
        else:
            handles.append(module.register_forward_hook(_output_hook(edit, at)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edited(edit: Edit, at: list[int], h: Tensor) -> Tensor:
    flat = h.reshape(-1, h.shape[-1]).clone()
    flat[at] = edit(flat[at])
    return flat.view_as(h)


def _input_hook(edit: Edit, at: list[int]) -> Callable[..., Any]:
    def change(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_edited(edit, at, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _edited(edit, at, kwargs["hidden_states"])}

    return change


def _output_hook(edit: Edit, at: list[int]) -> Callable[..., Any]:
    def change(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _edited(edit, at, output)
        return (_edited(edit, at, output[0]), *output[1:])

    return change


@torch.no_grad()
def reference_logprobs(
    model: nn.Module,
    family: Family,
    adapter: TinyAdapter | None,
    prompt: list[int],
    answer: list[int],
) -> Tensor:
    """Log-probabilities (tokens, vocabulary) after each token of prompt + answer but the last.

    The model is causal and only prompt tokens are edited, so one pass over all of it gives what prefill and decoding give.
    """
    tokens = torch.tensor([prompt + answer[:-1]])
    with hooked(model, family, adapter, len(prompt)):
        logits: Tensor = model(tokens, use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


# What an edit must change at least, so that one that is left out, or made elsewhere, is seen.
EFFECT = 0.05
PROMPTS = [[1, *range(10, 52)], [1, *range(60, 63)], [1, *range(20, 33), *range(10, 20)]]
