"""What an engine says of itself on its model card, beside vLLM's facts: what it runs, which adapters it takes. No torch."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reft_serve.adapters.manifest import BaseFacts, Limits

__all__ = ["CARD_KEY", "EngineCard", "read_card"]

CARD_KEY = "reft"


class EngineCard(BaseModel):
    """`max_lora_rank`: of the LoRA that an adapter may hold beside its interventions; 0 where none is served."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    base: BaseFacts
    limits: Limits
    max_lora_rank: Annotated[int, Field(ge=0)]


def read_card(card: object) -> EngineCard | None:
    """What a base model's card of `/v1/models` says; None where it says nothing, or nothing that is understood here."""
    if not isinstance(card, dict) or CARD_KEY not in card:
        return None
    try:
        return EngineCard.model_validate_json(json.dumps(card[CARD_KEY]))
    except ValidationError:
        return None
