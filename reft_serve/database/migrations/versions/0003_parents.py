"""The version that a fine-tuning job continues from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns; a job of an earlier release has no parent."""
    op.add_column("jobs", sa.Column("parent_model", sa.String(length=255), nullable=True))
    op.add_column("jobs", sa.Column("parent_digest", sa.String(length=64), nullable=True))
