"""Prepare a release of the version in reft_serve/__init__.py. Nothing is tagged and nothing is
uploaded.

scripts/release              check, build into build/dist, and run the wheel in an empty environment outside the repository
scripts/release check        compare the version with the changelog and with the image tags of docker/ and deploy/
scripts/release build DIR    build wheel and sdist into DIR
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_DIST = ROOT / "build" / "dist"
_WHEEL_TEST = "tests/release/test_wheel.py"
_HEADING = re.compile(
    r"^## (?P<version>\S+)(?: - (?P<date>\S+))?$\n(?P<text>.*?)(?=^## |\Z)",
    re.MULTILINE | re.DOTALL,
)
_TAG = re.compile(r"(?:newTag: |ARG VERSION=|reft-serve-[a-z-]+:)([0-9][0-9.]*[0-9])")


def main() -> int:
    """Run the command; return 1 and print the faults if the release is not ready."""
    parser = argparse.ArgumentParser(
        prog="scripts/release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("check", "build"),
        help="one part only; without it, all of them",
    )
    parser.add_argument("directory", nargs="?", type=Path, help="where `build` writes")
    arguments = parser.parse_args()
    if (arguments.command == "build") != (arguments.directory is not None):
        parser.error("`build` takes a directory, and nothing else does")

    version = _version()
    if arguments.command == "build":
        build(arguments.directory)
        return 0
    faults = check(version)
    if arguments.command is None:
        faults += check_repository(version)
    for fault in faults:
        print(f"release: {fault}", file=sys.stderr)
    if faults or arguments.command == "check":
        return 1 if faults else 0

    wheel = build(_DIST)
    environment = os.environ | {"REFT_TEST_WHEEL": str(wheel)}
    tested = subprocess.run(
        [ROOT / "scripts" / "test", "-q", _WHEEL_TEST], env=environment, check=False
    )
    if tested.returncode != 0:
        print("release: the wheel does not run outside the repository", file=sys.stderr)
        return 1
    print(f"release: {version} is ready in {_DIST.relative_to(ROOT)}. Next:")
    print(f"  git tag -a v{version} -m 'reft-serve {version}' && git push origin v{version}")
    print(
        f"  upload {_DIST.relative_to(ROOT)}/* to the package index, and build and push the "
        "images of docker/"
    )
    return 0


def check(version: str) -> list[str]:
    """Faults of the files: the changelog's newest version, its date, what is unreleased, and the
    image tags.
    """
    sections = list(_HEADING.finditer((ROOT / "CHANGELOG.md").read_text()))
    dated = [section for section in sections if section["version"] != "Unreleased"]
    faults = []
    if not dated or dated[0]["version"] != version:
        newest = dated[0]["version"] if dated else "none"
        faults.append(
            f"reft_serve/__init__.py has version {version}, but the newest in CHANGELOG.md is "
            f"{newest}"
        )
    elif not re.fullmatch(r"\d{4}-\d{2}-\d{2}", dated[0]["date"] or ""):
        faults.append(f"CHANGELOG.md needs a date: ## {version} - YYYY-MM-DD")
    if any(section["version"] == "Unreleased" and section["text"].strip() for section in sections):
        faults.append("CHANGELOG.md has unreleased changes: move them below the new version")

    for path in sorted(
        path
        for folder in ("docker", "deploy")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    ):
        faults += [
            f"{path.relative_to(ROOT)} has the tag {tag[1]}, not {version}"
            for tag in _TAG.finditer(path.read_text())
            if tag[1] != version
        ]
    return faults


def check_repository(version: str) -> list[str]:
    """Faults of the checkout: uncommitted changes, or a tag of this version."""
    faults = []
    if _git("status", "--porcelain"):
        faults.append("the working tree has uncommitted changes")
    if _git("tag", "--list", f"v{version}"):
        faults.append(f"the tag v{version} exists already")
    return faults


def build(directory: Path) -> Path:
    """Build wheel and sdist into `directory` with the locked build tools, and return the wheel's
    path.
    """
    command = [
        sys.executable,
        "-m",
        "uv",
        "build",
        "--quiet",
        "--no-build-isolation",
        "--python",
        sys.executable,
    ]
    subprocess.run([*command, "--out-dir", str(directory), str(ROOT)], check=True)
    return directory / f"reft_serve-{_version()}-py3-none-any.whl"


def _version() -> str:
    match = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "reft_serve" / "__init__.py").read_text(), re.MULTILINE
    )
    if match is None:
        sys.exit("release: reft_serve/__init__.py has no __version__")
    return match[1]


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
