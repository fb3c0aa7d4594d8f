"""The training step on a GPU: the measurement says why it cannot run here, and measures where it
can.
"""

from __future__ import annotations

import argparse

import pytest
import torch

from tests.support.training import gpu_step

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
)
TINY = argparse.Namespace(shape="tiny", batch=2, length=32, steps=2, pyreft=None, pyreft_batch=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would not refuse")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_step.cuda(argparse.ArgumentParser("train_gpu"))
    assert caught.value.code == 2
    assert "train_gpu needs an NVIDIA GPU, and torch sees none here" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_checkpointed_bfloat16_run_is_measured(device: str) -> None:
    result = gpu_step.measure(TINY, torch.device(device))
    assert result["parameters"] == 557_696
    assert result["ours"]["packed"]
    assert 0 < result["share_of_ceiling"] < 1
    if device == "cuda":
        assert 0 < result["ours"]["peak_gib"] < 4
