"""The part of the plugin that runs in vLLM's API server."""
