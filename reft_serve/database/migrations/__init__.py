"""The schema: Alembic's migrations, run by `schema.migrate`, and all tables written to files and
back by `dump`.
"""
