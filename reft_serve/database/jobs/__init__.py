"""Fine-tuning jobs: their owners' requests, the workers' queue, and how runs end."""
