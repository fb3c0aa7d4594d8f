"""Adapters whose files vanish: no step may depend on a file, and one request's bad luck is its
own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.support.adapters.damage import write_good
from tests.support.engine.engines import running_engine, stats

PROMPT = {"prompt_token_ids": [1, *range(20, 40)]}


def test_requests_survive_files_that_vanish_and_engines_survive_requests_that_do_not(
    tmp_path: Path,
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = []
    for i in range(7):
        write_good(tmp_path / f"reft{i}", seed=i)
        adapters.append(LoRARequest(f"reft{i}", i + 1, str(tmp_path / f"reft{i}")))
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)

    with running_engine(
        "tiny-llama", {"LORA": "off"}, core_process=True, max_loras=1, max_cpu_loras=2
    ) as engine:

        def ask(*asked: Any) -> list[list[int]]:
            outputs = engine.generate(
                [PROMPT] * len(asked), params, lora_request=list(asked), use_tqdm=False
            )
            return [list(output.outputs[0].token_ids) for output in outputs]

        fresh = [ask(adapter)[0] for adapter in adapters[:4]]
        assert len({tuple(tokens) for tokens in fresh}) == 4
        # One slot and four adapters, each asked twice in turn, in one batch of waiting requests.
        assert ask(*adapters[:4], *adapters[:4]) == [*fresh, *fresh]

        shutil.rmtree(tmp_path / "reft3")
        evictions = stats(engine)["evictions"]
        assert ask(adapters[3], adapters[2], adapters[3]) == [fresh[3], fresh[2], fresh[3]]
        assert stats(engine)["evictions"] > evictions

        for adapter in adapters[4:]:  # other adapters' requests let go of it
            ask(adapter)
        assert _ending(engine, adapters[3], params) == "error"
        assert ask(adapters[0], None)[0] == fresh[0]


def _ending(engine: Any, adapter: Any, params: Any) -> str:
    (output,) = engine.generate([PROMPT], params, lora_request=adapter, use_tqdm=False)
    return str(output.outputs[0].finish_reason)
