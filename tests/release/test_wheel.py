"""The wheel, installed into an empty environment outside the repository, serves a demo adapter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gateway.up_process import Up
from tests.support.paths import ROOT


@pytest.mark.slow
def test_up_from_the_wheel_answers_for_a_demo_adapter(tmp_path: Path) -> None:
    programs = _install(_wheel(tmp_path / "dist"), tmp_path / "venv")
    package = _run(
        programs / "python", "-c", "import reft_serve; print(*reft_serve.__path__)", cwd=tmp_path
    )
    assert Path(package).is_relative_to(tmp_path)

    # Its processes share what Python has compiled, which else each of them would compile.
    up = Up(tmp_path, program=programs / "reft-serve", PYTHONDONTWRITEBYTECODE="")
    try:
        assert up.upload("birds").status_code == 201
        assert up.say("birds") != up.say("base")
    finally:
        up.stop()


def _wheel(directory: Path) -> Path:
    """The wheel that `scripts/release` has built, or a new one."""
    given = os.environ.get("REFT_TEST_WHEEL")
    if given is not None:
        return Path(given)
    _run(sys.executable, ROOT / "scripts" / "release.py", "build", directory)
    (wheel,) = directory.glob("*.whl")
    return wheel


def _install(wheel: Path, environment: Path) -> Path:
    """Install the wheel and the locked versions of a CPU engine, from uv's cache if it has them; return the bin folder."""
    uv = (sys.executable, "-m", "uv")
    _run(*uv, "venv", "--quiet", "--python", sys.executable, environment)
    torch = re.search(r"^TORCH=(\S+)$", (ROOT / "scripts" / "setup").read_text(), re.MULTILINE)
    assert torch is not None
    wheels = os.environ.get("PIP_FIND_LINKS")
    source = ("--find-links", wheels) if wheels else ("--torch-backend=cpu",)
    install = (
        *uv,
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--python",
        environment / "bin" / "python",
    )
    for wanted in (
        (*source, f"torch=={torch[1]}+cpu"),
        ("--require-hashes", "-r", ROOT / "requirements" / "cpu.txt"),
        (wheel,),
    ):
        cached = subprocess.run(
            [*install, "--offline", *wanted], capture_output=True, check=False, timeout=300
        )
        if cached.returncode != 0:
            _run(*install, *wanted)
    return environment / "bin"


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = dict(os.environ)
    if "PIP_CERT" in environment:  # as in scripts/setup: pip's own certificates are uv's as well
        environment.setdefault("SSL_CERT_FILE", environment["PIP_CERT"])
    ended = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout.strip()
