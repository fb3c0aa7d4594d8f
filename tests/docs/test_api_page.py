"""The page of the gateway's API says of errors what the code does."""

from __future__ import annotations

import re

import httpx2
import openai
import pytest

from reft_serve import errors
from reft_serve.gateway.schemas import errors as answers
from tests.support.paths import ROOT

PAGE = (
    (ROOT / "docs" / "gateway-api.md")
    .read_text()
    .partition("<!-- errors -->")[2]
    .partition("\n\n")[0]
)
ROWS = [
    (m[1], int(m[2]), m[3])
    for m in re.finditer(r"^\| `(\w+)` \| (\d+) \| `(\w+)`", PAGE, re.MULTILINE)
]
CODES = {
    kind.code: answers.status_of(kind.__new__(kind))
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.ReftError)
}


@pytest.mark.parametrize(("code", "status", "exception"), ROWS)
def test_each_code_has_the_status_and_the_exception_that_the_page_says(
    code: str, status: int, exception: str
) -> None:
    framework = {"invalid_value": 400, "method_not_allowed": 405}
    assert (CODES | framework)[code] == status
    response = httpx2.Response(status, request=httpx2.Request("GET", "http://gateway"))
    client = openai.OpenAI(api_key="none", base_url="http://gateway")
    assert type(client._make_status_error("", body=None, response=response)).__name__ == exception


def test_every_failure_that_a_request_can_meet_is_on_the_page() -> None:
    # What only commands, engines and workers raise never becomes an answer.
    elsewhere = {
        "reft_error", "positions_invalid", "adapter_not_found", "adapter_exists", "adapter_unsupported", "lease_lost",
        "import_flag_missing", "adapter_changed", "base_model_invalid", "engine_unsupported", "job_limit",
    }  # fmt: skip
    assert {code for code, _, _ in ROWS} >= set(CODES) - elsewhere
