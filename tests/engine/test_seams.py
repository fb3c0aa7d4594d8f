"""The plugin wraps vLLM's functions only if they are the ones that it was written for."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from reft_serve.engine.plugin import apply, resolve, source_of
from reft_serve.engine.seams import ADDITIONS, SEAMS, Seam, fingerprint
from reft_serve.errors import EngineUnsupported

VERSION = "9.9.9"
ROOT = Path(__file__).parents[2]


class Engine:
    """Stands for a class of vLLM's."""

    def step(self) -> str:
        """One step."""
        return "step"

    @staticmethod
    def check(number: int) -> int:
        """A static method."""
        return number


def outer(original: object) -> object:
    """A wrapper, found as `reft_serve.engine.test_wrappers.outer`."""

    def step(self: object) -> str:
        return f"ours({original(self)})"  # type: ignore[operator]

    return step


def outermost(original: object) -> object:
    """Another wrapper."""
    return lambda self: f"outermost({original(self)})"  # type: ignore[operator]


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    names = {
        "vllm_like": types.ModuleType("vllm_like"),
        "reft_serve.engine.test_wrappers": types.ModuleType("w"),
    }
    names["vllm_like"].Engine = Engine  # type: ignore[attr-defined]
    names["reft_serve.engine.test_wrappers"].outer = outer  # type: ignore[attr-defined]
    names["reft_serve.engine.test_wrappers"].outermost = outermost  # type: ignore[attr-defined]
    sys.modules.update(names)
    kept = dict(vars(Engine))
    yield
    for name in ("step", "check"):
        setattr(Engine, name, kept[name])
    for name in names:
        del sys.modules[name]


def seam(name: str = "step", source: str | None = None) -> Seam:
    """A seam of `Engine`, written for its source as it is, or for another."""
    written = inspect.getsource(getattr(Engine, name)) if source is None else source
    return Seam(
        "vllm_like:Engine",
        name,
        "reft_serve.engine.test_wrappers.outer",
        "a test",
        {VERSION: fingerprint(written)},
    )


def test_a_function_that_is_the_known_one_is_wrapped() -> None:
    targets = resolve([seam()], VERSION)
    assert Engine().step() == "step", "resolving changes nothing"
    apply(targets, ())
    assert Engine().step() == "ours(step)"


def test_a_function_with_two_rows_is_wrapped_by_both_the_last_outermost() -> None:
    again = replace(seam(), wrapper="reft_serve.engine.test_wrappers.outermost")
    apply(resolve([seam(), again], VERSION), ())
    assert Engine().step() == "outermost(ours(step))"


def test_a_changed_byte_refuses_with_the_function_s_name_and_wraps_nothing() -> None:
    changed = inspect.getsource(Engine.step).replace("One step.", "One Step.")
    with pytest.raises(
        EngineUnsupported, match=r"vllm_like\.Engine\.step has another source"
    ) as refused:
        resolve([seam("check"), seam("step", changed)], VERSION)
    assert "check" not in str(refused.value)
    assert Engine().step() == "step"


REGISTERED_TWICE = """
import importlib.util, pathlib, sys
name = "vllm.entrypoints.generate.beam_search.online"
file = pathlib.Path(importlib.util.find_spec(name).origin)
changed = pathlib.Path(sys.argv[1]) / file.name
changed.write_text(file.read_text().replace("beam_width = ", "beam_width  = ", 1))
spec = importlib.util.spec_from_file_location(name, changed)
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

from reft_serve.engine.plugin import register
from vllm.v1.engine.async_llm import AsyncLLM

for _ in range(2):
    try:
        register()
    except Exception as exc:
        print(type(exc).__name__, exc, hasattr(AsyncLLM.add_lora, "__wrapped__"))
"""


