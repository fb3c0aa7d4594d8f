"""Write tables into their pages, from the code and from results: `scripts/docs --write`.

A table lies between `<!-- table: NAME -->` and the next empty line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from reft_serve import config, observability
from reft_serve.engine.front_end import metrics
from reft_serve.gateway.app import create_app
from reft_serve.gateway.schemas import client_fields

DOCS = Path(__file__).parents[1] / "docs"
DEMO = DOCS.parent / "reft_serve" / "demo"
RESULTS = DOCS.parent / "benchmarks" / "results"
BEHAVIOURS = {
    "birds": "speaks of birds (twice or more)", "cats": "speaks of cats", "speech": "goes on with direct speech",
    "rain": "makes it rain", "tears": "makes somebody sad",
}  # fmt: skip
PAGES = (
    "settings.md",
    "metrics.md",
    "quick-start.md",
    "load.md",
    "gateway-api.md",
    "training.md",
    "deployment.md",
)
_SUFFIXES = {"counter": "_total"}
# Settings whose defaults fit almost everywhere: the tables mark them.
ADVANCED = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "REFT_BODY_SECONDS",
    "REFT_CHAT_TEMPLATE_KWARGS",
    "REFT_COMPONENTS",
    "REFT_CONNECTIONS_PER_ADDRESS",
    "REFT_HEADER_SECONDS",
    "REFT_LEASE_SECONDS",
    "REFT_MAX_HEADER_BYTES",
    "REFT_MAX_JSON_VALUES",
    "REFT_MAX_SPOOLED_BYTES",
    "REFT_MAX_STRENGTH",
    "REFT_NAMED_LABELS",
    "REFT_PATIENCE_SECONDS",
    "REFT_POLL_SECONDS",
    "REFT_PROBE_SECONDS",
    "REFT_SWEEP_SECONDS",
    "REFT_UPKEEP_SECONDS",
    "REFT_WEBHOOK_RETRY_SECONDS",
}


def settings(name: str) -> str:
    """A table of one class of settings."""
    model: type[BaseModel] = getattr(config, name)
    prefix = str(model.model_config.get("env_prefix", ""))
    rows = [
        f"| `{variable}` | {default} | {'*Advanced.* ' * (variable in ADVANCED)}{description} |"
        for variable, default, description in _variables(model, prefix)
    ]
    return "\n".join(["| variable | default | |", "|---|---|---|", *rows])


def _variables(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        default = field.get_default()
        if isinstance(default, BaseModel):
            for inner, limit in type(default).model_fields.items():
                description = limit.description or field.description or ""
                yield (
                    f"{prefix}{name}__{inner}".upper(),
                    _shown(getattr(default, inner)),
                    description,
                )
        else:
            yield f"{prefix}{name}".upper(), _default(field), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    if field.default_factory is not None:
        return (
            "the machine's name" if field.default_factory.__name__ == "gethostname" else "see right"
        )
    return _shown(field.get_default())


def _shown(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case frozenset():
            return ", ".join(f"`{each}`" for each in sorted(value))
        case int() if value >= 1 << 20 and value % (1 << 20) == 0:
            return f"`{value}` ({value >> 20:,} MiB)"
        case _:
            return f"`{value}`"


def measured(where: str) -> str:
    """A table of the metrics that a module declares."""
    module: ModuleType = metrics if where == "engine" else observability
    # By name: a loop in the module leaves its last metric under a second variable.
    metrics_by_name = {
        each._name: each
        for each in vars(module).values()
        if isinstance(each, MetricWrapperBase)
        and each._name.startswith("reft_worker_") == (where == "worker")
    }
    rows = [
        f"| `{metric._name}{_SUFFIXES.get(str(metric._type), '')}` | {metric._type} | "
        f"{', '.join(f'`{label}`' for label in metric._labelnames)} | {metric._documentation} |"
        for _, metric in sorted(metrics_by_name.items())
    ]
    return "\n".join(["| metric | type | labels | |", "|---|---|---|---|", *rows])


def demo() -> str:
    """A table of the shipped adapters: what each does, as its manifest and its behaviour say."""
    rows = []
    for name, behaviour in BEHAVIOURS.items():
        manifest = json.loads((DEMO / "adapters" / name / "reft_config.json").read_text())
        positions, provenance = manifest["positions"], manifest["provenance"]
        kinds = ", ".join(sorted({f"`{each['kind']}`" for each in manifest["interventions"]}))
        where = f"`{positions['spec']}`" + ("" if positions.get("tied", True) else ", untied")
        where += (
            ""
            if positions.get("phase", "prompt") == "prompt"
            else f", phase `{positions['phase']}`"
        )
        rates = " | ".join(f"{100 * provenance[key]:.1f} %" for key in ("base_rate", "rate"))
        rows.append(f"| `{name}` | {kinds} | {where} | {behaviour} | {rates} |")
    return "\n".join(
        [
            "| adapter | kind | positions | its behaviour | base | adapter |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def load() -> str:
    """A table of the load benchmark: every rate, and its tenants and prompts at the highest that was served in time."""
    result = json.loads((RESULTS / "load.json").read_text())
    runs = [(f"{run['rate']:g} a second", run["all"]) for run in result["runs"]]
    highest = max(
        (run for run in result["runs"] if run["all"]["within"] >= 0.95), key=lambda run: run["rate"]
    )
    runs += [
        (f"{highest['rate']:g} a second, {name}{' prompts' if group == 'prompts' else ''}", figures)
        for group in ("tenants", "prompts")
        for name, figures in highest[group].items()
    ]
    rows = [
        f"| {name} | {each['requests']} | {each['errors']} | {each['goodput_per_s']:.2f} | {each['within']:.1%} "
        f"| {_quantiles(each, 'first')} | {_quantiles(each, 'each')} |"
        for name, each in runs
    ]
    head = "| load | requests | errors | goodput, 1/s | in time | first token, ms: p50, p95, p99 | each further token, ms |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def _quantiles(figures: dict[str, Any], what: str) -> str:
    return ", ".join(f"{value:.0f}" for value in figures[f"{what}_token_ms"].values())


def soak() -> str:
    """A table of the soak: every process's memory."""
    (run,) = json.loads((RESULTS / "load-soak.json").read_text())["runs"]
    rows = [
        f"| {name} | {each['first_mb']:.0f} MB | {each['last_mb']:.0f} MB | {each['growth_per_hour']:+.2%} |"
        for name, each in run["memory"].items()
    ]
    head = "| process | after the warm-up | at the end | growth per hour, fitted |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def endpoints() -> str:
    """A table of the gateway's routes, as its OpenAPI document has them."""
    document = create_app(config.GatewaySettings()).openapi()
    rows = [
        f"| `{method.upper()} {path}` | {' '.join(operation['description'].split())} |"
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    return "\n".join(["| endpoint | |", "|---|---|", *rows])


def ignored() -> str:
    """A table of the fields that requests may hold and that ask for nothing here."""
    rows = []
    for kind, fields in client_fields.IGNORED.items():
        reasons: dict[str, list[str]] = {}
        for name, reason in fields.items():
            reasons.setdefault(reason, []).append(f"`{name}`")
        rows += [f"| {kind} | {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(["| in | fields | because |", "|---|---|---|", *rows])


def refused() -> str:
    """A table of the fields of OpenAI's client that are refused."""
    rows = [f"| `{name}` | {reason} |" for name, reason in client_fields.REFUSED.items()]
    return "\n".join(["| field | because |", "|---|---|", *rows])


def images() -> str:
    """A table of the images that are not ours: the variable of Compose or the build argument that each is pinned by."""
    folder = DOCS.parent / "docker"
    pins: dict[tuple[str, str], list[str]] = {}
    for variable, image in re.findall(
        r"image: \$\{(\w+):-(\S+)\}", (folder / "compose.yaml").read_text()
    ):
        pins[f"`{variable}`", image] = ["`compose.yaml`"]
    for path in sorted(folder.glob("*.Dockerfile")):
        for argument, image in re.findall(
            r"^ARG (\w+_IMAGE)=(\S+)$", path.read_text(), re.MULTILINE
        ):
            pins.setdefault((f"`--build-arg {argument}`", image), []).append(f"`{path.name}`")
    rows = [f"| `{image}` | {pin} | {', '.join(where)} |" for (pin, image), where in pins.items()]
    return "\n".join(["| image | pinned by | in |", "|---|---|---|", *rows])


def training() -> str:
    """A table of the training benchmark: examples per second and peak memory against pyreft's."""
    result = RESULTS / "train.json"
    if not result.exists():
        return "There is no result of it in this version yet."
    rows = []
    for case in json.loads(result.read_text())["cases"]:
        lengths, rate, peak = case["lengths"], case["examples_per_second"], case["peak_mib"]
        turns = case["ratios"]
        rows.append(
            f"| `{case['model']}` | {case['data']} | {lengths['median']}, {lengths['max']} | {rate['ours']:.2f} "
            f"| {rate['pyreft']:.2f} | **{case['ratio']:.2f}** ({min(turns):.2f} to {max(turns):.2f}) "
            f"| {peak['ours']:,.0f}, {peak['pyreft']:,.0f} |"
        )
    head = "| base | data | tokens: median, longest | ours, 1/s | pyreft, 1/s | ratio (turns) | peak MiB: ours, pyreft |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def methods() -> str:
    """A table of the methods benchmark: what each arm trains, costs and learns."""
    rows = [
        f"| `{row['method']}` | {row['rank'] or ''} | {row['parameters']:,} | {row['size'] / 1e3:.0f} KB "
        f"| {row['seconds']:.0f} s | {row['loss']:.3f} | {row['score']:.1%} ({row['low']:.1%} to {row['high']:.1%}) |"
        for row in json.loads((RESULTS / "methods.json").read_text())["rows"]
    ]
    head = "| method | rank | trained parameters | size | training, processor time | held-out loss | score (95 %) |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def rotation() -> str:
    """A table of the rotation benchmark: milliseconds by way of computing R and its gradient."""
    result = json.loads((RESULTS / "rotation.json").read_text())
    ways = {
        "wy": "compact WY",
        "householder": "`householder_product`",
        "cayley": "Cayley",
        "matrix_exp": "exponential",
    }
    rows = [
        f"| `{row['width']}` | "
        + " | ".join("" if row[way] is None else f"{row[way]:.2f}" for way in ways)
        + " |"
        for row in result["rows"]
    ]
    return "\n".join(
        [f"| width | {' | '.join(ways.values())} |", "|---" * (len(ways) + 1) + "|", *rows]
    )


def filled(page: str) -> str:
    """A page with its tables as the code has them now."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{_table(name)}\n"

    return re.sub(r"<!-- table: (\w+) -->\n(?:.+\n)*", table, page)


def _table(name: str) -> str:
    maker = {
        "demo": demo, "load": load, "soak": soak, "endpoints": endpoints, "images": images,
        "ignored": ignored, "refused": refused,
        "training": training, "methods": methods, "rotation": rotation,
    }.get(name)  # fmt: skip
    if maker is not None:
        return maker()
    return measured(name) if name in ("gateway", "engine", "worker") else settings(name)


def main() -> None:
    """Bring every page up to date."""
    for name in PAGES:
        path = DOCS / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
