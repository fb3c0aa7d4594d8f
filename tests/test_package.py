"""What a user of the package gets besides its code."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_type_checkers_read_the_package_s_types() -> None:
    assert files("reft_serve").joinpath("py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["reft_serve"]


def test_the_classifiers_name_every_supported_python() -> None:
    named = {line.rpartition(" :: ")[2] for line in PROJECT["project"]["classifiers"] if ":: 3." in line}
    assert named == {"3.11", "3.12", "3.13"}
    assert PROJECT["project"]["requires-python"] == ">=3.11"
