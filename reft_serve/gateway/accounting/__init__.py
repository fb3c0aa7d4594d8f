"""What tenants use, and the limits on it."""
