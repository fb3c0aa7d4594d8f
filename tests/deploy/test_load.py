"""The load benchmark's own arithmetic, and its client against a gateway."""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.deploy.open_loop import (
    Arrival,
    Outcome,
    Run,
    Tenant,
    arrivals,
    drive,
    growth,
    result_of,
    summary,
)
from tests.support.gateway.harness import running

TENANTS = (Tenant("a", "ka", ("x", "y", "z")), Tenant("b", "kb", ("x",)))
ARGS = argparse.Namespace(first_token=0.5, each_token=0.1, warm_up=0.0)


def test_arrivals_are_random_skewed_and_the_same_for_the_same_seed() -> None:
    made = arrivals(5.0, 400.0, TENANTS, random.Random(1))
    assert made == arrivals(5.0, 400.0, TENANTS, random.Random(1))
    assert 1800 < len(made) < 2200
    assert [each.at for each in made] == sorted(each.at for each in made)
    assert made[-1].at < 400
    count = {name: sum(each.tenant.name == name for each in made) for name in "ab"}
    assert 1.7 < count["a"] / count["b"] < 2.4
    models = [
        sum(each.model == name for each in made if each.tenant.name == "a")
        for name in ("x", "y", "z")
    ]
    assert models == sorted(models, reverse=True)
    assert 0.15 < sum(each.long for each in made) / len(made) < 0.35


def outcome(first: float, total: float, tokens: int = 11, error: str = "") -> Outcome:
    return Outcome(
        Arrival(0.0, TENANTS[0], "x", "", False, tokens), 0.0, first, total, tokens, error
    )


def test_goodput_counts_what_came_in_time_and_errors_never() -> None:
    asked = [
        outcome(0.1, 0.6),
        outcome(0.6, 1.0),
        outcome(0.1, 1.2),
        outcome(0.1, 0.2, error="503: no"),
    ]
    found = summary(asked, 10.0, ARGS)
    assert (found["requests"], found["errors"], found["within"]) == (4, 1, 0.25)
    assert found["goodput_per_s"] == pytest.approx(0.1)
    assert found["tokens_per_s"] == pytest.approx(3.3)
    assert found["first_token_ms"]["p50"] == pytest.approx(100)
    assert found["each_token_ms"]["p50"] == pytest.approx(50)


def test_growth_is_the_slope_after_the_warm_up() -> None:
    memory = [
        (60.0 * k, {"grows": 1_000_000 + 1_000 * k, "still": 5_000_000 if k > 3 else 1})
        for k in range(60)
    ]
    found = growth(memory, 600.0)
    assert found["still"] == {"first_mb": 5.0, "last_mb": 5.0, "growth_per_hour": 0.0}
    assert found["grows"]["growth_per_hour"] == pytest.approx(60_000 / 1_010_000, rel=1e-3)


def test_the_client_reads_whole_answers_and_tells_broken_ones(tmp_path: Path) -> None:
    with running(tmp_path) as (gateway, (engine,)):
        tenant = gateway.tenant("acme")
        assert tenant.upload("birds").status_code == 201
        deployment: Any = SimpleNamespace(url=gateway.url, memory=lambda: {"gateway": 1 << 20})
        mine = [Tenant("acme", tenant.key, ("birds",))]
        run = Run(20.0, 1.0)
        asyncio.run(drive(deployment, mine, run, random.Random(2)))
        found = result_of(run, ARGS)
        assert found["all"]["requests"] > 5
        assert found["errors"] == []
        assert set(found["tenants"]) == {"acme"}
        assert all(
            each.tokens == each.arrival.tokens and 0 < each.first <= each.total
            for each in run.outcomes
        )
        engine.break_after = 3
        broken = Run(10.0, 1.0)
        asyncio.run(drive(deployment, mine, broken, random.Random(2)))
        assert result_of(broken, ARGS)["all"]["errors"] == len(broken.outcomes) > 2
