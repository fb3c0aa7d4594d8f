"""Adapters at rest: the manifest, the directory, import from and export to other formats.

`manifest` works without torch; `directory` and the converters need it.
"""
