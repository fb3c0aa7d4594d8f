"""Adapters that come and go, from many sides, in one engine."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, track
from safetensors.torch import load_file, save_file

from reft_serve.adapters.directory import CONFIG, TENSORS
from tests.support.shapes import Shape, reft_adapter

SHAPE = Shape(
    hidden=64, layers=4, heads=2, kv_heads=2, ffn=128, vocab=512, context=128, dtype="float32"
)
PROMPT = [1, *range(20, 43)]
MIX = {"load": 40, "unload": 30, "reload": 15, "list": 8, "pin": 5, "missing": 2}
MOST_PINNED = 16
TOLERANCE = 1e-3


@dataclass(slots=True)
class Tally:
    """What happened so far. `memory` is resident bytes by process, and entries in our own collections there, over `loads`;
    `stalls` is seconds by kind of load.
    """

    operations: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: int = 0
    unexpected: list[str] = field(default_factory=list)
    loads: int = 0
    memory: list[dict[str, float]] = field(default_factory=list)
    stalls: dict[str, list[float]] = field(default_factory=dict)
    slot_seconds: list[float] = field(default_factory=list)


class Probe:
    """vLLM adds this to its worker (`worker_extension_cls`)."""

    def churn_probe(self: Any) -> dict[str, Any]:
        """The worker's memory and counters, and the seconds of its loads since the last call."""
        from tests.support.engine.stopwatch import resident_bytes, tables

        registry = self.model_runner.lora_manager.registry
        spent = list(registry.load_seconds)
        registry.load_seconds.clear()
        return {
            "resident_bytes": resident_bytes(), "loads": registry.loads, "load_seconds": spent,
            "entries": sum(map(len, tables(registry))),
        }  # fmt: skip


