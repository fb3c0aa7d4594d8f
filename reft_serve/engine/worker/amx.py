"""Permission to use AMX, Intel's matrix instructions, on a CPU.

Linux gives a process the state of AMX on request only (arch_prctl, ARCH_REQ_XCOMP_PERM). A process
that uses AMX without it ends by SIGILL. vLLM's attention on a CPU uses AMX for 16-bit models and
does not ask. oneDNN asks when one of oneDNN's matrix products uses AMX, which those of a short
prompt do not. The first short prompt of an engine then ended its worker (vLLM 0.32.0), so the
plugin asks, once in every process.
"""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["permit_amx"]

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def permit_amx() -> bool:
    """Ask Linux for the state of AMX; False if this machine has none. Threads and child processes
    inherit it.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    result: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return result == 0
