"""Adapters at rest: the manifest, the directory, import from and export to other formats.

`manifest`, `base_model`, `components` and `files` work without torch; `directory` and the
converters need it.
"""
