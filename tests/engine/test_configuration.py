"""What an engine decides before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reft_serve.engine.vllm_config import limits_of, settings_of
from tests.support.adapters.damage import MODEL, write_good
from tests.support.adapters.loras import write_lora


def server_config(*arguments: str) -> Any:
    """The configuration of a server started with these arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(
        ["--model", str(MODEL), "--max-model-len", "64", "--enable-lora", *arguments]
    )
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    write_good(path / "reft")
    write_lora(path / "lora")
    return path


def test_a_server_with_reft_adapters_alone_leaves_the_lora_machinery_out(folder: Path) -> None:
    from vllm.config import CompilationMode

    config = server_config("--lora-modules", f"a={folder / 'reft'}", f"b={folder / 'reft'}")
    assert settings_of(config).lora == "off"
    if not torch.cuda.is_available():
        assert config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE


@pytest.mark.parametrize("modules", [["reft", "lora"], ["lora"], []])
def test_a_server_that_may_get_a_lora_keeps_it(folder: Path, modules: list[str]) -> None:
    flags = ["--lora-modules", *(f"{name}={folder / name}" for name in modules)] if modules else []
    assert settings_of(server_config(*flags)).lora == "auto"


def test_a_server_that_loads_adapters_at_run_time_keeps_lora(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    assert settings_of(server_config("--lora-modules", f"a={folder / 'reft'}")).lora == "auto"


def test_the_environment_has_the_last_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_LORA", "on")
    monkeypatch.setenv("REFT_MAX_RANK", "5")
    monkeypatch.setenv("REFT_COMPONENTS", '["block"]')
    config = server_config("--lora-modules", f"a={folder / 'reft'}")
    assert settings_of(config).lora == "on"
    assert limits_of(config).max_rank == 5
    assert limits_of(config).components == {"block_output", "block_input"}


def test_settings_change_the_compile_caches_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for components in ('["block"]', '["block", "mlp_output"]'):
        monkeypatch.setenv("REFT_COMPONENTS", components)
        keys.add(server_config().compute_hash())
    assert len(keys) == 2
