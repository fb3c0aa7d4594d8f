"""What every test process needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("tests.support")

torch.set_num_threads(1)


# Files of these folders take longest, as they start engines and servers: they run first, so that no process is left alone
# with one of them at the end of a run.
_LONG = ("engine", "deploy", "release", "training", "demo", "gateway")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = [*_LONG, ""]

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return folders.index(folder if folder in _LONG else "")

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _frozen_modules() -> None:
    """Garbage collections pass over what earlier modules imported: of vLLM they take a second, which
    an event loop stands still.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    from tests.support.postgres import postgres_server

    with postgres_server() as url:
        yield url
