"""What the engine remembers of requests for the gateway: by the gateway's ids, of aborted and of finished ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from reft_serve.engine.front_end import usage

NAME = "0123456789abcdef" * 2


class _State(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]  # vLLM's has one too


def state(name: str, tokens: int, parent: Any = None, index: int = 0) -> Any:
    detokenizer = SimpleNamespace(num_output_tokens=lambda: tokens)
    return _State(
        external_req_id=name, request_id=name, parent_req=parent, request_index=index, prompt_len=10,
        num_cached_tokens=4, detokenizer=detokenizer,
    )  # fmt: skip


def test_an_aborted_request_is_noted_once_with_all_its_prompts_and_choices() -> None:
    states = {f"{k}": state(f"cmpl-req_{NAME}-{k // 2}", 5, object(), k % 2) for k in range(4)}
    processor = SimpleNamespace(request_states=states)
    abort = usage.wrap_abort_requests(lambda self, ids, internal: list(ids))
    abort(processor, ["0", "1", "2", "3"], internal=True)
    abort(processor, ["0"], internal=True)
    assert usage.usage_of(f"req_{NAME}") == {
        "prompt_tokens": 20,
        "cached_tokens": 8,
        "completion_tokens": 20,
    }
    assert usage.usage_of(f"req_{NAME[::-1]}") is None
    assert usage.usage_of("../x") is None


def test_requests_of_others_are_not_noted_and_the_oldest_are_forgotten() -> None:
    note = usage.wrap_update_stats_from_finished(lambda self, state, *args: None)
    note(None, state("cmpl-mine-0", 1), None, None)
    for k in range(usage.ENTRIES + 1):
        note(None, state(f"chatcmpl-req_{k:032x}", 1), None, None)
    assert usage.usage_of(f"req_{0:032x}") is None
    assert usage.usage_of(f"req_{usage.ENTRIES:032x}") == {
        "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 1,
    }  # fmt: skip
