"""The part of the plugin that runs in vLLM's workers, next to the model."""
