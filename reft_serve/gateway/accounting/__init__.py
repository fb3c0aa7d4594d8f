"""Usage of tenants, and its limits."""
