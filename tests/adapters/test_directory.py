"""An adapter's directory comes back as it was published, appears whole or not at all, and never
crashes its reader.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_serve.adapters.directory import (
    CONFIG,
    DTYPES,
    TENSORS,
    Adapter,
    is_adapter,
    publish,
    read_adapter,
)
from reft_serve.adapters.manifest import BaseFacts, InterventionSpec, Manifest, Part
from reft_serve.errors import AdapterExists, AdapterInvalid, AdapterNotFound
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import (
    ACTIVATION_CODES,
    COMPONENTS,
    KINDS,
    has_activation,
    optional_tensors,
    required_tensors,
)
from tests.support.adapters.damage import write_good
from tests.support.adapters.loras import write_lora
from tests.support.paths import ROOT


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[Manifest, list[Weights]]:
    """Sound adapters of every kind, dtype, component and activation, tied or not."""
    width, layers = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    tied = draw(st.booleans())
    rule = PositionRule(
        draw(st.sampled_from(["f1", "l3", "f7+l7", "last", "all", "0,-1"])) if tied else "f2+l5",
        tied,
    )
    places = draw(
        st.lists(
            st.tuples(st.integers(0, layers - 1), st.sampled_from(COMPONENTS)),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    specs, weights = [], []
    for layer, component in places:
        kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(list(DTYPES)))
        rank = draw(st.integers(1, width))
        activation = (
            draw(st.sampled_from(list(ACTIVATION_CODES))) if has_activation(kind) else "linear"
        )
        names = [*required_tensors(kind), *(optional_tensors(kind) if draw(st.booleans()) else ())]
        full = {"R"} if "W" in names else {"R", "b"}
        tensors = {
            name: torch.randn(
                *(rank, width)[: 1 if name in ("b", "b2") else 2], generator=random
            ).to(torch.float32 if name in full else DTYPES[dtype])
            for name in names
        }
        part: Part = "both" if tied else draw(st.sampled_from(["both", "prefix", "suffix"]))
        specs.append(
            InterventionSpec(
                layer=layer,
                component=component,
                kind=kind,
                rank=rank,
                activation=activation,
                part=part,
                dtype=dtype,
            )
        )
        weights.append(Weights.of(kind, tensors, activation))
    base = BaseFacts(
        name=draw(st.text(max_size=20)),
        architecture="X",
        hidden_size=width,
        num_hidden_layers=layers,
    )
    return Manifest(base_model=base, interventions=tuple(specs), positions=rule), weights


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_what_is_published_is_read_back_bit_for_bit_under_the_same_digest(
    made: tuple[Manifest, list[Weights]],
) -> None:
    manifest, weights = made
    with folder() as path:
        published = publish(path / "a", manifest, weights)
        again = read_adapter(path / "a")
    assert again.manifest == manifest
    assert again.digest == published.digest
    assert again.warnings == published.warnings
    for ours, theirs in zip(again.weights, weights, strict=True):
        assert (ours.kind, ours.activation) == (theirs.kind, theirs.activation)
        assert ours.tensors().keys() == theirs.tensors().keys()
        for name, tensor in theirs.tensors().items():
            assert ours.tensors()[name].dtype == tensor.dtype
            assert torch.equal(ours.tensors()[name], tensor)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([CONFIG, TENSORS]), st.integers(0, 10_000), st.binary(min_size=1, max_size=6)
)
def test_no_change_of_bytes_makes_the_reader_raise_anything_unnamed(
    name: str, at: int, put: bytes
) -> None:
    with folder() as path:
        digest = write_good(path / "a").digest
        content = (path / "a" / name).read_bytes()
        start = at % len(content)
        changed = content[:start] + put + content[start + len(put) :]
        (path / "a" / name).write_bytes(changed)
        try:
            adapter = read_adapter(path / "a")
        except AdapterInvalid:
            return
    assert (adapter.digest == digest) == (changed == content)


def test_the_digest_tells_weights_manifests_and_a_lora_beside_them_apart(tmp_path: Path) -> None:
    digests = {write_good(tmp_path / f"{seed}", seed).digest for seed in (0, 1)}
    shutil.copytree(tmp_path / "0", tmp_path / "copy")
    assert read_adapter(tmp_path / "copy").digest in digests
    write_lora(tmp_path / "copy")
    digests.add(read_adapter(tmp_path / "copy").digest)
    text = (tmp_path / "1" / CONFIG).read_text()
    (tmp_path / "1" / CONFIG).write_text(text.replace('"f2+l2"', '"f2+l3"'))
    digests.add(read_adapter(tmp_path / "1").digest)
    assert len(digests) == 4


def test_weights_that_share_memory_can_be_published(tmp_path: Path) -> None:
    adapter = write_good(tmp_path / "a")
    whole = torch.randn(8, 64)
    weights = Weights("noreft", adapter.weights[1].b, W=whole[:4], W2=whole[4:], activation="relu")
    publish(tmp_path / "b", adapter.manifest, [adapter.weights[0], weights])
    assert torch.equal(read_adapter(tmp_path / "b").weights[1].projection, whole[4:])


def test_an_R_that_is_not_orthonormal_is_served_with_a_warning(tmp_path: Path) -> None:
    adapter = write_good(tmp_path / "a")
    bent = Weights.of(
        "loreft", {**adapter.weights[0].tensors(), "R": adapter.weights[0].projection * 1.1}
    )
    publish(tmp_path / "b", adapter.manifest, [bent, adapter.weights[1]])
    assert not adapter.warnings
    assert "not orthonormal" in read_adapter(tmp_path / "b").warnings[0]


@pytest.mark.parametrize("fault", ["layer", "tensor"])
def test_nothing_is_published_that_could_not_be_read(tmp_path: Path, fault: str) -> None:
    adapter = write_good(tmp_path / "a")
    manifest, weights = adapter.manifest, adapter.weights
    if fault == "layer":
        specs = (
            manifest.interventions[0].model_copy(update={"layer": 4}),
            manifest.interventions[1],
        )
        manifest = manifest.model_copy(update={"interventions": specs})
    else:
        weights = weights[:1]
    with pytest.raises(AdapterInvalid):
        publish(tmp_path / "b", manifest, weights)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_place_without_an_adapter_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert not is_adapter(path)
        with pytest.raises(AdapterNotFound):
            read_adapter(path)


@pytest.mark.parametrize("kind", ["adapter", "empty", "file", "dangling link"])
def test_whatever_is_at_the_target_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    adapter = write_good(tmp_path / "a")
    target = tmp_path / "target"
    if kind == "adapter":
        write_good(target, 1)
    elif kind == "empty":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with pytest.raises(AdapterExists, match="already exists"):
        publish(target, adapter.manifest, adapter.weights)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


_STOPPED = """
import os, sys, time
from pathlib import Path
from tests.support.adapters.damage import write_good
def stop(*args):
    print("written", flush=True)
    time.sleep(60)
setattr(os, sys.argv[2], stop)
write_good(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_publish_that_is_killed_half_way_leaves_nothing_at_the_target(
    tmp_path: Path, call: str
) -> None:
    target = tmp_path / "a"
    command = [sys.executable, "-c", _STOPPED, str(target), call]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        os.kill(child.pid, signal.SIGKILL)
    assert not target.exists()
    assert write_good(target).digest == read_adapter(target).digest


def test_of_publishes_at_once_to_one_target_exactly_one_wins_whole(tmp_path: Path) -> None:
    for attempt in range(5):
        target = tmp_path / str(attempt) / "a"
        start = threading.Barrier(6)
        won: list[Adapter] = []
        lost: list[AdapterExists] = []

        def race(
            seed: int,
            target: Path = target,
            start: threading.Barrier = start,
            won: list[Adapter] = won,
            lost: list[AdapterExists] = lost,
        ) -> None:
            start.wait()
            try:
                won.append(write_good(target, seed))
            except AdapterExists as exc:
                lost.append(exc)

        threads = [threading.Thread(target=race, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 5)
        assert read_adapter(target).digest == won[0].digest
        assert [file.name for file in target.parent.iterdir()] == ["a"]
