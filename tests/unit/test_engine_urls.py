"""The URL of an engine is logged without its password."""

from __future__ import annotations

import pytest

from reft_serve.errors import ServiceError
from reft_serve.gateway.engines.discovery import Discovery
from reft_serve.gateway.engines.urls import without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:hidden@127.0.0.1:8001", "http://127.0.0.1:8001"),
        ("http://user:hid//den@127.0.0.1:8001", "http://127.0.0.1:8001"),
        ("http://user:hid@den@127.0.0.1:8001", "http://127.0.0.1:8001"),
        ("dns+http://:hidden@engines:8001", "dns+http://engines:8001"),
        ("user:hidden@127.0.0.1", "127.0.0.1"),
        ("http://127.0.0.1:8001", "http://127.0.0.1:8001"),
        ("unix:/run/engine@1.sock", "unix:/run/engine@1.sock"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_url_that_names_no_port_is_refused_without_its_password() -> None:
    with pytest.raises(ServiceError, match=r"'dns\+http://engines' is not") as refused:
        Discovery(["dns+http://user:hidden@engines"], None)
    assert "hidden" not in str(refused.value)
