"""An S3 server on loopback, for as long as a test needs one.

It has a process of its own: vLLM looks at everything that its process has imported, and Flask, which moto serves with,
lets nobody look at its proxies.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_bucket() -> Iterator[str]:
    """The URL of a place in a new bucket; what the AWS_* variables must say is set for this process."""
    # It ends when its standard input does, however this process ends.
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (
                ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"), ("AWS_ACCESS_KEY_ID", "test"),
                ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_EC2_METADATA_DISABLED", "true"),
            ):  # fmt: skip
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket="reft")
            yield "s3://reft/some/prefix"
