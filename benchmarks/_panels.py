"""The dashboard's panels, drawn from what its own expressions gave."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks._deployment import Prometheus
from benchmarks._report import RESULTS

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards" / "reft-serve.json"
_COLUMNS, _POINTS, _NAMED = 3, 120, 12
_UNITS = {
    "s": "seconds",
    "reqps": "per second",
    "percentunit": "share",
    "ops": "per second",
    "short": "",
}


def measure(
    prometheus: Prometheus, begin: float, end: float, scrape_seconds: int
) -> list[dict[str, Any]]:
    """Every panel that shows something, with its series as [[minutes, value], ...]."""
    step = max((end - begin) / _POINTS, scrape_seconds)
    interval = f"{int(max(4 * scrape_seconds, step))}s"
    measured = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        series = [
            {
                "name": _legend(target["legendFormat"], each["metric"]),
                "values": _values(each["values"], begin),
            }
            for target in panel.get("targets", [])
            for each in prometheus.series(_filled(target["expr"], interval), begin, end, step)
        ]
        if panel["type"] != "row":
            kept = [each for each in series if each["values"]]
            measured.append(
                {
                    "title": panel["title"],
                    "unit": panel["fieldConfig"]["defaults"]["unit"],
                    "series": kept,
                }
            )
    return measured


def _filled(expression: str, interval: str) -> str:
    return expression.replace("$__rate_interval", interval).replace("$tenant", ".*")


def _legend(form: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), form)


def _values(values: list[tuple[float, str]], begin: float) -> list[list[float]]:
    points = [[round((at - begin) / 60, 2), float(f"{float(value):.5g}")] for at, value in values]
    return [point for point in points if math.isfinite(point[1])]


def draw(panels: list[dict[str, Any]], name: str) -> Path:
    """Write `results/<name>.png`: the panels that have something to show, in the dashboard's
    order.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in panels if panel["series"]]
    rows = math.ceil(len(panels) / _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(15, 2.9 * rows), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for each in panel["series"]:
            axes.plot(*zip(*each["values"], strict=True), label=each["name"], linewidth=1.2)
        axes.set_title(panel["title"], fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(_UNITS.get(panel["unit"], panel["unit"]), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel["series"]) <= _NAMED:
            axes.legend(fontsize=6, frameon=False, ncol=2)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("minutes", fontsize=8)
    figure.tight_layout()
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=80)
    return path
