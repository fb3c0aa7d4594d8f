"""The operator's commands, on a database without a gateway."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from reft_serve.cli.admin import app
from reft_serve.cli.supervisor import SupervisedProcess
from reft_serve.cli.up import _end, _make_private, _places
from reft_serve.errors import Conflict, NotFound, RequestInvalid
from tests.support.gateway.harness import running
from tests.support.waiting import wait_for


@pytest.fixture
def operate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("REFT_DATABASE", f"sqlite:///{tmp_path / 'reft.db'}")
    return CliRunner()


def run(operate: CliRunner, *arguments: str) -> str:
    result: Result = operate.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_tenant_and_its_keys_are_made_listed_and_ended(operate: CliRunner) -> None:
    assert "up to date" in run(operate, "migrate")
    tenant = run(
        operate, "tenant", "create", "acme", "--limits", '{"requests_per_minute": 5}'
    ).strip()
    assert tenant.startswith("tnt_")
    secret = run(
        operate, "key", "create", "acme", "--role", "inference", "--label", "ci", "--days", "3"
    ).strip()
    assert re.fullmatch(r"rk-[\w-]{43}", secret)
    listed = run(operate, "key", "list", "acme")
    assert secret not in listed
    assert "inference\tvalid\tci" in listed
    rotated = run(
        operate, "key", "rotate", "acme", listed.split("\t")[0], "--overlap", "60"
    ).strip()
    assert rotated != secret
    narrow = run(
        operate,
        "key",
        "create",
        "acme",
        "--scopes",
        "usage,models",
        "--limits",
        '{"requests_per_minute": 1}',
    )
    assert len({secret, rotated, narrow.strip()}) == 3
    assert run(operate, "key", "create", "acme", "--role", "metrics").startswith("rk-")
    assert len(run(operate, "key", "list", "acme").splitlines()) == 4
    run(operate, "key", "revoke", "acme", listed.split("\t")[0])
    assert "revoked" in run(operate, "key", "list", "acme")
    run(operate, "tenant", "disable", "acme")
    assert f'acme\t{tenant}\tdisabled\t{{"requests_per_minute": 5}}' in run(
        operate, "tenant", "list"
    )
    run(operate, "tenant", "enable", tenant)
    run(operate, "tenant", "limit", "acme", "--limits", "{}")
    assert "enabled\t{}" in run(operate, "tenant", "list")
    assert run(operate, "usage").startswith("start\ttenant")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["tenant", "create", "Not A Name"], RequestInvalid), (["tenant", "disable", "nobody"], NotFound),
        (["tenant", "create", "x", "--limits", '{"speed": 1}'], RequestInvalid), (["key", "list", "nobody"], NotFound),
        (["key", "create", "nobody", "--role", "king"], RequestInvalid), (["usage", "--bucket", "year"], RequestInvalid),
        (["key", "rotate", "nobody", "key_0"], NotFound),
    ],
)  # fmt: skip
def test_a_mistake_gets_a_sentence(
    operate: CliRunner, arguments: list[str], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        operate.invoke(app, arguments, catch_exceptions=False)


def test_a_name_is_taken_once(operate: CliRunner) -> None:
    run(operate, "tenant", "create", "acme")
    with pytest.raises(Conflict):
        operate.invoke(app, ["tenant", "create", "acme"], catch_exceptions=False)


def test_what_the_command_line_changes_a_running_gateway_soon_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, cache_seconds=0.2) as (gateway, _):
        tenant = gateway.tenant("acme")
        assert tenant.http.get("/v1/models").status_code == 200
        monkeypatch.setenv("REFT_DATABASE", gateway.settings.database)
        run(CliRunner(), "tenant", "disable", "acme")
        wait_for(lambda: tenant.http.get("/v1/models").status_code == 401, 2)


@pytest.mark.parametrize(
    ("passed", "places"),
    [
        (["--max-num-seqs", "64"], "64"),
        (["--seed", "1", "--max_num_seqs=8"], "8"),
        (["--max-num-seqs", "4", "--max-num-seqs", "6"], "6"),
        ([], None),
        (["--max-num-seqs"], None),
        (["--max-num-seqs", "0"], None),
        (["--max-num-seqs", "-1"], None),
        (["--max-num-seqs", "many"], None),
        (["--max-num-seqs="], None),
    ],
)
def test_an_engine_gets_as_many_requests_as_it_works_on(
    passed: list[str], places: str | None
) -> None:
    assert _places(passed).get("REFT_IN_FLIGHT_PER_ENGINE") == places


def test_up_makes_private_what_an_earlier_version_left_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapters", "blobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    for name in ("reft.db", "reft.db-wal", "not-ours"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o644)  # whatever this process's umask is
    (tmp_path / "work").mkdir(mode=0o700)
    _make_private(tmp_path)
    assert "reft.db, reft.db-wal, adapters, blobs" in capsys.readouterr().err
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {
        "adapters": 0o700, "blobs": 0o700, "work": 0o700, "reft.db": 0o600, "reft.db-wal": 0o600, "not-ours": 0o644,
    }  # fmt: skip
    _make_private(tmp_path)
    assert not capsys.readouterr().err


def test_a_child_that_ends_is_started_again_until_it_is_stopped(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    child = SupervisedProcess(
        "child",
        ["/bin/sh", "-c", f"echo x >> {marks}; [ $(wc -l < {marks}) -ge 2 ] && sleep 60"],
        {},
    )

    async def watch() -> None:
        keeping = asyncio.create_task(child.keep())
        while not marks.exists() or len(marks.read_text().split()) < 2:
            await asyncio.sleep(0.05)
        await child.stop(patience=5)
        await asyncio.wait_for(keeping, 5)

    asyncio.run(asyncio.wait_for(watch(), 20))
    assert child.process is not None
    assert child.process.returncode is not None


_BINDS = """
import os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
open(sys.argv[2], "a").write(f"{os.getpid()} ")
time.sleep(60)
"""


def test_a_killed_child_that_left_its_socket_behind_can_bind_again(tmp_path: Path) -> None:
    path, marks = tmp_path / "engine.sock", tmp_path / "marks"
    child = SupervisedProcess(
        "child", [sys.executable, "-c", _BINDS, str(path), str(marks)], {}, path
    )

    async def bound(times: int) -> int:
        while not marks.exists() or len(marks.read_text().split()) < times:
            await asyncio.sleep(0.05)
        return int(marks.read_text().split()[-1])

    async def watch() -> None:
        keeping = asyncio.create_task(child.keep())
        first = await bound(1)
        # A signal to our group spares it, and the kernel gives it its share of a core beside the other children.
        assert os.getpgid(first) == first
        assert os.getsid(first) == os.getsid(0)
        os.kill(first, signal.SIGKILL)
        await bound(2)
        await child.stop(patience=5)
        await asyncio.wait_for(keeping, 5)

    asyncio.run(asyncio.wait_for(watch(), 30))


def test_a_second_ctrl_c_ends_processes_that_do_not_stop(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    stubborn = ["/bin/sh", "-c", f"trap '' TERM; echo x >> {marks}; while :; do sleep 0.1; done"]
    children = [SupervisedProcess(name, stubborn, {}) for name in ("engine", "gateway")]

    async def watch() -> None:
        keeping = [asyncio.create_task(child.keep()) for child in children]
        while not marks.exists() or len(marks.read_text().split()) < 2:
            await asyncio.sleep(0.05)
        again = asyncio.Event()
        ending = asyncio.create_task(_end(children[0], children[1:], again))
        await asyncio.sleep(0.3)
        assert not ending.done()
        again.set()
        await asyncio.wait_for(asyncio.gather(ending, *keeping), 5)

    asyncio.run(asyncio.wait_for(watch(), 20))


def test_a_start_that_fails_shows_the_end_of_the_engines_log(tmp_path: Path) -> None:
    up = [sys.executable, "-m", "reft_serve.cli.up", "--plain", "--data", str(tmp_path)]
    process = subprocess.Popen(
        [*up, "--port", "65535", "--adapter", f"birds={tmp_path / 'nowhere'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    shown = []
    try:
        for line in process.stderr:
            shown.append(line)
            if line.startswith("The whole log:"):
                process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
    words, log = "".join(shown), tmp_path / "logs" / "engine.log"
    end = log.read_text().splitlines()[-1]
    assert "--adapter birds: there is no directory at" in end
    assert "The engine ended with code 1. The end of its log:\n    " in words
    assert f"    {end}\nThe whole log: {log}. Starting the engine again in " in words
    assert re.search(r"^Stopped after \d s\.$", shown[-1])
