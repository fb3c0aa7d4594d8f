"""Resources of this machine, or of this process's container, for jobs. No torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["cores", "memory"]

_CGROUP = Path("/sys/fs/cgroup")


def memory(cgroup: Path = _CGROUP) -> int:
    """Bytes: of the machine, or fewer where a container is allowed fewer (cgroup v2,
    `memory.max`).
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = _words(cgroup / "memory.max")
    return min(whole, int(allowed[0])) if allowed and allowed[0].isdigit() else whole


def cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may keep busy (cgroup v2, `cpu.max`), at least one."""
    whole = len(os.sched_getaffinity(0))
    allowed = _words(cgroup / "cpu.max")
    if len(allowed) != 2 or not allowed[0].isdigit():
        return whole
    return max(1, min(whole, math.ceil(int(allowed[0]) / int(allowed[1]))))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
