"""Every measured figure of the pages is in a file of benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.paths import ROOT

Result = dict[str, Any]


def ratio(workload: str, arm: str) -> Callable[[Result], float]:
    """An arm's speed relative to the others of its run."""
    return lambda result: float(
        next(
            row["ratio"]
            for row in result["rows"]
            if (row["workload"], row["arm"]) == (workload, arm)
        )
    )


def row(arm: str, field: str) -> Callable[[Result], float]:
    """A field of an arm."""
    return lambda result: float(next(each[field] for each in result["rows"] if each["arm"] == arm))


def _line(result: Result, arm: str) -> str:
    return " | ".join(
        f"{ratio(workload, arm)(result):.2f}" for workload in ("prefill", "decode", "mixed")
    )


# page, result, and what the page must say of it
FIGURES: list[tuple[str, str, Callable[[Result], str]]] = [
    (
        "README.md", "serving",
        lambda r: f"ran at {ratio('prefill', 'reft:32')(r):.2f} of the base's speed in prefill and at "
        f"{ratio('decode', 'reft:32')(r):.2f} in decoding, 32 LoRAs at {ratio('prefill', 'lora:32')(r):.2f} and "
        f"{ratio('decode', 'lora:32')(r):.2f}",
    ),
    ("docs/comparison.md", "serving", lambda r: f"| plugin loaded, unused | {_line(r, 'idle')} |"),
    ("docs/comparison.md", "serving", lambda r: f"| 32 ReFT adapters | {_line(r, 'reft:32')} |"),
    ("docs/comparison.md", "serving", lambda r: f"| 32 LoRAs (one round) | {_line(r, 'lora:32')} |"),
    (
        "docs/comparison.md", "serving-lora64",
        lambda r: f"{ratio('decode', 'reft:32')(r):.2f} of the base with ReFT and at {ratio('decode', 'lora:32')(r):.2f}",
    ),
    (
        "docs/comparison.md", "serving-distinct",
        lambda r: f"ran at {min(ratio(w, 'reft:256')(r) for w in ('decode', 'prefill')):.2f} of the speed of one",
    ),
    (
        "docs/comparison.md", "resident",
        lambda r: f"take {r['pool_ratio']:.2f} times their tensors' bytes, {r['tensor_bytes'] / 1e6:.0f} MB",
    ),
    ("docs/comparison.md", "resident", lambda r: f"{r['load_ms_median']:.1f} ms (median; {r['load_ms_max']:.1f} ms at most)"),
    ("docs/comparison.md", "churn", lambda r: f"{r['loads']:,} loads of {r['arguments']['adapters']:,} adapters"),
    ("docs/comparison.md", "churn", lambda r: f"{r['requests']:,} requests, of which {_none(r['lost'])} was lost"),
    ("docs/comparison.md", "churn", lambda r: f"and {_none(r['wrong'])} changed its answer"),
    ("docs/comparison.md", "prefix", lambda r: f"({100 * row('reft', 'cached_share')(r):.0f} % of the prompt tokens"),
    ("docs/comparison.md", "prefix", lambda r: f"1/{row('reft', 'faster_than_lora')(r):.0f} of the LoRAs' time"),
    (
        "docs/comparison.md", "prefix",
        lambda r: f"{row('reft', 'faster_than_lora')(r) / row('reft unshared', 'faster_than_lora')(r):.0f} of the 88 by the "
        f"cache and {row('reft unshared', 'faster_than_lora')(r):.0f} by LoRA's cost",
    ),
    (
        "docs/classification.md", "classify",
        lambda r: f"one adapter ran at {r['ratios']['one adapter']:.2f} of the base's speed, and 16 adapters mixed in each batch "
        f"at {r['ratios']['16 adapters']:.2f}",
    ),
    (
        "docs/concepts.md", "prefix-property",
        lambda r: f"{r['requests']:,} random requests of {r['adapters']:,} adapters, of whose prompt tokens "
        f"{100 * r['cached_tokens'] / r['prompt_tokens']:.0f} %",
    ),
    (
        "docs/load.md", "gateway",
        lambda r: f"adds {r['added_ms']['p50']:.1f} ms to the first byte (median; {r['added_ms']['p99']:.1f} ms at the 99th",
    ),
    (
        "docs/load.md", "gateway",
        lambda r: f"at {r['streaming_ratio']:.2f} of the engine's own rate, and takes {r['gateway_cpu_us_per_token']:.0f} µs "
        f"of CPU time per streamed token and {r['gateway_cpu_ms_per_request']:.1f} ms per request",
    ),
    (
        "docs/load.md", "gateway-memory",
        lambda r: f"has {r['resident_mb'][0]:.0f} MB before the first request and {r['resident_mb'][3]:.0f} MB after "
        f"{3 * r['arguments']['requests']:,}, when",
    ),
    (
        "docs/load.md", "gateway-memory",
        lambda r: f"the {(r['arguments']['rounds'] - 3) * r['arguments']['requests']:,} requests after that, streamed and "
        f"whole, with Prometheus reading along, add {r['resident_mb'][-1] / r['resident_mb'][3] - 1:.1%}".replace("%", " %"),
    ),
    (
        "docs/load.md", "up",
        lambda r: f"took {max(each['first answer'] for each in r['seconds']['first']):.0f} s on two cores without a GPU, and "
        f"{max(each['first answer'] for each in r['seconds']['later']):.0f} s when",
    ),
    (
        "docs/load.md", "chaos",
        lambda r: f"{r['killed']['gateway']['kills']} times each, in the middle of {r['arguments']['streams']} streams every "
        f"time. {_faultless(r)}",
    ),
    (
        "docs/load.md", "chaos",
        lambda r: f"after {max(each['recovery_seconds']['largest'] for each in r['killed'].values()):.1f} s at most",
    ),
]  # fmt: skip


def _faultless(result: Result) -> str:
    found = [each["faults"] for each in result["killed"].values()]
    return (
        "No stream had a wrong piece, no record was lost" if not any(found) else f"faults: {found}"
    )


def _none(count: int) -> str:
    return "none" if count == 0 else str(count)


@pytest.mark.parametrize(("page", "result", "said"), FIGURES)
def test_a_page_says_what_was_measured(
    page: str, result: str, said: Callable[[Result], str]
) -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())
    text = " ".join((ROOT / page).read_text().split())
    assert said(measured) in text
