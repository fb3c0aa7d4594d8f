"""The process that compiles the grammars of structured outputs, away from the API server."""
