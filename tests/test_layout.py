"""Where test code may be: test modules import `tests.support`, and nothing imports test modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, also inside functions; `from a import b` gives both `a` and
    `a.b`.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_test_module(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "tests" and any(
        part == "conftest" or part.startswith("test_") for part in parts[1:]
    )


def offences(path: Path) -> list[str]:
    """Imports of one file that its folder does not allow."""
    folder, names = path.relative_to(ROOT).parts[0], sorted(set(imported(path)))
    found = [f"{name} is a test module" for name in names if is_test_module(name)]
    if folder == "tests":
        found += [f"{name} is a benchmark" for name in names if name.split(".")[0] == "benchmarks"]
    else:
        outside = [
            name
            for name in names
            if name.startswith("tests.") and not name.startswith("tests.support")
        ]
        found += [f"{name} is outside tests.support" for name in outside]
    return found


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "reft_serve", "docs", "examples"])
def test_only_support_is_shared(folder: str) -> None:
    found = {str(path.relative_to(ROOT)): offences(path) for path in (ROOT / folder).rglob("*.py")}
    assert {name: each for name, each in found.items() if each} == {}


def test_the_product_imports_no_tests() -> None:
    for path in (ROOT / "reft_serve").rglob("*.py"):
        assert not [
            name for name in imported(path) if name.split(".")[0] in ("tests", "benchmarks")
        ], path


def test_helpers_are_in_support() -> None:
    """The recording of fixtures runs in another environment, so it is no helper."""
    here = {path for path in (ROOT / "tests").rglob("*.py") if "fixtures" not in path.parts}
    helpers = {
        path
        for path in here
        if not path.name.startswith("test_") and path.name not in ("conftest.py", "__init__.py")
    }
    outside = [path for path in helpers if path.relative_to(ROOT).parts[1] != "support"]
    assert outside == []


@pytest.mark.parametrize(
    ("name", "source", "offence"),
    [
        ("tests/a.py", "from tests.gateway.test_files import upload", "is a test module"),
        ("tests/a.py", "from tests.gateway import conftest", "is a test module"),
        ("tests/a.py", "def f():\n    import benchmarks.load", "is a benchmark"),
        ("benchmarks/a.py", "from tests.gateway import harness", "is outside tests.support"),
        ("benchmarks/a.py", "from tests.support.gateway.harness import running", None),
    ],
)
def test_an_offence_is_found(
    name: str, source: str, offence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(source)
    found = offences(path)
    assert (offence in found[0]) if offence else (found == [])
