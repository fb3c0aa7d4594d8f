"""vLLM's attention on a CPU may use AMX, whatever the first prompt is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ASKED = """
import ctypes
from reft_serve.engine.worker.workarounds import permit_amx
def permitted():
    allowed = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed)) == 0  # ARCH_GET_XCOMP_PERM
    return bool(allowed.value >> 18 & 1)
before, asked = permitted(), permit_amx()
print(before, asked, permitted())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "amx_tile" not in Path("/proc/cpuinfo").read_text(),
    reason="this processor has no AMX",
)
def test_a_process_gets_the_state_of_amx_before_it_computes() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _ASKED], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == ["False", "True", "True"]
