"""The part of the plugin that runs in vLLM's engine core, beside the scheduler."""
