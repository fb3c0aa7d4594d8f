"""A hostile tenant as a process: threads that do one attack after another, and rest so that they
take a share of one core.

Reads a JSON object from its first line of input, then `on`, `off` and, to end, the end of the
input. Prints one JSON object.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from typing import Any

from tests.support.attacks import ATTACKS, Attacker, act

__all__ = ["Crowd"]


class Crowd:
    """Threads that attack while `on` is set. `outcomes` counts what came of each attack."""

    def __init__(self, target: dict[str, Any]) -> None:
        self.on, self.ended = threading.Event(), threading.Event()
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.slowest: dict[str, float] = {}
        self._target, self._lock = target, threading.Lock()
        self._share = float(target["share"])
        self._names = list(target["attacks"]) or list(ATTACKS)
        self._threads = [
            threading.Thread(target=self._attack, args=(k,)) for k in range(target["threads"])
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let each thread finish its attack."""
        self.ended.set()
        self.on.set()
        for thread in self._threads:
            thread.join()

    def _attack(self, number: int) -> None:
        target = self._target
        rng = random.Random(f"{target['seed']} {number}")
        files = {name: base64.b64decode(content) for name, content in target["adapter"].items()}
        attacker = Attacker(target["url"], target["inference"], target["owner"], files, rng)
        try:
            while not self.ended.is_set():
                for name in rng.sample(self._names, len(self._names)):
                    self.on.wait()
                    if self.ended.is_set():
                        return
                    self._one(attacker, name)
        finally:
            attacker.close()

    def _one(self, attacker: Attacker, name: str) -> None:
        begun, used = time.monotonic(), time.thread_time()
        outcome = act(attacker, name)
        seconds, used = time.monotonic() - begun, time.thread_time() - used
        with self._lock:
            self.outcomes[name][outcome] += 1
            self.slowest[name] = round(max(seconds, self.slowest.get(name, 0.0)), 2)
        rest = used * len(self._threads) / self._share - seconds
        self.ended.wait(max(0.05, rest))


def main() -> None:
    """Attack until the end of the input."""
    os.nice(19)
    crowd = Crowd(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        if line.strip() == "on":
            crowd.on.set()
        else:
            crowd.on.clear()
    crowd.end()
    print(json.dumps({"outcomes": crowd.outcomes, "slowest": crowd.slowest}))


if __name__ == "__main__":
    main()
