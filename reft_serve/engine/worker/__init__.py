"""The part of the plugin that runs in vLLM's workers, beside the model."""
