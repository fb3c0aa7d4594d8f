"""Each attack of `scripts/bench attack` once or twice against a gateway: it answers others
meanwhile and nothing ends it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from reft_serve.testing import FakeEngine
from tests.support.attacks import ATTACKS, Attacker, act
from tests.support.gateway.harness import Gateway, Served, adapter_files
from tests.support.gateway.process import process

SEED = 14
REPEATS = 2
# Of the whole answer, beside whatever else this machine does at the time.
LIVE_SECONDS = 1.0


@pytest.fixture(scope="module")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacker]:
    """A hostile tenant of a gateway that is a process."""
    folder = tmp_path_factory.mktemp("attacked")
    prepared = Gateway(folder, "http://127.0.0.1:1")
    tenant = prepared.tenant("hostile", limits={"storage_bytes": 64 << 20, "adapters": 20})
    narrow = prepared.tenant("hostile", role="inference")
    prepared.stop()
    with ExitStack() as stack:
        engine = Served(FakeEngine().app)
        stack.callback(engine.stop)
        running, url = stack.enter_context(process(folder, engine.url))
        made = Attacker(url, narrow.key, tenant.key, adapter_files(), random.Random(SEED))
        stack.callback(made.close)
        yield made
        assert running.poll() is None, (folder / "gateway.log").read_text()[-4000:]


class Pulse:
    """Asks for `/health/live` all the time and keeps the longest answer."""

    def __init__(self, url: str) -> None:
        self.longest, self._on = 0.0, True
        self._url = url
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=30) as client:
            while self._on:
                begun = time.monotonic()
                assert client.get("/health/live").status_code == 200
                self.longest = max(self.longest, time.monotonic() - begun)
                time.sleep(0.01)

    def end(self) -> float:
        self._on = False
        self._thread.join(30)
        return self.longest


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_a_refusal_or_an_answer_and_holds_nobody_up(
    attacker: Attacker, name: str
) -> None:
    attacker.rng.seed(f"{SEED} {name}")
    pulse = Pulse(attacker.url)
    outcomes = [act(attacker, name) for _ in range(REPEATS)]
    longest = pulse.end()
    assert not [each for each in outcomes if each.startswith("5") and each != "503"], outcomes
    assert longest < LIVE_SECONDS
    headers = {"authorization": f"Bearer {attacker.inference}"}
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    assert httpx.post(
        f"{attacker.url}/v1/completions", json=body, headers=headers, trust_env=False
    ).status_code in (
        200,
        429,
    )


def test_a_seed_repeats_an_attack() -> None:
    def sizes(seed: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(1 << 20) for _ in range(5)]

    assert sizes(1) == sizes(1) != sizes(2)


def test_the_log_of_an_attacked_gateway_holds_no_key(
    attacker: Attacker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    logs = list(Path(tmp_path_factory.getbasetemp()).glob("attacked*/gateway.log"))
    assert logs
    text = "".join(log.read_text() for log in logs)
    assert attacker.owner not in text
    assert attacker.inference not in text
    assert "Traceback" not in text
