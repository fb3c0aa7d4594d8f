"""What a user of the package gets besides its code."""

from __future__ import annotations

import importlib
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_type_checkers_read_the_package_s_types() -> None:
    assert files("reft_serve").joinpath("py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["reft_serve"]


def test_the_classifiers_name_every_supported_python() -> None:
    named = {
        line.rpartition(" :: ")[2] for line in PROJECT["project"]["classifiers"] if ":: 3." in line
    }
    assert named == {"3.11", "3.12", "3.13"}
    assert PROJECT["project"]["requires-python"] == ">=3.11"


@pytest.mark.parametrize("verb", ["gateway", "up", "worker"])
def test_a_command_still_runs_under_its_earlier_module_name(verb: str) -> None:
    shim, module = (
        importlib.import_module(f"reft_serve.{name}") for name in (f"cli_{verb}", f"cli.{verb}")
    )
    assert getattr(shim, verb) is getattr(module, verb)


def test_the_fake_engine_is_still_found_under_its_earlier_name() -> None:
    shim = importlib.import_module("reft_serve.gateway.fake_engine")
    assert shim.FakeEngine is importlib.import_module("reft_serve.testing").FakeEngine


def test_no_folder_holds_more_than_fifteen_modules() -> None:
    package = Path(__file__).parents[1] / "reft_serve"
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 15, f"{folder.name} holds {len(modules)} modules"
