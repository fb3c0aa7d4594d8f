"""A check of a tenant's upload, in its own process with limits on its memory and time.

The process reads the file as its standard input and answers with one JSON object. It ends with its
caller, at its limits, and with its gateway, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from reft_serve import errors
from reft_serve.parent import end_with_parent

__all__ = [
    "CHECK_MEMORY_BYTES",
    "CHECK_SECONDS",
    "CHECK_SECONDS_PER_MIB",
    "Check",
    "check_in_subprocess",
]

Check = Literal["data file", "archive", "adapter"]
# Address space beyond what the process has when the check begins.
CHECK_MEMORY_BYTES = 384 << 20
CHECK_SECONDS = 60
CHECK_SECONDS_PER_MIB = 1
_MAX_ANSWER = 4 << 20
_NICE = 10
_RETRY_SECONDS = 30.0


async def check_in_subprocess(
    check: Check, arguments: Mapping[str, Any], descriptor: int | None, size: int
) -> dict[str, Any]:
    """Result of the check; cancelling kills the process before this returns.

    Args:
        arguments: of the function in CHECKS of this name, as JSON.
        descriptor: of the file to read from its beginning, and left there; None for no file.
        size: bytes to check; the time limit grows with them.

    Raises:
        DataInvalid, AdapterInvalid, RequestInvalid, RequestTooLarge, StoreUnusable: as the check
            raises them, and RequestInvalid if it exceeds its memory or its processor time.
        Overloaded: it did not get that processor time for long.
    """
    seconds = CHECK_SECONDS + CHECK_SECONDS_PER_MIB * (size >> 20)
    job = json.dumps(
        {"check": check, "arguments": dict(arguments), "parent": os.getpid(), "seconds": seconds}
    )
    if descriptor is not None:
        os.lseek(descriptor, 0, os.SEEK_SET)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "reft_serve.gateway.uploads.subprocess_check",
        job,
        stdin=asyncio.subprocess.DEVNULL if descriptor is None else descriptor,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(4 * seconds):
            answer = await _answer(process)
    except TimeoutError as exc:
        raise errors.Overloaded(
            "the check of the upload took too long; upload it again", _RETRY_SECONDS
        ) from exc
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if descriptor is not None:
            # it is shared, and a file object here believes it unmoved
            os.lseek(descriptor, 0, os.SEEK_SET)
    return _result(answer, process.returncode, seconds)


async def _answer(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    answer = bytearray()
    while len(answer) <= _MAX_ANSWER and (chunk := await process.stdout.read(1 << 16)):
        answer += chunk
    await process.wait()
    return bytes(answer)


def _result(answer: bytes, code: int | None, seconds: int) -> dict[str, Any]:
    if code == -signal.SIGXCPU:
        raise errors.RequestInvalid(
            f"checking the upload takes more than {seconds} seconds of processor time"
        )
    if code != 0:
        raise errors.ServiceError(
            "the check of the upload was killed before it finished; upload it again"
        )
    report: dict[str, Any] = json.loads(answer)
    if "error" in report:
        kind: type[errors.ReftError] = getattr(errors, report["error"])
        raise kind(*report["arguments"])
    return report


def _check_data_file(where: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    from reft_serve.datafiles.formats import check_rows
    from reft_serve.datafiles.lines import FileLimits

    _limit_memory()
    format_, rows = check_rows(sys.stdin.buffer, where, FileLimits(**limits))
    return {"format": format_, "rows": rows}


def _check_archive(name: str, into: str, max_bytes: int, where: str) -> dict[str, Any]:
    from reft_serve.adapters.archives import unpack_archive

    _limit_memory()
    size = unpack_archive(sys.stdin.buffer, name, Path(into), max_bytes)
    return {"size": size} | _check_adapter(into, where)


def _check_adapter(path: str, where: str) -> dict[str, Any]:
    from reft_serve.adapters.structure import check_structure

    _limit_memory()
    manifest = check_structure(Path(path), where)
    return {"base_model": manifest.base_model.name, "facts": manifest.summary()}


_CHECKS: Mapping[Check, Callable[..., dict[str, Any]]] = {
    "data file": _check_data_file,
    "archive": _check_archive,
    "adapter": _check_adapter,
}


def _limit_memory() -> None:
    pages = (
        int(Path("/proc/self/statm").read_text().split()[0])
        if Path("/proc/self/statm").exists()
        else 1 << 16
    )
    most = pages * resource.getpagesize() + CHECK_MEMORY_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(
            resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )


def _end_with(parent: int) -> None:
    """Have the system end this process when the gateway ends."""
    end_with_parent()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _report(job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _CHECKS[job["check"]](**job["arguments"])
    except (errors.DataInvalid, errors.AdapterInvalid) as exc:
        return {"error": type(exc).__name__, "arguments": [exc.where, list(exc.faults)]}
    except errors.RequestInvalid as exc:
        return {"error": "RequestInvalid", "arguments": [str(exc), exc.param]}
    except (errors.RequestTooLarge, errors.StoreUnusable) as exc:
        return {"error": type(exc).__name__, "arguments": [str(exc)]}
    except MemoryError:
        return {
            "error": "RequestInvalid",
            "arguments": ["checking the upload takes too much memory"],
        }


def _main(job: Mapping[str, Any]) -> None:
    _end_with(job["parent"])
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(json.dumps(_report(job)))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
