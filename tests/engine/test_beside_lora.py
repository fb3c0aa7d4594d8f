"""Without any setting, an engine takes LoRA directories beside ReFT ones; and what vLLM asks of its
adapters holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reft_serve.adapters.digest import digest_of
from reft_serve.adapters.structure import CONFIG, TENSORS
from reft_serve.errors import AdapterInvalid, AdapterUnsupported
from reft_serve.storage.files import write_directory
from tests.support.adapters.damage import write_good
from tests.support.adapters.loras import SCALE, write_lora
from tests.support.engine.engines import running_engine, stats
from tests.support.paths import GOLDEN

PROMPTS = [[1, *range(10 + 3 * i, 30 + 3 * i)] for i in range(6)]


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, Path, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(4):
        write_good(folder / f"reft{seed}", seed)
    tensors = write_lora(folder / "lora")
    with running_engine("tiny-llama", core_process=True, max_loras=3) as running:
        yield running, folder, tensors


def answers(
    engine: Any, adapters: list[Any], strength: float | None = None
) -> list[tuple[list[int], float]]:
    from vllm import SamplingParams

    extra = None if strength is None else {"reft_strength": strength}
    params = SamplingParams(
        temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0, extra_args=extra
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[: len(adapters)]]
    outputs = engine.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob) for o in outputs]


def test_a_lora_and_reft_adapters_share_a_batch(
    engine: tuple[Any, Path, dict[str, torch.Tensor]],
) -> None:
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    running, folder, tensors = engine
    lora, reft = (
        LoRARequest("lora", 1, str(folder / "lora")),
        LoRARequest("reft0", 2, str(folder / "reft0")),
    )
    adapters = [lora, reft, None, lora, reft, None]
    mixed = answers(running, adapters)
    for i, adapter in enumerate(adapters):
        alone = answers(running, [adapter] * 6)[i]
        assert mixed[i][0] == alone[0]
        assert mixed[i][1] == pytest.approx(alone[1], abs=1e-3)
    assert len({tuple(tokens) for tokens, _ in answers(running, [lora, reft, None])}) == 3
    merged = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "models" / "tiny-llama", dtype=torch.float32
    ).eval()
    for name in (n for n in tensors if "lora_A" in n):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        with torch.no_grad():
            merged.get_submodule(module).weight += (
                SCALE * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            )
    with torch.no_grad():
        expected = merged.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert mixed[0][0] == expected[0, len(PROMPTS[0]) :].tolist()


def test_a_request_without_a_lora_is_untouched_where_every_slot_of_loras_is_taken(
    engine: tuple[Any, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, folder, _ = engine
    reft = LoRARequest("reft0", 2, str(folder / "reft0"))
    expected = [answers(running, [None])[0], answers(running, [None, reft])[1]]
    for i in range(3):
        write_lora(tmp_path / f"lora{i}", i)
        lora = LoRARequest(f"lora{i}", 90 + i, str(tmp_path / f"lora{i}"))
        mixed = answers(running, [None, reft, lora])
        assert [tokens for tokens, _ in mixed[:2]] == [tokens for tokens, _ in expected]
        assert [logprob for _, logprob in mixed[:2]] == pytest.approx(
            [logprob for _, logprob in expected], abs=1e-3
        )


def test_adapters_are_listed_pinned_and_removed_by_the_ids_their_owner_gave(
    engine: tuple[Any, Path, Any],
) -> None:
    from vllm.lora.request import LoRARequest

    running, folder, _ = engine
    front = running.llm_engine
    for number in (11, 12):
        assert front.add_lora(
            LoRARequest(f"reft{number - 10}", number, str(folder / f"reft{number - 10}"))
        )
    assert {11, 12} <= front.list_loras()
    assert front.pin_lora(11)
    held = stats(running)["resident"]
    assert front.remove_lora(12)
    assert 12 not in front.list_loras()
    assert stats(running)["resident"] == held - 1
    assert front.remove_lora(11)


def test_more_adapters_than_slots_take_turns(engine: tuple[Any, Path, Any]) -> None:
    from vllm.lora.request import LoRARequest

    running, folder, _ = engine
    adapters = [LoRARequest(f"reft{i}", 20 + i, str(folder / f"reft{i}")) for i in range(4)]
    together = answers(running, adapters)
    alone = [answers(running, [adapter] * 4)[i] for i, adapter in enumerate(adapters)]
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
    assert stats(running)["evictions"] > 0


def test_a_directory_that_changed_is_another_version_once_it_is_loaded_anew(
    engine: tuple[Any, Path, Any], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, folder, _ = engine
    path = tmp_path / "adapter"
    write_good(path, seed=1)
    first = answers(running, [LoRARequest("changing", 31, str(path))])
    path.rename(tmp_path / "old")
    write_good(path, seed=2)
    assert answers(running, [LoRARequest("changing", 31, str(path))]) == first
    reloaded = answers(running, [LoRARequest("changing", 31, str(path), load_inplace=True)])
    fresh = answers(running, [LoRARequest("fresh", 32, str(folder / "reft2"))])
    assert reloaded[0][0] == fresh[0][0] != first[0][0]


def test_a_bad_directory_fails_its_request_alone(
    engine: tuple[Any, Path, Any], tmp_path: Path
) -> None:
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.request import LoRARequest

    running, _, _ = engine
    write_good(tmp_path / "bad")
    (tmp_path / "bad" / "reft_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterInvalid, match="damaged or not a safetensors file"):
        answers(running, [LoRARequest("bad", 41, str(tmp_path / "bad"))])
    with pytest.raises(LoRAAdapterNotFoundError, match="nowhere"):
        answers(running, [LoRARequest("nowhere", 43, str(tmp_path / "nowhere"))])
    with pytest.raises(AdapterUnsupported, match="reft-serve adapter import"):
        answers(
            running, [LoRARequest("raw", 42, str(GOLDEN / "adapters" / "tiny-llama" / "loreft_f1"))]
        )
    assert answers(running, [None])


def colliding(folder: Path) -> list[Path]:
    """Two different adapters whose digests begin alike, so that they have one engine id: found by
    trying provenances.
    """
    seen: list[dict[str, int]] = [{}, {}]
    files = []
    for seed in (0, 1):
        path = folder / f"plain{seed}"
        adapter = write_good(path, seed)
        files.append((adapter.manifest, (path / TENSORS).read_bytes()))
    for number in range(1 << 17):
        for mine, (manifest, tensors) in enumerate(files):
            config = (
                manifest.model_copy(update={"provenance": {"number": number}}).to_json().encode()
            )
            start = digest_of({CONFIG: config, TENSORS: tensors})[:7]
            seen[mine][start] = number
            if start in seen[1 - mine]:
                return [_numbered(folder / f"same{k}", *files[k], seen[k][start]) for k in (0, 1)]
    raise AssertionError("no collision found; try more numbers")


def _numbered(path: Path, manifest: Any, tensors: bytes, number: int) -> Path:
    config = manifest.model_copy(update={"provenance": {"number": number}}).to_json().encode()
    write_directory(path, [(CONFIG, config), (TENSORS, tensors)])
    return path


def test_adapters_whose_engine_ids_collide_answer_as_themselves(
    engine: tuple[Any, Path, Any], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, _, _ = engine
    adapters = [
        LoRARequest(path.name, 50 + i, str(path)) for i, path in enumerate(colliding(tmp_path))
    ]
    alone = [answers(running, [adapter] * 4) for adapter in adapters]
    assert alone[0][0][0] != alone[1][0][0]
    mixed = answers(running, [adapters[0], adapters[1], adapters[0], adapters[1]])
    assert [tokens for tokens, _ in mixed] == [alone[i % 2][i][0] for i in range(4)]


@pytest.fixture(scope="module")
def both(engine: tuple[Any, Path, dict[str, torch.Tensor]]) -> Path:
    """A directory that holds reft0 and the LoRA."""
    _, folder, _ = engine
    write_good(folder / "both", 0)
    write_lora(folder / "both")
    return folder / "both"


def test_a_directory_that_holds_both_applies_both_in_a_mixed_batch(
    engine: tuple[Any, Path, dict[str, torch.Tensor]], both: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, folder, _ = engine
    names = ["both", "lora", "reft0", None, "both", "lora"]
    adapters = [n and LoRARequest(n, 60 + names.index(n), str(folder / n)) for n in names]
    mixed = answers(running, adapters)
    for i, adapter in enumerate(adapters):
        alone = answers(running, [adapter] * 6)[i]
        assert mixed[i][0] == alone[0]
        assert mixed[i][1] == pytest.approx(alone[1], abs=1e-3)
    first = [answers(running, [adapter])[0][1] for adapter in adapters[:4]]
    assert min(abs(a - b) for i, a in enumerate(first) for b in first[:i]) > 1e-2


def test_strength_0_leaves_the_lora_of_a_directory_that_holds_both(
    engine: tuple[Any, Path, dict[str, torch.Tensor]], both: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, folder, _ = engine
    both_adapter, lora = (
        LoRARequest("both", 60, str(both)),
        LoRARequest("lora", 61, str(folder / "lora")),
    )
    expected = answers(running, [lora] * 3)
    assert answers(running, [both_adapter] * 3, strength=0.0) == expected
    assert answers(running, [both_adapter] * 3, strength=0.5) != expected


def test_a_lora_for_modules_that_the_model_lacks_fails_its_request_alone(
    engine: tuple[Any, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, _, _ = engine
    write_good(tmp_path / "odd")
    tensors = write_lora(tmp_path / "odd")
    renamed = {
        name.replace("self_attn.o_proj", "cross_attn.o_proj"): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "odd" / "adapter_model.safetensors")
    odd = LoRARequest("odd", 70, str(tmp_path / "odd"))
    with pytest.raises(Exception, match=r"its LoRA is for model\.layers\.1\.cross_attn\.o_proj"):
        running.llm_engine.add_lora(odd)
    assert _ending(running, odd) == "error"
    assert answers(running, [None])


def test_a_lora_of_other_shapes_fails_its_request_alone(
    engine: tuple[Any, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, _, _ = engine
    write_good(tmp_path / "wide")
    tensors = write_lora(tmp_path / "wide")
    wide = {
        name: tensor.repeat(1, 2) if "lora_A" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(wide, tmp_path / "wide" / "adapter_model.safetensors")
    odd = LoRARequest("wide", 72, str(tmp_path / "wide"))
    with pytest.raises(
        Exception,
        match=r"its LoRA is for 256 inputs of model\.layers\.1\.mlp\.down_proj, which has 128",
    ):
        running.llm_engine.add_lora(odd)
    assert _ending(running, odd) == "error"
    assert answers(running, [None])


def test_held_halves_outlive_their_files(
    engine: tuple[Any, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    running, folder, _ = engine
    loras = [tmp_path / f"lora{i}" for i in range(4)]
    for i, path in enumerate(loras):
        write_lora(path, i)
    write_good(tmp_path / "gone", 7)
    write_lora(tmp_path / "gone", 7)
    gone = LoRARequest("gone", 71, str(tmp_path / "gone"))
    fresh = answers(running, [gone])
    shutil.rmtree(tmp_path / "gone")
    for i in range(3):  # out of its slot
        answers(running, [LoRARequest(f"reft{i}", 20 + i, str(folder / f"reft{i}"))])
    for i, path in enumerate(loras):  # out of vLLM's cache of LoRAs
        answers(running, [LoRARequest(path.name, 80 + i, str(path))])
    assert answers(running, [gone]) == fresh


def _ending(engine: Any, adapter: Any) -> str:
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": PROMPTS[0]}
    (output,) = engine.generate(
        [prompt], SamplingParams(max_tokens=2), lora_request=adapter, use_tqdm=False
    )
    return str(output.outputs[0].finish_reason)
