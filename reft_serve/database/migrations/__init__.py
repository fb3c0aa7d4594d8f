"""Alembic's migrations, shipped with the package: `reft_serve.database.connection.migrate` runs
them.
"""
