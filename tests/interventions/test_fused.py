"""`fused`: equal to `batched` in Triton's interpreter, and a kernel that compiles for the GPUs it
is meant for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reft_serve.interventions import fused
from reft_serve.interventions.batched import Tiles, UnitPool

CASES = ROOT / "tests" / "support" / "interventions" / "interpreted_cases.py"


def test_the_kernel_is_the_batched_edit_in_tritons_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


POINTERS = {
    "rows_KM": "i32",
    "key_K": "i32",
    "scale_KM": "fp32",
    "count": "i32",
    "units_of_CS": "i32",
    "A_UPD": "fp32",
    "b_UP": "fp32",
    "B_UPD": "fp32",
    "act_U2": "i32",
}


def compiled(rank: int, dtype: str, residual: bool, capability: int) -> Any:
    options = fused.launch_options(rank)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = options | {
        "HAS_RESIDUAL": residual,
        "PASSES": 2,
        "TILE": 16,
        "hidden_step": 1,
        "residual_step": 1,
    }
    kernel = fused._edit_tile
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("hidden", "residual") or name in POINTERS:
            signature[name] = f"*{POINTERS.get(name, dtype)}"
        else:
            signature[name] = "i32"
        pointer = signature[name].startswith("*") and name != "units_of_CS"
        if pointer or name in ("width", "hidden_stride", "residual_stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=launch)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_kernel_compiles_to_machine_code(capability: int, dtype: str, residual: bool) -> None:
    kernel = compiled(16, dtype, residual, capability)
    assert kernel.asm["cubin"]
    assert f".target sm_{capability}" in kernel.asm["ptx"]


@pytest.mark.parametrize("rank", [1, 32, 64, 128, 256, 512])
def test_the_kernel_fits_the_shared_memory_of_every_gpu_since_ampere(rank: int) -> None:
    assert compiled(rank, "bf16", True, 80).metadata.shared <= 99 * 1024


def test_products_are_full_float32() -> None:
    """Neither tf32 nor bfloat16 tensor cores: W - R is a difference of near equals."""
    assert "mma" not in compiled(16, "bf16", True, 90).asm["ptx"]


def test_bfloat16_is_rounded_to_nearest() -> None:
    ptx = compiled(16, "bf16", True, 90).asm["ptx"]
    assert "cvt.rn.bf16" in ptx
    assert "cvt.rz.bf16" not in ptx


def test_no_launch_without_tiles() -> None:
    """A launch would fail here: there is no GPU driver to launch with, or no row to edit."""
    empty = Tiles(
        torch.zeros(0, 16, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, 16)
    )
    hidden = torch.randn(3, 8)
    before = hidden.clone()
    fused.edit_tiles(hidden, None, empty, UnitPool(1, 2, 8), torch.zeros(1, 1, dtype=torch.int32))
    assert torch.equal(hidden, before)
