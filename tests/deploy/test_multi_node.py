"""One engine over two nodes, started here with the commands and environment of the overlay `multi-node`, without GPUs."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest
from torch import Tensor

from reft_serve.interventions.positions import PositionRule
from tests.support.adapters.damage import MODEL
from tests.support.deploy.manifests import workload
from tests.support.deploy.processes import Container
from tests.support.engine.golden_check import TOLERANCE
from tests.support.engine.loreft_edits import EDITS, PROMPT, by_hooks, write_loreft
from tests.support.gateway.process import free_port

NAMES = ("everywhere", "first rank alone", "second rank alone")
ENDS_WITHIN = 60.0


class Group:
    """A leader and the node that computes with it."""

    def __init__(self, folder: Path) -> None:
        self.store, self.key, port = folder / "adapters", secrets.token_hex(16), free_port()
        self.store.mkdir()
        places = {
            "/models/base": str(MODEL), "0.0.0.0": "127.0.0.1", "--port=8000": f"--port={port}", ":8000/": f":{port}/",
            "--tensor-parallel-size=8": "--tensor-parallel-size=1", "/var/cache/reft-serve": str(Path.home()),
        }  # fmt: skip
        # vLLM binds each rank to a memory node of its own, and there may be only one.
        machine = {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        more = ["--dtype=float32", "--enforce-eager", f"--master-port={free_port()}"]
        given = {"engine-key": self.key, "engine-key-next": secrets.token_hex(16)}
        self.nodes: list[Container] = []
        try:
            for rank, role in enumerate(("leader", "worker")):
                lws = {
                    "LWS_GROUP_SIZE": "2",
                    "LWS_WORKER_INDEX": str(rank),
                    "LWS_LEADER_ADDRESS": "127.0.0.1",
                }
                node = workload("multi-node", f"reft-engine-group-{role}")
                self.nodes.append(Container(node, folder, places, given, port, machine | lws, more))
            self.leader, self.worker = self.nodes
            self.leader.await_probe("startup")
        except BaseException:
            self.stop()
            raise

    def load(self, name: str) -> None:
        """As a gateway does it."""
        body = {"lora_name": name, "lora_path": str(self.store / name)}
        headers = {"authorization": f"Bearer {self.key}"}
        url = f"{self.leader.url}/v1/load_lora_adapter"
        answer = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text

    def first(self, model: str) -> dict[str, float]:
        """The likeliest first answers to PROMPT, with their logprobs."""
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(
            base_url=f"{self.leader.url}/v1",
            api_key=self.key,
            max_retries=0,
            timeout=60,
            http_client=http,
        ) as client:
            answer = client.completions.create(
                model=model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5,
                extra_body={"return_tokens_as_token_ids": True},
            )  # fmt: skip
        found = answer.choices[0].logprobs
        assert found is not None
        assert found.top_logprobs is not None
        return found.top_logprobs[0]

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    running = Group(tmp_path)
    try:
        yield running
    finally:
        running.stop()


def test_two_nodes_serve_adapters_exactly_and_end_in_order(group: Group) -> None:
    expected: dict[str, Tensor] = {str(MODEL): by_hooks(None)}
    for seed, name in enumerate(NAMES):
        adapter = write_loreft(group.store / name, EDITS[name], PositionRule("f2+l2"), seed)
        group.load(name)
        expected[name] = by_hooks(adapter)
    with ThreadPoolExecutor(8) as pool:
        asked = [*expected] * 4
        for name, found in zip(asked, pool.map(group.first, asked), strict=True):
            assert len(found) == 5
            for token, logprob in found.items():
                assert logprob == pytest.approx(
                    expected[name][int(token.removeprefix("token_id:"))].item(), abs=TOLERANCE
                )
    highest = sorted(logprobs.max().item() for logprobs in expected.values())
    assert all(b - a > 2 * TOLERANCE for a, b in pairwise(highest)), (
        "adapters that answer alike would show nothing"
    )
    # A group that is replaced: the node's hook waits for the leader, which finishes first, and then the node ends.
    hook = group.worker.hook("preStop")
    with pytest.raises(subprocess.TimeoutExpired):
        hook.wait(2.5)
    group.leader.process.terminate()
    assert group.leader.finish(ENDS_WITHIN) == 0, group.leader.tail()
    assert hook.wait(10) == 0
    group.worker.process.terminate()
    assert group.worker.finish(ENDS_WITHIN) == 0, group.worker.tail()
