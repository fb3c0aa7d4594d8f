"""Events of jobs: streams for callers, webhooks for their servers."""
