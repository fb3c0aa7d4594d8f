"""OpenAPI links for Schemathesis's sequences: what one operation's answer has that another one takes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

__all__ = ["with_links"]

_Link = dict[str, Any]


def _link(
    operation: str, parameters: Mapping[str, str], body: Mapping[str, str | int] | None = None
) -> _Link:
    """A link to an operation, by its id; values are constants, or expressions like `$response.body#/id`."""
    made: _Link = {"operationId": operation, "parameters": dict(parameters)}
    return made if body is None else made | {"requestBody": dict(body)}


_ADAPTER = {"name": "$response.body#/adapter"}
_VERSION = _ADAPTER | {"version": "$response.body#/version"}
_ALIAS = {"name": "$request.path.name", "alias": "$request.path.alias"}
_MODEL = {"model": "$response.body#/model"}
_ASKED: dict[str, str | int] = {"model": "$response.body#/model"}
_TENANT = {"tenant": "$response.body#/id"}
_KEY = {"key": "$response.body#/id"}
#: By the id of the operation and the status of its answer.
_LINKS: dict[tuple[str, str], tuple[_Link, ...]] = {
    ("upload_v1_adapters_post", "201"): (
        _link("get_v1_adapters__name__get", _ADAPTER),
        _link("delete_v1_adapters__name__delete", _ADAPTER),
        _link("get_version_v1_adapters__name__versions__version__get", _VERSION),
        _link("delete_version_v1_adapters__name__versions__version__delete", _VERSION),
        _link("download_v1_adapters__name__versions__version__content_get", _VERSION),
        _link(
            "put_alias_v1_adapters__name__aliases__alias__put",
            _ADAPTER | {"alias": "production"},
            {"version": "{$response.body#/version}"},
        ),
        _link("get_model_v1_models__model__get", _MODEL),
        _link("delete_model_v1_models__model__delete", _MODEL),
        _link("completions_v1_completions_post", {}, _ASKED | {"prompt": "hello", "max_tokens": 2}),
        _link(
            "responses_v1_responses_post", {}, _ASKED | {"input": "hello", "max_output_tokens": 2}
        ),
        _link("embeddings_v1_embeddings_post", {}, _ASKED | {"input": "hello"}),
    ),
    ("put_alias_v1_adapters__name__aliases__alias__put", "200"): (
        _link("roll_back_v1_adapters__name__aliases__alias__rollback_post", _ALIAS),
        _link("delete_alias_v1_adapters__name__aliases__alias__delete", _ALIAS),
    ),
    ("create_tenant_v1_admin_tenants_post", "201"): (
        _link("get_tenant_v1_admin_tenants__tenant__get", _TENANT),
        _link("change_tenant_v1_admin_tenants__tenant__patch", _TENANT),
        _link("delete_tenant_v1_admin_tenants__tenant__delete", _TENANT),
        _link("create_key_v1_admin_tenants__tenant__keys_post", _TENANT),
    ),
    ("create_v1_keys_post", "201"): (
        _link("revoke_v1_keys__key__delete", _KEY),
        _link("rotate_v1_keys__key__rotate_post", _KEY),
    ),
}


def with_links(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with the links."""
    document = deepcopy(document)
    operations = {
        each["operationId"]: each for path in document["paths"].values() for each in path.values()
    }
    for (operation, status), links in _LINKS.items():
        operations[operation]["responses"][status]["links"] = {
            link["operationId"]: link for link in links
        }
    return document
