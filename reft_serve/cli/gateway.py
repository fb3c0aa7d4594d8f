"""`reft-serve gateway`: the HTTP gateway as a process."""

from __future__ import annotations

import os
from typing import Annotated

import typer

__all__ = ["gateway"]

_Host = Annotated[str, typer.Option(help="Address to listen on.")]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")]


def gateway(host: _Host = "127.0.0.1", port: _Port = 8080) -> None:
    """Serve the OpenAI-compatible API in front of the engines in REFT_ENGINES. Needs neither torch
    nor vLLM.
    """
    from reft_serve.config import GatewaySettings, read_settings
    from reft_serve.gateway.app import create_app
    from reft_serve.gateway.http.server import serve
    from reft_serve.observability import configure_logging

    os.umask(0o077)  # what it writes holds tenants' data
    settings = read_settings(GatewaySettings)
    configure_logging(settings.log_level)
    if not serve(create_app(settings), host, port, settings):
        raise typer.Exit(3)


if __name__ == "__main__":
    typer.run(gateway)
