"""The training worker and the jobs that it runs."""
