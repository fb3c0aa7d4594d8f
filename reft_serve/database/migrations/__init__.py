"""Alembic's migrations, shipped with the package: `schema.migrate` runs them."""
