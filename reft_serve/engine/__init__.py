"""ReFT inside vLLM: the plugin that makes a ReFT directory servable wherever vLLM takes a LoRA directory.

The only package that imports vllm. `register` is the `vllm.general_plugins` entry point.
"""

from reft_serve.engine.plugin import register

__all__ = ["register"]
