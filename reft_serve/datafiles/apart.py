"""A data file checked in a process of its own: a large one takes a core for a while, and would hold up whatever shares this
process's interpreter. No torch.

The process reads the file as its standard input and answers with one JSON object: format and rows, or the faults.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict

from reft_serve.datafiles.formats import Format, check_rows
from reft_serve.datafiles.lines import Limits
from reft_serve.errors import DataInvalid, ServiceError

__all__ = ["check_apart"]

_NICE = 10


async def check_apart(descriptor: int, where: str, limits: Limits) -> tuple[Format, int]:
    """What `check_rows` finds.

    Args:
        descriptor: of the open file, which is read from its beginning and is there again after.
        where: the file's name, for the message.
        limits: what it may hold.

    Raises:
        DataInvalid: with every fault of the file.
        ServiceError: the process was ended.
    """
    os.lseek(descriptor, 0, os.SEEK_SET)
    command = [sys.executable, "-m", "reft_serve.datafiles.apart", where, json.dumps(asdict(limits))]
    process = await asyncio.create_subprocess_exec(*command, stdin=descriptor, stdout=asyncio.subprocess.PIPE)
    try:
        told, _ = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        os.lseek(descriptor, 0, os.SEEK_SET)  # it is shared, and a file object here believes it unmoved
    if process.returncode != 0:
        raise ServiceError("the check of a data file was ended before it was through; upload the file again")
    found = json.loads(told)
    if "faults" in found:
        raise DataInvalid(where, found["faults"])
    return found["format"], found["rows"]


def _main(where: str, limits: str) -> None:
    os.nice(_NICE)
    try:
        format_, rows = check_rows(sys.stdin.buffer, where, Limits(**json.loads(limits)))
    except DataInvalid as exc:
        found: dict[str, object] = {"faults": exc.faults}
    else:
        found = {"format": format_, "rows": rows}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