def environment(args: argparse.Namespace) -> dict[str, str]:
    """What must be in the environment for `run`."""
    return {
        "REFT_LORA": "off", "REFT_MAX_RANK": str(args.rank), "REFT_MAX_INTERVENTIONS": str(SHAPE.layers),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }  # fmt: skip


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of one run; `folder` is empty and takes the adapters."""
    paths = _write_adapters(folder, args)
    return _result(args, asyncio.run(_run(args, SHAPE.write(folder / "model"), paths)))


def _write_adapters(folder: Path, args: argparse.Namespace) -> list[Path]:
    """The first as it is published, and copies of it with other weights: a publish waits for the disk, these do not."""
    first = reft_adapter(folder / "adapter0", SHAPE, args.rank, "f1+l2", 0)
    config, tensors = (first / CONFIG).read_bytes(), load_file(first / TENSORS)
    paths = [first]
    for i in track(range(1, args.adapters), "writing adapters", transient=True):
        path = folder / f"adapter{i}"
        path.mkdir()
        (path / CONFIG).write_bytes(config)
        generator = torch.Generator().manual_seed(i)
        changed = {
            name: tensor
            if name.endswith(".R")
            else tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in tensors.items()
        }
        save_file(changed, path / TENSORS)
        paths.append(path)
    return paths


class Churn:
    """The callers and clients of one server, and what they know of it."""

    def __init__(
        self, engine: Any, models: Any, paths: list[Path], args: argparse.Namespace
    ) -> None:
        self.engine, self.models, self.paths, self.args = engine, models, paths, args
        self.tally, self.random = Tally(), random.Random(args.seed)
        self._busy: set[str] = set()
        self._pinned: set[str] = set()
        self._first: dict[str, float] = {}

    @property
    def done(self) -> bool:
        return self.tally.loads >= self.args.loads

    async def call(self) -> None:
        """One operation of the mix, on an adapter that no other caller is at."""
        name = self._pick()
        kind = self.random.choices(list(MIX), list(MIX.values()))[0]
        if name not in self.models.lora_requests:
            kind = "missing" if kind == "missing" else "load"
        elif kind in ("load", "missing"):
            kind = "reload"
        try:
            operation: Callable[[str], Awaitable[None]] = getattr(self, f"_{kind}")
            await operation(name)
        except Exception as exc:
            self.tally.unexpected.append(f"{kind} {name}: {type(exc).__name__}: {exc}")
        self.tally.operations[kind] += 1
        self._busy.discard(name)

    async def ask(self) -> None:
        """One request of a client to a known adapter."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = self.random.choice(list(self.models.lora_requests))
        params = SamplingParams(
            temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self.tally.requests += 1
        number, prompt = self.tally.requests, {"prompt_token_ids": PROMPT}
        try:
            adapter = self.models.lora_requests[name]
            async with asyncio.timeout(120):
                answers = [
                    a
                    async for a in self.engine.generate(
                        prompt, params, f"churn-{number}", lora_request=adapter
                    )
                ]
            (output,) = answers[-1].outputs
            assert output.finish_reason == "length", output.finish_reason
            chosen = output.logprobs[0][output.token_ids[0]].logprob
        except Exception as exc:
            self.tally.lost.append(f"request {number} of {name}: {type(exc).__name__}: {exc}")
            return
        self.tally.wrong += abs(self._first.setdefault(name, chosen) - chosen) > TOLERANCE

    async def load(self, name: str, path: Path | None = None, again: bool = False) -> Any:
        """`/v1/load_lora_adapter`: its message, or an error object."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        path = path or self.paths[int(name.removeprefix("adapter"))]
        return await self.models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=name, lora_path=str(path), load_inplace=again)
        )

    async def probe(self) -> None:
        """Note memory and stalls since the last time."""
        from reft_serve.engine.front_end.binding import binder_of
        from tests.support.engine.stopwatch import resident_bytes, tables

        (worker,) = await self.engine.collective_rpc("churn_probe")
        core = await self.engine.engine_core.call_utility_async("stopwatch")
        tally = self.tally
        tally.loads = worker["loads"]
        tally.slot_seconds += worker["load_seconds"]
        for kind in ("call", "request"):
            tally.stalls.setdefault(kind, []).extend(core[kind])
        tally.memory.append({
            "loads": worker["loads"], "worker": worker["resident_bytes"], "core": core["resident_bytes"],
            "front_end": resident_bytes(), "known": len(self.models.lora_requests),
            "worker_entries": worker["entries"], "core_entries": core["entries"],
            "front_end_entries": sum(map(len, tables(binder_of(self.engine)))),
        })  # fmt: skip

    def _pick(self) -> str:
        pinned = sorted(self._pinned - self._busy)
        name = pinned[0] if len(self._pinned) >= MOST_PINNED and pinned else None
        while name is None or name in self._busy:
            name = f"adapter{self.random.randrange(len(self.paths))}"
        self._busy.add(name)
        return name

    async def _load(self, name: str) -> None:
        self._expect(await self.load(name), str)

    async def _reload(self, name: str) -> None:
        self._pinned.discard(name)
        self._expect(await self.load(name, again=True), str)

    async def _unload(self, name: str) -> None:
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        self._pinned.discard(name)
        self._expect(
            await self.models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name)), str
        )

    async def _pin(self, name: str) -> None:
        if len(self._pinned) >= MOST_PINNED:
            await self._unload(name)
        elif await self.engine.pin_lora(self.models.lora_requests[name].lora_int_id):
            self._pinned.add(name)

    async def _list(self, _: str) -> None:
        listed = await self.engine.list_loras()
        # A request under way while its adapter is unloaded binds it again, under the id that it had.
        assert len(listed) <= self.args.slots + self.args.clients, len(listed)

    async def _missing(self, name: str) -> None:
        answer = await self.load(name, self.paths[0].with_name(f"gone-{name}"))
        assert answer.error.code in (400, 404), answer

    def _expect(self, answer: Any, kind: type) -> None:
        assert isinstance(answer, kind), answer


async def _run(args: argparse.Namespace, model: Path, paths: list[Path]) -> Tally:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        str(model), load_format="dummy", skip_tokenizer_init=True, dtype=SHAPE.dtype, enable_lora=True, max_loras=args.slots,
        max_model_len=SHAPE.context, max_num_seqs=64, enforce_eager=True, enable_prefix_caching=True, seed=0,
        disable_log_stats=True, worker_extension_cls="tests.support.engine.churn.Probe",
        kv_cache_memory_bytes=64 << 20,  # small, so that all of it is resident memory before the count begins
        scheduler_cls="tests.support.engine.stopwatch.WatchedScheduler",
    ))  # fmt: skip
    models = OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=str(model))])
    churn = Churn(engine, models, paths, args)
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("making all adapters known", total=args.loads)
            await churn.probe()
            for first in range(0, len(paths), 500):
                for start in range(first, min(first + 500, len(paths)), args.callers):
                    names = [
                        f"adapter{i}" for i in range(start, min(start + args.callers, len(paths)))
                    ]
                    await asyncio.gather(*(churn._load(name) for name in names))
                await churn.probe()
                progress.update(task, completed=churn.tally.loads)
            progress.update(task, description="churning")

            async def again(one: Callable[[], Awaitable[None]]) -> None:
                while not churn.done:
                    await one()

            async def watch() -> None:
                while not churn.done:
                    await asyncio.sleep(2)
                    await churn.probe()
                    progress.update(task, completed=churn.tally.loads)

            jobs = [again(churn.call) for _ in range(args.callers)] + [
                again(churn.ask) for _ in range(args.clients)
            ]
            await asyncio.gather(watch(), *jobs)
            await churn.probe()
    finally:
        engine.shutdown()
    return churn.tally


def _result(args: argparse.Namespace, tally: Tally) -> dict[str, Any]:
    known = next(at for at, point in enumerate(tally.memory) if point["loads"] >= args.adapters)
    before, after = tally.memory[known], tally.memory[-1]
    return {
        "arguments": vars(args), "parameters": SHAPE.parameters, "loads": tally.loads, "requests": tally.requests,
        "operations": dict(tally.operations), "lost": len(tally.lost), "lost_first": tally.lost[:5], "wrong": tally.wrong,
        "unexpected": len(tally.unexpected), "unexpected_first": tally.unexpected[:5],
        "grown_bytes": {name: after[name] - before[name] for name in ("worker", "core", "front_end")},
        "stall_ms": {kind: _quantiles(seconds) for kind, seconds in tally.stalls.items()},
        "slot_ms": _quantiles(tally.slot_seconds),
        "memory_known": before, "memory_end": after, "memory": tally.memory,
    }  # fmt: skip


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {
        name: ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1e3
        for name, share in at.items()
    }
    return {"count": len(ordered)} | found
