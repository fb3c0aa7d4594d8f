"""The engine's model card: base model, limits and capabilities, in addition to vLLM's fields. No
torch.
"""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reft_serve.adapters.manifest import BaseFacts, EngineLimits

__all__ = ["CARD_KEY", "EngineCard", "read_card"]

CARD_KEY = "reft"


class EngineCard(BaseModel):
    """`max_lora_rank`: of the LoRA that an adapter may hold next to its interventions; 0 if none is
    served.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    base: BaseFacts
    limits: EngineLimits
    max_lora_rank: Annotated[int, Field(ge=0)]


def read_card(card: object) -> EngineCard | None:
    """Parse the base model's card of `/v1/models`; None without a card or if it is not
    understood.
    """
    if not isinstance(card, dict) or CARD_KEY not in card:
        return None
    try:
        return EngineCard.model_validate_json(json.dumps(card[CARD_KEY]))
    except ValidationError:
        return None
