"""A LoRA that does not fit the base model is refused with every module's name, when it is checked
and when it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from reft_serve.adapters.base_modules import linear_modules
from reft_serve.adapters.lora import CONFIG, TENSORS
from reft_serve.adapters.structure import check_structure, unknown_modules
from reft_serve.cli.app import app
from reft_serve.errors import AdapterInvalid
from tests.support.adapters.damage import write_good
from tests.support.adapters.loras import write_lora
from tests.support.adapters.saves import LLAMA
from tests.support.paths import GOLDEN


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["adapter", *map(str, words)])


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """An adapter of tiny-llama with a LoRA beside it."""
    write_good(tmp_path / "both")
    write_lora(tmp_path / "both")
    return tmp_path / "both"


def rewrite(path: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    tensors = load_file(path / TENSORS)
    save_file(dict(change(*item) for item in tensors.items()), path / TENSORS)


def configure(path: Path, **changes: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))


def test_a_lora_of_another_tree_is_refused_with_every_module(both: Path, tmp_path: Path) -> None:
    assert run("check", both, "--base", LLAMA).exit_code == 0
    rewrite(
        both, lambda name, held: (name.replace("model.layers", "model.language_model.layers"), held)
    )
    modules = [
        f"model.language_model.layers.{n}.{m}"
        for n in (1, 2)
        for m in ("mlp.down_proj", "self_attn.o_proj")
    ]
    checked = run("check", both, "--base", LLAMA)
    assert checked.exit_code == 1
    assert all(module in checked.stdout for module in modules)
    assert checked.stdout.startswith(f"its LoRA is for {modules[0]}, {modules[1]}")
    imported = run("import", both, "--base", LLAMA, "--out", tmp_path / "out")
    assert imported.exit_code == 1
    assert all(module in "".join(imported.output.split()) for module in modules)
    assert not (tmp_path / "out").exists()


def test_a_lora_of_other_shapes_is_refused(both: Path) -> None:
    rewrite(
        both,
        lambda name, held: (name, held.repeat(1, 2) if "1.mlp.down_proj.lora_A" in name else held),
    )
    told = run("check", both, "--base", LLAMA).stdout
    assert (
        "lora_A of 'model.layers.1.mlp.down_proj' has shape (8, 256), and the module of the base "
        "model has 128 in" in told
    )


def test_a_module_that_the_layer_lacks_is_refused(both: Path) -> None:
    rewrite(
        both, lambda name, held: (name.replace("1.self_attn.o_proj", "1.cross_attn.o_proj"), held)
    )
    told = run("check", both, "--base", LLAMA).stdout
    assert (
        told
        == "its LoRA is for model.layers.1.cross_attn.o_proj, which is not a module of the base "
        "model\n"
    )


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"use_dora": True}, "use_dora is true, and DoRA's magnitudes are not served"),
        ({"bias": "lora_only"}, 'bias is "lora_only", and trained biases are not served'),
        (
            {"modules_to_save": ["lm_head"]},
            'modules_to_save is ["lm_head"], and other modules that were trained are',
        ),
        (
            {"rank_pattern": {"o_proj": 4}},
            'rank_pattern is {"o_proj": 4}, and ranks by module are not served',
        ),
        ({"alpha_pattern": {"o_proj": 4}}, "alpha_pattern"),
        (
            {"target_modules": ["o_proj", "down_proj", "up_proj"]},
            "target_modules names 'up_proj', but has no tensor for",
        ),
    ],
)
def test_what_vllm_does_not_serve_of_pefts_is_named(
    both: Path, changes: dict[str, Any], phrase: str
) -> None:
    configure(both, **changes)
    with pytest.raises(AdapterInvalid) as caught:
        check_structure(both, "both")
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    "targets", [r".*\.(o_proj|down_proj)", "all-linear", ["o_proj", "mlp.down_proj"]]
)
def test_targets_as_peft_writes_them_are_taken(both: Path, targets: Any) -> None:
    configure(
        both,
        target_modules=targets,
        bias="none",
        use_dora=False,
        rank_pattern={},
        modules_to_save=None,
    )
    check_structure(both, "both")
    assert run("check", both, "--base", LLAMA).exit_code == 0


def test_the_modules_of_transposed_weights_are_known_too() -> None:
    modules = linear_modules(GOLDEN / "models" / "tiny-gpt2")
    inputs, outputs = modules["transformer.h.0.attn.c_attn"]
    assert outputs == 3 * inputs


def test_very_many_modules_are_named_by_layer() -> None:
    names = [
        f"model.lm.layers.{n}.{m}"
        for n in (*range(60), 70)
        for m in ("mlp.up_proj", "self_attn.q_proj")
    ]
    shown = "model.lm.layers.[0-59,70].mlp.up_proj, model.lm.layers.[0-59,70].self_attn.q_proj, odd"
    assert list(unknown_modules([*names, "odd"])) == [
        f"its LoRA is for {shown}, which are not modules of the base model"
    ]
    few = list(unknown_modules(names[:20]))
    assert sum(name in fault for name in names[:20] for fault in few) >= 20
    assert all(len(fault) < 400 for fault in few)
