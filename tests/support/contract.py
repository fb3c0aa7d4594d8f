"""The public contract as data: everything that a client, a deployment or a saved file relies on,
without its prose.

`python -m tests.support.contract` writes it to `contract.json` after a deliberate change.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

import reft_serve
from reft_serve import config, errors, observability
from reft_serve.adapters.digest import digest_of_directory
from reft_serve.adapters.manifest import Manifest
from reft_serve.cli.app import app as cli
from reft_serve.database.models import Base, Event
from reft_serve.database.webhooks import EVENT_TYPES
from reft_serve.engine.front_end import metrics as engine_metrics
from reft_serve.gateway.app import create_app
from reft_serve.gateway.schemas import errors as answers
from tests.support.paths import ROOT

__all__ = ["PATH", "contract", "without_prose"]

PATH = ROOT / "tests" / "contract" / "contract.json"
_PACKAGE = Path(reft_serve.__file__).parent
_DEMO = _PACKAGE / "demo"
_LEVELS = 4
_PROSE = {"title", "description", "summary", "example", "examples"}
# Objects of an OpenAPI document whose keys are names and not keywords.
_NAMED = {"properties", "paths", "schemas", "parameters", "$defs"}


def contract() -> dict[str, Any]:
    """Today's contract, as JSON holds it."""
    made = {
        "openapi": _openapi(),
        "errors": dict(_errors()),
        "metrics": dict(_metrics()),
        "settings": {name: _settings(getattr(config, name)) for name in _SETTINGS},
        "cli": _command(typer.main.get_command(cli)),
        "directory": _directory(),
        "events": {"webhooks": list(EVENT_TYPES), "job": sorted(Event.__table__.columns.keys())},
        "tables": {
            table.name: sorted(table.columns.keys()) for table in Base.metadata.sorted_tables
        },
        "entry points": _entry_points(),
    }
    copied: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return copied


_SETTINGS = (
    "EngineSettings",
    "ServeSettings",
    "TenantLimits",
    "TrainerSettings",
    "GatewaySettings",
)


def _openapi() -> Any:
    document = create_app(config.GatewaySettings()).openapi()
    return {
        "paths": without_prose(document["paths"], named=True),
        "components": without_prose(document["components"], named=True),
    }


def without_prose(value: Any, *, named: bool = False) -> Any:
    """A part of an OpenAPI document without prose and without links, which no known client
    follows.
    """
    if isinstance(value, list):
        return [without_prose(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {key: each for key, each in value.items() if named or key not in _PROSE | {"links"}}
    return {
        key: without_prose(each, named=not named and key in _NAMED) for key, each in kept.items()
    }


def _errors() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, kind in sorted(vars(errors).items()):
        if isinstance(kind, type) and issubclass(kind, errors.ReftError):
            status = answers.status_of(kind.__new__(kind))
            shape = answers.error_body(status, "", None, kind.code)["error"]
            yield (
                name,
                {"code": kind.code, "status": status, "type": shape["type"], "bases": _bases(kind)},
            )


def _bases(kind: type) -> list[str]:
    return [each.__name__ for each in kind.__mro__[1:] if each.__module__ == kind.__module__]


def _metrics() -> Iterator[tuple[str, dict[str, Any]]]:
    for module in (observability, engine_metrics):
        for metric in vars(module).values():
            if isinstance(metric, MetricWrapperBase):
                yield metric._name, {"type": metric._type, "labels": list(metric._labelnames)}


def _settings(model: type[BaseModel]) -> dict[str, Any]:
    prefix = str(model.model_config.get("env_prefix", ""))
    return {(prefix + name).upper(): _default(field) for name, field in model.model_fields.items()}


def _default(field: Any) -> Any:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return f"{field.default_factory.__name__}()"
    default = field.default
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json")
    return sorted(default) if isinstance(default, frozenset) else default


def _command(command: Any) -> dict[str, Any]:
    if hasattr(command, "commands"):
        return {name: _command(each) for name, each in sorted(command.commands.items())}
    given = [each for each in command.params if each.name != "help"]
    arguments = [_parameter(each) for each in given if each.param_type_name == "argument"]
    options = {
        min(each.opts): _parameter(each) for each in given if each.param_type_name == "option"
    }
    return {"arguments": arguments, "options": options}


def _parameter(each: Any) -> dict[str, Any]:
    annotation = each.type_descriptor.annotation
    return {
        "names": sorted([*each.opts, *each.secondary_opts])
        if each.param_type_name == "option"
        else [],
        "kind": annotation.__name__ if isinstance(annotation, type) else str(annotation),
        "range": [each.min, each.max],
        "required": each.required,
        "many": each.nargs != 1 or each.multiple,
        "default": None if callable(each.default) else _placeless(each.default),
    }


def _placeless(default: Any) -> Any:
    """A default that does not depend on the folder of the checkout."""
    return default.replace(str(_PACKAGE), "PACKAGE") if isinstance(default, str) else default


def _directory() -> dict[str, Any]:
    saved = {path.name: path for path in sorted((_DEMO / "adapters").iterdir()) if path.is_dir()}
    return {
        "schema": without_prose(Manifest.model_json_schema(mode="serialization")),
        "written": {
            name: sorted(each.name for each in path.iterdir()) for name, path in saved.items()
        },
        "keys": {
            name: _keys(json.loads((path / "reft_config.json").read_text()))
            for name, path in saved.items()
        },
        "digests": {name: digest_of_directory(path) for name, path in saved.items()},
        "base model": sorted(path.name for path in (_DEMO / "model").iterdir()),
    }


def _keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _keys(each) for key, each in value.items()}
    return [_keys(value[0])] if isinstance(value, list) and value else type(value).__name__


def _entry_points() -> dict[str, Any]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        "scripts": sorted(project["scripts"]),
        "plugins": sorted(project["entry-points"]["vllm.general_plugins"]),
    }


def main() -> None:
    """Write today's contract as the one to keep."""
    PATH.write_text(_text(contract(), _LEVELS) + "\n")


def _text(value: Any, levels: int) -> str:
    """JSON with a line for each entry of the outer levels, so that a change is a short diff."""
    if levels == 0 or not isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    indent = " " * (_LEVELS - levels + 1)
    entries = [
        f"{indent}{json.dumps(key)}: {_text(value[key], levels - 1)}" for key in sorted(value)
    ]
    return "{\n" + ",\n".join(entries) + f"\n{indent[1:]}}}"


if __name__ == "__main__":
    main()
