"""The command line that starts vLLM, and its entry points."""
