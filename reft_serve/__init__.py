"""Serve many trained ReFT adapters over one shared base model."""

__version__ = "0.2.0"
