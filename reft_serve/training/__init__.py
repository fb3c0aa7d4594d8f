"""Making adapters: from a file of examples to a version that an engine serves."""
