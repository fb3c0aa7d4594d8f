"""URLs of engines, as the settings name them."""

from __future__ import annotations

__all__ = ["without_password"]


def without_password(url: str) -> str:
    """The URL for logs and messages, without its user and password; it need not be a valid one."""
    if url.startswith("unix:"):
        return url
    head, slashes, rest = url.partition("//") if "//" in url else ("", "", url)
    return head + slashes + rest.rpartition("@")[2]
