"""The saves of pyreft in tests/golden, each with the flags that an import of it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.importers.common import ImportFlags
from reft_serve.adapters.manifest import BaseFacts
from tests.support.paths import GOLDEN

LLAMA = GOLDEN / "models" / "tiny-llama"
_PHASES = {"all": "all", "decode": "generated"}


@dataclass(frozen=True)
class Save:
    name: str
    path: Path
    base: BaseFacts
    flags: ImportFlags
    vectors: Path

    def parameters(self) -> list[dict[str, Tensor]]:
        """The tensors of each intervention, as real pyreft computes them."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(self.vectors).items():
            if name.startswith("param/"):
                _, k, letter = name.split("/")
                found.setdefault(int(k), {})[letter] = tensor
        return [found[k] for k in sorted(found)]


def _save(case: Mapping[str, str]) -> Save:
    facts = json.loads((GOLDEN / f"{case['vectors']}.json").read_text())
    rule = facts["positions"] or {"spec": "all"}
    flags = ImportFlags(
        positions=rule["spec"],
        untied=not rule.get("share_weights", True) and "+" in rule["spec"],
        last_offset=rule.get("last_offset", 0),
        activation=facts.get("not_saved_by_pyreft", {}).get("act_fn"),
        no_bias="nobias" in case["case"],
        phase=_PHASES.get(case["phase"], "prompt"),
        kind=case["type"] if case["case"].startswith("trained_ckpt") else None,
        lora_alpha=facts.get("lora", {}).get("lora_alpha"),
    )
    path, vectors = GOLDEN / case["adapter"], GOLDEN / f"{case['vectors']}.safetensors"
    return Save(
        f"{case['model']}-{case['case']}",
        path,
        read_base_model(GOLDEN / facts["model"]),
        flags,
        vectors,
    )


_REFUSED = (
    *(
        "mlp_input",
        "attention_input",
        "attention_value_output",
        "mlp_activation",
        "query_output",
        "value_output",
    ),
    *("path_norm", "cls", "subloreft"),
)
SAVES = [_save(case) for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]]
IMPORTABLE = [
    save for save in SAVES if not save.name.endswith(_REFUSED) and "subloreft" not in save.name
]


def named(name: str) -> Save:
    """The save of a case of tiny-llama."""
    return next(save for save in SAVES if save.name == f"tiny-llama-{name}")