def test_a_changed_byte_in_vllm_makes_register_refuse_each_time_and_wrap_nothing(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", REGISTERED_TWICE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said = [line for line in run.stdout.splitlines() if line.startswith("EngineUnsupported")]
    name = "vllm.entrypoints.generate.beam_search.online.BeamSearchOnlineMixin.beam_search"
    assert len(said) == 2, "a call after a refused one must not look like success"
    for line in said:
        assert f": {name} has another source than the one that reft-serve was written for. " in line
        assert line.endswith("False")


def test_a_function_that_is_gone_is_named_beside_the_other_faults() -> None:
    gone = replace(seam(), name="stride")
    with pytest.raises(
        EngineUnsupported, match=r"Engine\.stride does not exist; .*Engine\.step has another source"
    ):
        resolve([gone, seam("step", "other")], VERSION)


def test_a_subclass_that_overrides_the_method_is_named() -> None:
    class Other(Engine):
        def step(self) -> str:
            return "other"

    try:
        with pytest.raises(EngineUnsupported, match=r"Engine\.step is overridden by .*Other"):
            resolve([seam()], VERSION)
        known = replace(seam(), overridden_by=(f"{Other.__module__}:{Other.__qualname__}",))
        assert [target.seam for target in resolve([known], VERSION)] == [known]
    finally:
        del Other
        __import__("gc").collect()


def test_a_module_that_imported_the_function_by_name_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hashed() -> int:
        return 1

    home, user = types.ModuleType("vllm_home"), types.ModuleType("vllm_user")
    home.hashed = user.hashed = hashed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_home", home)
    monkeypatch.setitem(sys.modules, "vllm_user", user)
    one = Seam(
        "vllm_home",
        "hashed",
        "reft_serve.engine.test_wrappers.outer",
        "",
        {VERSION: fingerprint(inspect.getsource(hashed))},
    )
    with pytest.raises(EngineUnsupported, match=r"vllm_home\.hashed is also held by vllm_user"):
        resolve([one], VERSION)
    (target,) = resolve([replace(one, holders=("vllm_user",))], VERSION)
    assert target.owners == (home, user)


def test_every_row_says_why_and_has_its_wrapper() -> None:
    sources: dict[tuple[str, str], Mapping[str, str]] = {}
    for row in SEAMS:
        assert row.why
        assert row.sources
        assert row.wrapper.startswith("reft_serve.engine.")
        wrapper = row.wrapper.rpartition(".")[2]
        named = (
            wrapper.endswith("_init")
            if row.name == "__init__"
            else f"wrap_{row.name.lstrip('_')}".startswith(wrapper)
        )
        assert wrapper.startswith("wrap_"), wrapper
        assert named, f"{wrapper} is not found by a search for {row.name}"
        assert row.sources == sources.setdefault((row.owner, row.name), row.sources), (
            "one function, one source"
        )
    assert {addition.name.partition("_")[0] for addition in ADDITIONS} == {"reft"}


def test_the_rows_are_those_of_the_installed_vllm() -> None:
    import vllm

    version = vllm.__version__.partition("+")[0]
    wrong = [str(row) for row in SEAMS if fingerprint(source_of(row)) != row.sources[version]]
    assert wrong == []


def test_the_comparison_of_two_versions_shows_what_changed(tmp_path: Path) -> None:
    installed = Path(find_spec("vllm").submodule_search_locations[0]).parent  # type: ignore[union-attr,index]
    paths = {Path(*row.owner.partition(":")[0].split(".")) for row in SEAMS}
    named = {
        path / "__init__.py" if (installed / path).is_dir() else path.with_suffix(".py")
        for path in paths
    }
    for name in named | {Path("vllm/__init__.py")}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / name, tmp_path / name)
    same = _compare(installed, tmp_path)
    count = len({(row.owner, row.name) for row in SEAMS})
    assert same.stdout == f"{count} of {count} wrapped functions are the same, 0 are not\n", (
        same.stderr
    )
    assert same.returncode == 0

    file = tmp_path / "vllm/v1/core/sched/scheduler.py"
    file.write_text(
        file.read_text().replace("def _free_request(", "def _free_request(  # changed\n        ", 1)
    )
    (tmp_path / "vllm/v1/engine/core.py").unlink()
    other = _compare(installed, tmp_path)
    assert other.returncode == 1
    assert "changed: vllm.v1.core.sched.scheduler.Scheduler._free_request" in other.stdout
    assert "+    def _free_request(  # changed" in other.stdout
    assert "moved or removed: vllm.v1.engine.core.EngineCore.add_request" in other.stdout


def _compare(old: Path, new: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "seams.py"), "--diff", str(old), str(new)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


# Faults of vLLM's own. A test here fails once the fault is mended: then its row of `seams` can go.


def test_vllm_still_gives_a_row_without_a_lora_the_last_slot_s_on_a_cpu() -> None:
    from vllm.lora.ops.torch_ops.lora_ops import bgmv_expand

    expand = inspect.unwrap(bgmv_expand)
    output = torch.zeros(1, 2)
    expand(torch.ones(1, 3), torch.ones(2, 1, 2, 3), output, torch.tensor([-1]), True)
    assert output.tolist() == [[3.0, 3.0]], (
        "upstream leaves such rows alone now: remove workarounds.wrap_bgmv_expand"
    )


def test_vllm_still_rewinds_a_generator_s_offset_which_a_cpu_s_has_not() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    batch = SimpleNamespace(num_reqs=1, generators={0: torch.Generator(device="cpu")})
    runner = SimpleNamespace(
        discard_request_mask=SimpleNamespace(np=np.array([True])), input_batch=batch
    )
    # without it, this goes on to a field that is missing here
    with pytest.raises(RuntimeError, match="offset"):
        inspect.unwrap(GPUModelRunner._bookkeeping_sync)(runner, None, None, None, None, 1)


def test_vllm_still_has_no_buffers_for_a_cpu_s_pipeline_without_a_warm_up() -> None:
    from vllm.config import CompilationMode
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    compilation = SimpleNamespace(mode=CompilationMode.NONE)
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=compilation), intermediate_tensors=None
    )
    CPUModelRunner.warming_up_model(runner)  # it has no `profile_run` here, and needs none
    with pytest.raises(AssertionError):
        inspect.unwrap(GPUModelRunner.sync_and_gather_intermediate_tensors)(runner, 1, None, False)


def test_vllm_still_chooses_triton_for_experts_on_a_cpu_with_lora() -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    config = cast("FusedMoEConfig", SimpleNamespace(is_lora_enabled=True))
    backend, _ = unquantized.select_unquantized_moe_backend(config)
    assert backend is unquantized.UnquantizedMoeBackend.TRITON, (
        "see whether configuration.wrap_create_model is needed"
    )


def test_vllm_still_compiles_the_rank_of_a_token_at_its_first_use() -> None:
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    assert hasattr(batched_count_greater_than, "_torchdynamo_orig_callable"), (
        "upstream does not: remove workarounds.wrap_batched_count_greater_than"
    )
