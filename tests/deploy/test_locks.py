"""The locked requirements: they fit the torch that is installed with them, and every package has a hash."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
WITH_TORCH = ("cpu", "cuda", "dev", "train", "train-cpu")
CPU_ONLY = ("cpu", "dev", "train-cpu")
PYTHONS = ("3.11", "3.12", "3.13")
# What torch 2.13.0 asks for: `Requires-Dist` in METADATA of its wheels, with the CUDA part from PyPI's wheels for Linux, and
# what `cuda-toolkit[cublas, cudart, ...]==13.0.3` asks for: `Requires-Dist` of cuda-toolkit 13.0.3.0.
TORCH = "2.13.0"
EVERYWHERE = (
    "filelock", "typing-extensions>=4.10.0", "setuptools>=77.0.3", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2",
    "fsspec>=0.8.5",
)  # fmt: skip
CUDA = (
    "cuda-toolkit==13.0.3", "cuda-bindings<14,>=13.0.3", "nvidia-cudnn-cu13==9.20.0.48", "nvidia-cusparselt-cu13==0.8.1",
    "nvidia-nccl-cu13==2.29.7", "nvidia-nvshmem-cu13==3.4.5", "triton==3.7.1", "nvidia-cublas==13.1.1.3.*",
    "nvidia-cuda-nvrtc==13.0.88.*", "nvidia-cuda-runtime==13.0.96.*", "nvidia-cufft==12.0.0.61.*",
    "nvidia-nvjitlink<14,>=13.0.88",
    "nvidia-cufile==1.15.1.6.*", "nvidia-cuda-cupti==13.0.85.*", "nvidia-curand==10.4.0.35.*", "nvidia-cusolver==12.0.4.66.*",
    "nvidia-cusparse==12.6.3.3.*", "nvidia-nvtx==13.0.85.*",
)  # fmt: skip


@dataclass(frozen=True)
class Pin:
    """A line of a lock."""

    name: str
    version: str
    marker: Marker | None
    hashes: int

    def on(self, python: str) -> bool:
        """Whether it is installed on Linux with this Python."""
        machine = {
            "python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux",
            "platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython",
        }  # fmt: skip
        return self.marker is None or self.marker.evaluate(machine)


def pins(name: str) -> list[Pin]:
    """The lines of a lock."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    found = []
    for entry in re.split(r"\n(?=\S)", text.strip()):
        first, *hashes = re.split(r" \\\n *", entry)
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), entry
        requirement = Requirement(first)
        (exact,) = requirement.specifier
        assert exact.operator == "==", entry
        found.append(
            Pin(canonicalize_name(requirement.name), exact.version, requirement.marker, len(hashes))
        )
    return found


@pytest.mark.parametrize("name", [path.stem for path in LOCKS])
def test_every_package_of_a_lock_has_one_version_and_its_hashes(name: str) -> None:
    found = pins(name)
    assert found
    assert all(pin.hashes for pin in found)
    for python in PYTHONS:
        names = [pin.name for pin in found if pin.on(python)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", WITH_TORCH)
def test_a_lock_fits_the_torch_that_is_installed_with_it(name: str, python: str) -> None:
    versions = {pin.name: pin.version for pin in pins(name) if pin.on(python)}
    cuda = name not in CPU_ONLY
    needed = [Requirement(each) for each in (*EVERYWHERE, *CUDA)]
    wrong = [
        f"{each} but {versions[each.name]} is locked"
        for each in needed if each.name in versions and versions[each.name] not in each.specifier
    ]  # fmt: skip
    required = needed if cuda else needed[: len(EVERYWHERE)]
    assert not wrong + [f"{each} is not locked" for each in required if each.name not in versions]
    assert versions.get("torch") == (TORCH if cuda else None)


@pytest.mark.parametrize("name", CPU_ONLY)
def test_a_lock_for_a_cpu_has_no_cuda(name: str) -> None:
    assert not [pin.name for pin in pins(name) if re.match(r"(nvidia|cuda)-", pin.name)]


def test_the_version_of_torch_is_the_one_that_this_test_knows() -> None:
    assert f"\nTORCH={TORCH}\n" in (ROOT / "scripts" / "setup").read_text()


def test_build_tools_are_locked() -> None:
    assert {"setuptools", "uv"} <= {pin.name for pin in pins("build")}
