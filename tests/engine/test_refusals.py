"""What cannot be served correctly is refused at start, in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reft_serve.engine.configuration import check_modes
from reft_serve.engine.plugin import KNOWN_VERSIONS, check_version
from reft_serve.engine.worker.hook_points import decoder_layers, install_hooks, places_of
from reft_serve.errors import EngineUnsupported
from tests.support.engine.engines import engine_config


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "0.32.1", "1.0"])
def test_an_unknown_vllm_version_is_refused_by_name(version: str) -> None:
    with pytest.raises(
        EngineUnsupported, match=rf"knows vLLM 0\.32\.0 and this is {version}: install"
    ):
        check_version(version)


def test_builds_of_a_known_version_are_known() -> None:
    for version in KNOWN_VERSIONS:
        check_version(version)
        check_version(f"{version}+cpu")


def test_the_sentence_reaches_the_user_of_an_unknown_version() -> None:
    code = (
        "import vllm; vllm.__version__ = '9.9.9'; from vllm.plugins import load_general_plugins "
        "as load; load()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode != 0
    assert "reft-serve knows vLLM" in run.stderr.splitlines()[-1]
    assert "VLLM_PLUGINS" in run.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def config() -> Any:
    return engine_config()


@pytest.mark.parametrize(
    ("part", "name", "value", "sentence"),
    [
        ("parallel_config", "enable_dbo", True, "dual batch overlap: leave out --enable-dbo"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallelism"),
        (
            None,
            "speculative_config",
            SimpleNamespace(method="eagle3"),
            "speculative decoding by eagle3",
        ),
    ],
)
def test_a_mode_that_is_not_correct_is_refused(
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    part: str | None,
    name: str,
    value: Any,
    sentence: str,
) -> None:
    check_modes(config)
    monkeypatch.setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(EngineUnsupported, match=sentence):
        check_modes(config)


@pytest.mark.parametrize("backend", ["xgrammar", "outlines", "lm-format-enforcer"])
def test_a_structured_output_backend_that_cannot_be_bounded_is_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    assert config.structured_outputs_config.backend == "guidance"  # whatever vLLM's default is
    monkeypatch.setattr(config.structured_outputs_config, "backend", backend)
    with pytest.raises(
        EngineUnsupported, match=rf"structured outputs by {backend}.*or choose guidance"
    ):
        check_modes(config)


def connectors() -> list[str]:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    return sorted(KVConnectorFactory._registry)


@pytest.mark.parametrize(
    "connector", [*connectors(), "Unheard", "lmcache.integration.vllm.Connector"]
)
def test_a_connector_that_may_mix_adapters_is_refused_by_name(
    config: Any, monkeypatch: pytest.MonkeyPatch, connector: str
) -> None:
    module, _, name = connector.rpartition(".")
    transfer = SimpleNamespace(kv_connector=name, kv_connector_module_path=module or None)
    monkeypatch.setattr(config, "kv_transfer_config", transfer)
    with pytest.raises(
        EngineUnsupported,
        match=f"the KV connector {re.escape(connector)} .*leave out --kv-transfer-config",
    ):
        check_modes(config)


def test_offloading_is_a_connector_too() -> None:
    with pytest.raises(EngineUnsupported, match=r"the KV connector .*--kv-offloading-size"):
        engine_config(kv_offloading_size=1.0)


def test_a_reft_only_engine_keeps_compilation_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CompilationMode

    if torch.cuda.is_available():
        pytest.skip("the concession is the CPU platform's")
    monkeypatch.setenv("REFT_LORA", "off")
    assert engine_config().compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    monkeypatch.setenv("REFT_LORA", "on")
    assert engine_config().compilation_config.mode == CompilationMode.NONE


class Layer(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.self_attn, self.answer = nn.Linear(4, 4), answer

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.answer(hidden_states)


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(EngineUnsupported, match="has no list of 3 decoder layers"):
        decoder_layers(nn.Sequential(nn.Linear(4, 4)), 3)
    with pytest.raises(EngineUnsupported, match="has no list of 3 decoder layers"):
        decoder_layers(nn.ModuleList([nn.Linear(4, 4)] * 3), 3)


def test_a_layer_that_does_not_return_the_stream_is_refused() -> None:
    model = nn.Sequential(nn.ModuleList([Layer(lambda h: {"hidden": h})]))
    layers = decoder_layers(model, 1)
    install_hooks(layers, places_of(layers, {"block"}), engine=0)
    with pytest.raises(EngineUnsupported, match="neither its hidden states nor"):
        next(iter(layers[0]._forward_hooks.values()))(layers[0], (), {"hidden": 1})
