"""Fine-tuning jobs and their data files, as callers submit them."""
