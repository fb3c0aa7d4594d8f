"""Every change that can be asked for is in the audit log, with who asked for it."""

from __future__ import annotations

import secrets
from typing import Any

from tests.support.gateway.harness import Gateway, Tenant, adapter_files, operations
from tests.support.gateway.uploads import jsonl

# What changes nothing that outlives the request.
UNRECORDED = {
    ("post", f"/v1/{name}")
    for name in (
        "completions", "chat/completions", "responses", "embeddings", "classify", "webhook_endpoints/{webhook}/test",
    )
}  # fmt: skip


def test_every_change_is_recorded_with_its_key_its_tenant_and_its_request(gateway: Gateway) -> None:
    admin, name = gateway.admin, f"t{secrets.token_hex(4)}"
    done: set[tuple[str, str]] = set()

    def change(
        client: Any, key: str, action: str, method: str, template: str, path: str, **body: Any
    ) -> Any:
        answer = client.request(method, path, **body)
        assert answer.status_code in (200, 201), (path, answer.text)
        found = admin.get("/v1/audit?all_tenants=true&limit=2").json()["data"]
        mine = [entry for entry in found if entry["request_id"] == answer.headers["x-request-id"]]
        assert [entry["action"] for entry in mine] == [action], template
        assert mine[0]["key_id"] == key
        assert "rk-" not in str(mine[0])
        done.add((method.lower(), template))
        return answer.json() | {"tenant_of_entry": mine[0]["tenant_id"]}

    root = admin.get("/v1/keys").json()["data"][0]["id"]
    made = change(
        admin,
        root,
        "tenant.create",
        "POST",
        "/v1/admin/tenants",
        "/v1/admin/tenants",
        json={"name": name},
    )
    assert made["tenant_of_entry"] == made["id"]
    url, of = f"/v1/admin/tenants/{name}", "/v1/admin/tenants/{tenant}"
    change(admin, root, "tenant.change", "PATCH", of, url, json={"limits": {"adapters": 9}})
    key = change(
        admin, root, "key.create", "POST", f"{of}/keys", f"{url}/keys", json={"role": "owner"}
    )
    tenant = Tenant(gateway, made["id"], name, key["secret"])
    guest = gateway.tenant(f"g{secrets.token_hex(4)}")

    def own(action: str, method: str, template: str, path: str, **body: Any) -> Any:
        found = change(tenant.http, key["id"], action, method, template, path, **body)
        assert found["tenant_of_entry"] == tenant.id
        return found

    spare = own("key.create", "POST", "/v1/keys", "/v1/keys", json={"role": "inference"})["id"]
    spare = own("key.rotate", "POST", "/v1/keys/{key}/rotate", f"/v1/keys/{spare}/rotate")["id"]
    own("key.revoke", "DELETE", "/v1/keys/{key}", f"/v1/keys/{spare}")
    for seed in (201, 202, 203):
        parts = [("files", item) for item in adapter_files(seed).items()]
        own(
            "version.create",
            "POST",
            "/v1/adapters",
            "/v1/adapters",
            data={"name": "birds"},
            files=parts,
        )
    alias, birds = "/v1/adapters/{name}/aliases/{alias}", "/v1/adapters/birds"
    for number in ("1", "2"):
        own("alias.set", "PUT", alias, f"{birds}/aliases/production", json={"version": number})
    own("alias.rollback", "POST", f"{alias}/rollback", f"{birds}/aliases/production/rollback")
    own("alias.delete", "DELETE", alias, f"{birds}/aliases/production")
    share = "/v1/adapters/{name}/shares/{tenant}"
    own("adapter.share", "PUT", share, f"{birds}/shares/{guest.id}")
    own("adapter.unshare", "DELETE", share, f"{birds}/shares/{guest.id}")
    model = tenant.http.get(f"{birds}/versions/3").json()["model"]
    url, of = (
        f"/v1/fine_tuning/checkpoints/{each}/permissions" for each in (model, "{checkpoint}")
    )
    given = own("permission.create", "POST", of, url, json={"project_ids": [guest.id]})["data"][0][
        "id"
    ]
    own("permission.delete", "DELETE", f"{of}/{{permission}}", f"{url}/{given}")
    own("version.delete", "DELETE", "/v1/adapters/{name}/versions/{version}", f"{birds}/versions/3")
    own("version.delete", "DELETE", "/v1/models/{model}", "/v1/models/birds@2")
    own("adapter.delete", "DELETE", "/v1/adapters/{name}", birds)
    data = own(
        "file.create",
        "POST",
        "/v1/files",
        "/v1/files",
        data={"purpose": "fine-tune"},
        files={"file": ("x.jsonl", jsonl())},
    )["id"]
    asked = {"model": "base", "training_file": data}
    mine, other = (
        own("job.create", "POST", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs", json=asked)["id"]
        for _ in "12"
    )
    for verb in ("pause", "resume", "cancel"):
        own(
            f"job.{verb}",
            "POST",
            f"/v1/fine_tuning/jobs/{{job}}/{verb}",
            f"/v1/fine_tuning/jobs/{mine}/{verb}",
        )
    path = f"/v1/admin/jobs/{other}/cancel"
    assert (
        change(admin, root, "job.cancel", "POST", "/v1/admin/jobs/{job}/{what}", path)[
            "tenant_of_entry"
        ]
        == tenant.id
    )
    own("file.delete", "DELETE", "/v1/files/{file}", f"/v1/files/{data}")
    hook = {
        "name": "x",
        "url": "https://93.184.215.14/x",
        "event_types": ["fine_tuning.job.failed"],
    }  # never called
    url, of = "/v1/webhook_endpoints", "/v1/webhook_endpoints/{webhook}"
    made = own("webhook.create", "POST", url, url, json=hook)["id"]
    own("webhook.change", "POST", of, f"{url}/{made}", json={"name": "y"})
    own("webhook.rotate", "POST", f"{of}/rotate_secret", f"{url}/{made}/rotate_secret")
    own("webhook.delete", "DELETE", of, f"{url}/{made}")
    for verb in ("drain", "resume"):
        path = f"/v1/admin/engines/engine-0/{verb}"
        change(admin, root, f"engine.{verb}", "POST", path.replace("engine-0", "{engine}"), path)
    change(
        admin,
        root,
        "tenant.delete",
        "DELETE",
        "/v1/admin/tenants/{tenant}",
        f"/v1/admin/tenants/{name}",
    )
    changing = {(method, path) for method, path in operations(gateway) if method != "get"}
    assert done == changing - UNRECORDED
