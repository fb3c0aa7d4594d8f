"""`reft-serve serve`: what it decides and what it refuses, before vLLM starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reft_serve.adapters.directory import publish, read_adapter
from reft_serve.adapters.importers.common import ImportFlags
from reft_serve.adapters.manifest import BaseFacts, InterventionSpec, Manifest
from reft_serve.cli.app import app
from reft_serve.config import ServeSettings, read_settings
from reft_serve.engine.launch.plan import LaunchPlan, ServeRequest, become, plan
from reft_serve.errors import (
    AdapterInvalid,
    AdapterUnsupported,
    BaseModelInvalid,
    ClientError,
    EngineUnsupported,
    ImportFlagMissing,
    PositionsInvalid,
    ReftError,
    ServiceError,
)
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import PositionRule
from tests.support.paths import GOLDEN

MODEL = GOLDEN / "models" / "tiny-llama"
SAVE = GOLDEN / "adapters" / "tiny-llama" / "loreft_f3l3_tied"
UNTIED = GOLDEN / "adapters" / "tiny-llama" / "loreft_f5l5"
READ = (
    "REFT_ENGINE_KEY",
    "REFT_ENGINE_KEY_NEXT",
    "REFT_LORA",
    "REFT_MAX_RANK",
    "REFT_MAX_INTERVENTIONS",
    "REFT_HOME",
)
VLLM_READ = (
    "VLLM_API_KEY",
    "VLLM_PLUGINS",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_CPU_KVCACHE_SPACE",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean environment, with a home of its own for converted adapters."""
    for name in (*READ, *VLLM_READ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Publish an adapter for the tiny Llama (hidden size 64, 4 layers), or for another base."""

    def made(name: str = "ours", rank: int = 4, layers: int = 1, **base: Any) -> Path:
        facts: dict[str, Any] = {
            "name": "tiny",
            "architecture": "LlamaForCausalLM",
            "hidden_size": 64,
            "num_hidden_layers": 4,
        } | base
        specs = tuple(
            InterventionSpec(layer=k % 4, component="block_output", kind="loreft", rank=rank)
            for k in range(layers)
        )
        manifest = Manifest(
            base_model=BaseFacts(**facts), interventions=specs, positions=PositionRule("l1")
        )
        publish(
            tmp_path / name, manifest, [Intervention("loreft", 64, rank).weights() for _ in specs]
        )
        return tmp_path / name

    return made


def planned(
    *adapters: str, passed: tuple[str, ...] = (), positions: tuple[str, ...] = (), **flags: Any
) -> LaunchPlan:
    return plan(ServeRequest(str(MODEL), adapters, positions, ImportFlags(**flags), passed))


def after(chosen: LaunchPlan, flag: str) -> str:
    return chosen.command[chosen.command.index(flag) + 1]


def test_an_adapter_of_ours_is_served_from_where_it_lies(make: Callable[..., Path]) -> None:
    adapter = make()
    chosen = planned(f"a={adapter}")
    assert chosen.command[:5] == (
        sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)),
    )
    assert "--enable-lora" in chosen.command
    assert after(chosen, "--lora-modules") == f"a={adapter}"


def test_without_adapters_vllm_starts_as_it_would_without_us() -> None:
    assert planned(passed=("--port", "9")).command[3:] == ("--model", str(MODEL), "--port", "9")


def test_unknown_flags_reach_vllm_in_their_order(make: Callable[..., Path]) -> None:
    given = ("--dtype", "float32", "-tp", "2", "--max-model-len=64", "--enforce-eager")
    assert planned(f"a={make()}", passed=given).command[-len(given) :] == given


@pytest.mark.parametrize(("count", "slots"), [(1, "8"), (11, "11")])
def test_there_are_slots_for_every_adapter_and_at_least_eight(
    make: Callable[..., Path], count: int, slots: str
) -> None:
    adapter = make()
    assert after(planned(*(f"a{k}={adapter}" for k in range(count))), "--max-loras") == slots


@pytest.mark.parametrize("given", [("--max-loras", "3"), ("--max-loras=3",), ("--max_loras", "3")])
def test_slots_that_the_user_gives_are_left_alone(
    make: Callable[..., Path], given: tuple[str, ...]
) -> None:
    command = planned(f"a={make()}", passed=given).command
    assert [part for part in command if "max" in part] == [given[0]]


def test_users_own_lora_modules_join_ours_in_one_list(make: Callable[..., Path]) -> None:
    adapter = make()
    chosen = planned(
        f"a={adapter}", passed=("--port", "9", "--lora-modules", "x=/x", "y=/y", "-tp", "2")
    )
    assert chosen.command.count("--lora-modules") == 1
    start = chosen.command.index("--lora-modules")
    assert chosen.command[start + 1 :] == (
        f"a={adapter}",
        "x=/x",
        "y=/y",
        "--port",
        "9",
        "-tp",
        "2",
    )


def test_a_path_with_a_comma_reaches_vllm_as_json(make: Callable[..., Path]) -> None:
    adapter = make("a,b")
    assert json.loads(after(planned(f"a={adapter}"), "--lora-modules")) == {
        "name": "a",
        "path": str(adapter),
    }


def test_a_larger_rank_than_vllms_raises_ours(make: Callable[..., Path]) -> None:
    assert planned(f"a={make(rank=24)}").environment["REFT_MAX_RANK"] == "24"
    assert "REFT_MAX_RANK" not in planned(f"a={make('small', rank=16)}").environment
    assert (
        "REFT_MAX_RANK"
        not in planned(f"a={make('other', rank=24)}", passed=("--max-lora-rank", "32")).environment
    )


def test_more_interventions_than_two_a_layer_raise_the_limit(make: Callable[..., Path]) -> None:
    assert planned(f"a={make(layers=9)}").environment["REFT_MAX_INTERVENTIONS"] == "9"
    assert "REFT_MAX_INTERVENTIONS" not in planned(f"a={make('eight', layers=8)}").environment


def test_a_rank_above_the_one_that_the_user_set_is_refused(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFT_MAX_RANK", "8")
    with pytest.raises(AdapterInvalid, match="raise REFT_MAX_RANK"):
        planned(f"a={make(rank=24)}")


def test_an_engine_of_reft_adapters_alone_has_lora_off(make: Callable[..., Path]) -> None:
    assert planned(f"a={make()}").environment["REFT_LORA"] == "off"


def test_lora_is_left_to_the_engine_where_more_may_come(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make()
    assert "REFT_LORA" not in planned(f"a={adapter}", passed=("--lora-modules", "x=/x")).environment
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    assert "REFT_LORA" not in planned(f"a={adapter}").environment


def test_a_choice_in_the_environment_stands(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFT_LORA", "on")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    assert planned(f"a={make()}").environment == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_machine_without_a_gpu_gets_small_caches() -> None:
    assert planned().environment == {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    }


def test_a_pyreft_save_is_converted_once(home: Path) -> None:
    first = planned(f"a={SAVE}", positions=("f3+l3",))
    (made,) = (home / "adapters").iterdir()
    stamp = made.stat().st_mtime_ns
    assert after(first, "--lora-modules") == f"a={made}"
    assert read_adapter(made).manifest.positions == PositionRule("f3+l3")
    assert planned(f"a={SAVE}", positions=("f3+l3",)).command == first.command
    assert made.stat().st_mtime_ns == stamp


def test_other_flags_or_other_files_are_another_adapter(home: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(SAVE, tmp_path / "copy")
    first = planned(f"a={copy}", positions=("f3+l3",))
    assert planned(f"a={copy}", positions=("f3",)).command != first.command
    file = next(copy.glob("intkey_*"))
    shutil.copyfile(next((GOLDEN / "adapters/tiny-llama/loreft_l1").glob("intkey_*")), file)
    planned(f"a={copy}", positions=("f3+l3",))
    assert len(list((home / "adapters").iterdir())) == 3


def test_positions_can_be_given_for_all_saves_and_for_one(home: Path) -> None:
    chosen = planned(f"a={SAVE}", f"b={SAVE}", positions=("b=l2", "f3+l3"))
    start = chosen.command.index("--lora-modules")
    paths = dict(part.split("=", 1) for part in chosen.command[start + 1 : start + 3])
    rules = {name: read_adapter(Path(path)).manifest.positions.spec for name, path in paths.items()}
    assert rules == {"a": "f3+l3", "b": "l2"}


def test_the_other_import_flags_reach_the_importer() -> None:
    chosen = planned(f"a={UNTIED}", positions=("f5+l5",), untied=True, last_offset=1)
    rule = read_adapter(Path(after(chosen, "--lora-modules").partition("=")[2])).manifest.positions
    assert rule == PositionRule("f5+l5", tied=False, last_offset=1)


def test_a_save_without_positions_is_refused_with_the_flag_to_give(home: Path) -> None:
    with pytest.raises(ImportFlagMissing, match=r"--adapter a .*give --positions"):
        planned(f"a={SAVE}")
    assert not home.exists()


def test_a_save_for_a_model_of_the_hub_must_be_converted_first() -> None:
    with pytest.raises(BaseModelInvalid, match="reft-serve adapter import"):
        plan(ServeRequest("someone/model", (f"a={SAVE}",), ("l1",)))


def test_an_adapter_of_ours_needs_no_local_model(make: Callable[..., Path]) -> None:
    assert plan(ServeRequest("someone/model", (f"a={make()}",))).command[4] == "someone/model"


def test_an_adapter_of_another_base_is_refused(make: Callable[..., Path]) -> None:
    with pytest.raises(AdapterInvalid, match="trained on 9 layers and the base model has 4"):
        planned(f"a={make(num_hidden_layers=9)}")


@pytest.mark.parametrize(
    ("adapters", "positions", "error", "says"),
    [
        (("somewhere",), (), ClientError, "is not NAME=DIR"),
        (("=somewhere",), (), ClientError, "is not NAME=DIR"),
        (("a={save}", "a={save}"), ("l1",), ClientError, "already in use"),
        (("a=/nowhere",), (), ClientError, "no directory at /nowhere"),
        (("a={save}",), ("seven",), PositionsInvalid, "--adapter a .*not understood"),
        (("a={save}",), ("b=l1",), ClientError, "'b' is not among the adapters"),
        (("a={model}",), ("l1",), AdapterUnsupported, "unknown format"),
        ((), ("l1",), ClientError, "there is none"),
    ],
)
def test_a_fault_is_told_before_vllm_starts(
    adapters: tuple[str, ...], positions: tuple[str, ...], error: type[ReftError], says: str
) -> None:
    named = (given.format(save=SAVE, model=MODEL) for given in adapters)
    with pytest.raises(error, match=says):
        planned(*named, positions=positions)


def test_an_adapter_cannot_have_the_base_models_name(make: Callable[..., Path]) -> None:
    adapter = make()
    with pytest.raises(ClientError, match="--adapter base: the name is already in use"):
        planned(f"base={adapter}", passed=("--served-model-name", "base"))
    with pytest.raises(ClientError, match="--adapter m: the name is already in use"):
        plan(ServeRequest("m", (f"m={adapter}",)))


def test_positions_for_an_adapter_of_ours_are_refused(make: Callable[..., Path]) -> None:
    with pytest.raises(ClientError, match="'a' records its positions itself"):
        planned(f"a={make()}", f"b={SAVE}", positions=("f3", "a=l1"))


def test_a_damaged_adapter_is_refused(make: Callable[..., Path]) -> None:
    adapter = make()
    tensors = adapter / "reft_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(AdapterInvalid, match="damaged"):
        planned(f"a={adapter}")


def test_a_lora_is_pointed_to_its_own_flag(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(AdapterUnsupported, match="--lora-modules a="):
        planned(f"a={tmp_path}")


def test_plugins_restricted_to_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EngineUnsupported, match="add reft_serve"):
        planned()
    monkeypatch.setenv("VLLM_PLUGINS", "other,reft_serve")
    planned()


@pytest.mark.parametrize(
    ("name", "value", "phrase"),
    [("REFT_MAX_RANK", "many", "REFT_MAX_RANK: "), ("REFT_COMPONENTS", "block", "as JSON")],
)
def test_a_setting_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, phrase: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ServiceError, match=phrase):
        planned()


def test_a_model_that_is_a_flag_is_refused() -> None:
    with pytest.raises(ClientError, match="the model comes first"):
        plan(ServeRequest("--port"))


def test_a_dry_run_prints_a_line_that_a_shell_understands(make: Callable[..., Path]) -> None:
    adapter = make("with space")
    answer = CliRunner().invoke(
        app, ["serve", str(MODEL), "--port", "9", "--adapter", f"a={adapter}", "--dry-run"]
    )
    assert answer.exit_code == 0
    line = answer.stdout.strip()
    echoed = subprocess.run(
        ["bash", "-c", line.replace(sys.executable, "printf '%s\\n'")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert echoed.stdout.splitlines() == list(
        planned(f"a={adapter}", passed=("--port", "9")).command[1:]
    )


def test_a_fault_on_the_command_line_is_one_sentence_and_exit_code_1() -> None:
    answer = CliRunner().invoke(app, ["serve", str(MODEL), "--adapter", "a=/nowhere", "--dry-run"])
    assert answer.exit_code == 1
    assert answer.stderr == "error: --adapter a: there is no directory at /nowhere\n"


def test_the_server_takes_the_place_of_the_process_with_its_environment(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import os, sys; print(os.environ['REFT_LORA'], os.environ['KEPT'], os.getpid(), "
        "file=open(sys.argv[1], 'w'))"
    )
    child = os.fork()
    if child == 0:
        os.environ["KEPT"] = "kept"
        become(LaunchPlan((sys.executable, "-c", script, str(out)), {"REFT_LORA": "off"}, ()))
    assert os.waitpid(child, 0)[1] == 0
    assert out.read_text() == f"off kept {child}\n"


def test_deciding_does_not_import_vllm() -> None:
    code = "import sys, reft_serve.engine.launch.plan; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("passed", "variable"),
    [
        (["--api-key", "s-1", "s-2"], "REFT_ENGINE_KEY"),
        (["--api_key=s-1"], "REFT_ENGINE_KEY"),
        (["--hf-token", "s-1"], "HF_TOKEN"),
    ],
)
def test_a_secret_among_the_arguments_is_refused(
    passed: list[str], variable: str, tmp_path: Path
) -> None:
    for verb in (["serve", str(MODEL)], ["up", "--data", str(tmp_path)]):
        answer = CliRunner().invoke(app, [*verb, *passed])
        assert answer.exit_code == 1
        assert variable in answer.stderr
        assert "s-1" not in answer.stderr


def test_keys_are_read_from_the_environment_and_are_in_no_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REFT_ENGINE_KEY", "s-1")
    monkeypatch.setenv("REFT_ENGINE_KEY_NEXT", "s-2")
    monkeypatch.setenv("VLLM_API_KEY", "s-1")
    chosen = planned()
    assert "reft_serve.engine.launch.server" in chosen.command
    assert "s-1" not in repr(chosen)
    code = "from vllm.entrypoints.launchers.api_server import entry; import sys\n"
    code += (
        "entry.main = lambda: print(sys.argv[1:])\nfrom reft_serve.engine.launch import server; "
        "server.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--port", "9"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(["--port", "9", "--api-key", "s-1", "s-2"])
    monkeypatch.setenv("REFT_ENGINE_KEY_NEXT", "")
    assert read_settings(ServeSettings).engine_keys == ("s-1",)
