"""The earlier name of `reft_serve.testing`."""

from __future__ import annotations

from reft_serve.testing import FakeEngine

__all__ = ["FakeEngine"]
