"""The part of the plugin that runs in vLLM's engine core, next to the scheduler."""
