"""ReFT inside vLLM: the plugin that makes a ReFT directory servable wherever vLLM takes a LoRA
directory.

The only package that imports vllm. `register` is the `vllm.general_plugins` entry point.
"""

__all__ = ["register"]


def register() -> None:
    """Make this process's vLLM serve ReFT adapters; see `plugin.register`."""
    # Not at the top: `serve` decides everything before the many seconds that importing vLLM takes.
    from reft_serve.engine import plugin

    plugin.register()
