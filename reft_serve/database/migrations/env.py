"""Run by Alembic: apply the steps on the connection that `schema.migrate` gives."""

from __future__ import annotations

from alembic import context

from reft_serve.database.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
