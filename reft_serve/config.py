"""Settings, each readable from a `REFT_*` environment variable. The only module that reads the
environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from reft_serve.errors import ServiceError

__all__ = [
    "EngineSettings",
    "GatewaySettings",
    "ServeSettings",
    "TenantLimits",
    "TrainerSettings",
    "child_environment",
    "compiler",
    "default_environment",
    "read_settings",
    "set_environment",
]

_S = TypeVar("_S", bound=BaseSettings)


class EngineSettings(BaseSettings):
    """Limits and features of an engine process. Read once, when the engine starts."""

    model_config = SettingsConfigDict(env_prefix="REFT_", frozen=True, extra="ignore")

    lora: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Serve LoRA adapters next to ReFT. auto: if the model supports it. off: a "
        "ReFT-only engine, which wraps no linear layer, allocates no LoRA buffer and "
        "keeps torch.compile on CPU.",
    )
    max_rank: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Largest rank of an intervention; default: vLLM's --max-lora-rank.",
    )
    max_interventions: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of interventions in one adapter; default: 2 per layer.",
    )
    components: frozenset[Literal["block", "mlp_output", "attention_output"]] = Field(
        default=frozenset({"block", "mlp_output", "attention_output"}),
        description="Components that adapters may edit, as a JSON list. Each one left out saves an "
        "operation per layer and step on CPU.",
    )
    max_adapter_bytes: int = Field(
        default=2**30, ge=1, description="Largest size of an adapter's tensor file, in bytes."
    )
    home: Path = Field(
        default=Path("~/.cache/reft-serve"),
        description="Directory for adapters that `serve` converts at start.",
    )


class ServeSettings(BaseSettings):
    """vLLM's environment as `reft-serve serve` needs it before it starts vLLM."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    reft_engine_key: SecretStr | None = Field(
        default=None,
        description="API key that the engine requires. Gateways send the same key "
        "(REFT_ENGINE_KEY).",
    )
    reft_engine_key_next: SecretStr | None = Field(
        default=None,
        description="Second key that the engine accepts. Use it to replace a key without refusing "
        "requests.",
    )
    vllm_api_key: SecretStr | None = Field(
        default=None,
        description="vLLM's own variable for an API key; the engine accepts this key as well.",
    )
    vllm_plugins: str | None = Field(
        default=None,
        description="vLLM plugins to load, comma-separated; default: all that are installed.",
    )
    vllm_allow_runtime_lora_updating: str | None = Field(
        default=None, description="1 or true: adapters, LoRA included, can be loaded over HTTP."
    )
    vllm_cpu_kvcache_space: str | None = Field(
        default=None, description="KV cache on a machine without a GPU, in GiB."
    )
    onednn_primitive_cache_capacity: str | None = Field(
        default=None,
        description="Number of kernels that oneDNN caches on a machine without a GPU, about 0.3 MB "
        "each. It needs one for each combination of layer shape and tokens per step. "
        "oneDNN's own default is 1,024.",
    )

    @property
    def engine_keys(self) -> tuple[str, ...]:
        """All keys that the engine accepts; empty if it requires none."""
        keys = (self.reft_engine_key, self.reft_engine_key_next, self.vllm_api_key)
        return tuple(
            dict.fromkeys(
                key.get_secret_value() for key in keys if key is not None and key.get_secret_value()
            )
        )


def _not_a_truth(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("it must be a whole number")
    return value


# Strings are taken, as the environment has nothing else.
_Count = Annotated[int, Field(ge=0, le=10**15), BeforeValidator(_not_a_truth)]
_AtLeastOne = Annotated[int, Field(ge=1, le=10**15), BeforeValidator(_not_a_truth)]


class TenantLimits(BaseModel):
    """Limits of one tenant or key; None sets no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: _AtLeastOne | None = Field(
        default=None,
        description="Inference requests per minute; within ten seconds, at most a sixth of them "
        "(but at least ten).",
    )
    tokens_per_minute: _AtLeastOne | None = Field(
        default=None, description="Prompt and completion tokens per minute."
    )
    concurrent_requests: _AtLeastOne | None = Field(
        default=None, description="Inference requests in progress at once."
    )
    management_requests_per_minute: _AtLeastOne | None = Field(
        default=None,
        description="Requests per minute to all other routes: lists, uploads, jobs, keys. Admin "
        "keys are exempt.",
    )
    adapters: _Count | None = Field(default=None, description="Adapters that the tenant owns.")
    files: _Count | None = Field(default=None, description="Files that the tenant stores.")
    keys: _AtLeastOne | None = Field(
        default=None, description="API keys that are neither revoked nor expired."
    )
    event_streams: _AtLeastOne | None = Field(
        default=None, description="Streams of job events that are open at once."
    )
    storage_bytes: _Count | None = Field(
        default=None, description="Total size of all adapter versions and files, in bytes."
    )
    jobs: _Count | None = Field(
        default=None, description="Fine-tuning jobs that are queued, running or paused."
    )
    running_jobs: _AtLeastOne | None = Field(
        default=None, description="Fine-tuning jobs that run at once."
    )
    job_examples: _AtLeastOne | None = Field(
        default=None, description="Examples in a fine-tuning job; each epoch counts them again."
    )
    job_tokens: _AtLeastOne | None = Field(
        default=None,
        description="Prompt and completion tokens in a fine-tuning job, over all epochs.",
    )
    job_hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Training time of a fine-tuning job in hours, over all of its attempts.",
    )
    choices: _AtLeastOne | None = Field(default=None, description="Largest `n` in a request.")
    output_tokens: _AtLeastOne | None = Field(
        default=None, description="Largest `max_tokens` in a request."
    )

    def merged(self, own: Mapping[str, Any]) -> TenantLimits:
        """These limits, overridden by the tenant's `own`."""
        if not own:
            return self
        return self.model_copy(
            update={name: own[name] for name in own if name in TenantLimits.model_fields}
        )


class _Installation(BaseSettings):
    """Settings that gateways and workers of one installation must agree on."""

    # A limit in the environment leaves the defaults of the others.
    model_config = SettingsConfigDict(
        env_prefix="REFT_",
        env_nested_delimiter="__",
        frozen=True,
        extra="ignore",
        nested_model_default_partial_update=True,
    )

    database: str = Field(
        default="sqlite:///~/.local/share/reft-serve/reft.db",
        description="Database URL: sqlite:///PATH or postgresql://...",
    )
    store: Path = Field(
        default=Path("~/.local/share/reft-serve/adapters"),
        description="Directory of published adapters. Gateways, workers and engines must see it "
        "under the same path.",
    )
    blobs: str | None = Field(
        default=None,
        description="Store for uploaded files, results and checkpoints: a directory, or "
        "s3://BUCKET/PREFIX (credentials and endpoint in the usual AWS_* variables). "
        "Default: the directory `blobs` next to the store.",
    )
    base_model: str = Field(
        default="base", max_length=100, description="Public name of the base model."
    )
    migrate: bool = Field(
        default=True, description="Migrate the database to this version's schema at start."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Minimum log level."
    )
    train_attempts: int = Field(
        default=3,
        ge=1,
        description="Attempts of a job that may end without progress. The job fails after them, "
        "whether a gateway or a worker notices.",
    )

    limits: TenantLimits = Field(
        default=TenantLimits(
            choices=16,
            job_examples=5_000_000,
            job_tokens=2_000_000_000,
            job_hours=72.0,
            concurrent_requests=256,
            adapters=10_000,
            files=10_000,
            storage_bytes=100 << 30,
            jobs=1000,
            keys=1000,
            event_streams=100,
            management_requests_per_minute=1200,
        ),
        description="Limits for tenants that have no limits set, for instance "
        "REFT_LIMITS__REQUESTS_PER_MINUTE. Set the same values for workers.",
    )

    @property
    def blobs_url(self) -> str:
        """Directory or URL of the file store."""
        return self.blobs or str(self.store.expanduser().parent / "blobs")


class TrainerSettings(_Installation):
    """Settings of a training worker. Read once, when it starts."""

    model: str = Field(
        description="The base model: a local directory, or a name on the Hugging Face hub."
    )
    worker_name: str = Field(
        default_factory=socket.gethostname,
        max_length=120,
        description="Name of the worker in lists and logs.",
    )
    work: Path = Field(
        default=Path("~/.local/share/reft-serve/work"),
        description="Directory for runs in progress; choose a fast local disk.",
    )
    train_jobs: int | None = Field(
        default=None, ge=1, description="Jobs at once; default: one per GPU, or one per four cores."
    )
    train_memory_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Memory for jobs, per GPU or of the machine, in bytes; default: four fifths "
        "of it.",
    )
    train_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of a job that runs on CPU; default: its share of the cores.",
    )
    train_running_per_tenant: int | None = Field(
        default=None,
        ge=1,
        description="Running jobs per tenant, if the tenant has no `running_jobs` limit.",
    )
    train_turn_seconds: float = Field(
        default=600.0,
        ge=0,
        description="Time that a job may run while a tenant with fewer running jobs is waiting. "
        "After it, the job stores a checkpoint and returns to the queue.",
    )
    lease_seconds: float = Field(
        default=30.0,
        ge=1,
        description="Lease time: a job whose worker sends no heartbeat for this long goes to "
        "another worker.",
    )
    poll_seconds: float = Field(
        default=1.0, gt=0, description="Interval between polls of the queue."
    )
    sweep_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Interval of the clean-up after crashed processes; anything younger is kept.",
    )
    patience_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Time that a job retries a file store that does not respond before it returns "
        "to the queue.",
    )
    drain_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Time for jobs to finish their step and store a checkpoint at shutdown.",
    )

    @property
    def running_per_tenant(self) -> int | None:
        """Running jobs per tenant, if the tenant has no `running_jobs` limit."""
        return self.train_running_per_tenant or self.limits.running_jobs


# Arguments of Transformers' apply_chat_template, which an engine would pass on.
_RENDERING = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "conversation",
        "continue_final_message",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class GatewaySettings(_Installation):
    """Settings of a gateway process. Read once, when it starts."""

    engines: str = Field(
        default="http://127.0.0.1:8001",
        description="Engine URLs, comma-separated: http://HOST:PORT, unix:/PATH, or "
        "dns+http://NAME:PORT for every address of NAME, resolved again at each probe.",
    )
    engine_key: SecretStr | None = Field(
        default=None, description="API key that the engines require."
    )
    gateway_name: str = Field(
        default_factory=socket.gethostname,
        max_length=128,
        description="Name of this gateway: unique among running gateways, and the same after a "
        "restart so that it can clean up after a crash.",
    )
    limits_storage: str = Field(
        default="async+memory://",
        description="Counters of rate limits; use async+redis://... with several gateways.",
    )
    max_request_bytes: int = Field(
        default=4 << 20, ge=1024, description="Largest request body, in bytes."
    )
    max_upload_bytes: int = Field(
        default=1 << 30, ge=1024, description="Largest upload of an adapter or a file, in bytes."
    )
    max_file_bytes: int = Field(
        default=512 << 20, ge=1024, description="Largest data file, in bytes."
    )
    max_header_bytes: int = Field(
        default=32 << 10,
        ge=1024,
        description="Largest request line and headers of a request, in bytes.",
    )
    max_json_values: int = Field(
        default=1 << 18,
        ge=64,
        description="Largest number of JSON values (numbers, strings, arrays, objects) in the "
        "body of an inference request.",
    )
    max_memory_bytes: int = Field(
        default=256 << 20,
        ge=1 << 20,
        description="Memory for the bodies of all requests and for responses that are not "
        "streamed, in bytes; one tenant may use half of it.",
    )
    max_spooled_bytes: int = Field(
        default=2 << 30,
        ge=1024,
        description="Disk space for all uploads until they are checked, in bytes; one tenant may "
        "use half of it.",
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        description="Client connections at once; at most half of the process's limit of open "
        "files.",
    )
    connections_per_address: int = Field(
        default=1024,
        ge=1,
        description="Client connections at once from one address. Behind a proxy every connection "
        "has the proxy's address: set it to the value of REFT_MAX_CONNECTIONS there.",
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Timeout until the headers of a connection's next request are complete.",
    )
    body_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Timeout of a request body, plus a second for each 32 KiB; also the longest "
        "pause within it.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description="Origins whose web pages may call the API, as a JSON list such as "
        '["https://app.example.com"]; default: none.',
    )
    file_seconds: int | None = Field(
        default=None,
        ge=1,
        description="Lifetime of files that are uploaded without an expiry; default: no expiry.",
    )
    upkeep_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Interval of the maintenance that removes expired files and requeues jobs of "
        "lost workers.",
    )
    webhook_retry_seconds: float = Field(
        default=5.0,
        gt=0,
        description="Delay before the first retry of a webhook delivery; each further delay is six "
        "times as long.",
    )
    webhooks_to_private_addresses: bool = Field(
        default=False,
        description="Allow webhooks to private and loopback addresses, and over plain HTTP.",
    )
    in_flight_per_engine: int = Field(
        default=256, ge=1, description="Requests sent to one engine at once."
    )
    queue_seconds: float = Field(
        default=30.0, gt=0, description="Longest time that a request waits for an engine."
    )
    request_seconds: float = Field(default=600.0, gt=0, description="Timeout of a whole request.")
    probe_seconds: float = Field(
        default=2.0, gt=0, description="Interval of the health checks of each engine."
    )
    cache_seconds: float = Field(
        default=1.0,
        ge=0,
        description="Cache time of keys and aliases; changes made by another gateway show after "
        "this.",
    )
    notice_seconds: float = Field(
        default=0.0,
        ge=0,
        description='After SIGTERM, time to report "not ready" while still serving. Set it longer '
        "than the load balancer's check interval.",
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="Time for requests in progress to finish at shutdown."
    )
    named_labels: int = Field(
        default=100,
        ge=0,
        description="Number of tenants and adapters that get their own metric label; the rest are "
        "labelled `other`.",
    )
    otlp_endpoint: str | None = Field(
        default=None, description="OTLP endpoint for traces, for instance http://HOST:4318."
    )

    max_strength: float = Field(
        default=100.0,
        ge=0,
        le=100,
        description="Largest absolute value of `reft_strength` in a request.",
    )
    chat_template_kwargs: str = Field(
        default="enable_thinking,thinking",
        description="Chat template arguments that a request may set in `chat_template_kwargs`, "
        "comma-separated.",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _harmless(cls, names: str) -> str:
        refused = {name.strip() for name in names.split(",")} & _RENDERING
        if refused:
            raise ValueError(
                f"{sorted(refused)[0]} changes how a prompt is rendered, so requests may not set it"
            )
        return names

    @property
    def template_arguments(self) -> tuple[str, ...]:
        """`chat_template_kwargs` as a tuple."""
        return tuple(name.strip() for name in self.chat_template_kwargs.split(",") if name.strip())

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """`engines` as a tuple, without trailing slashes."""
        return tuple(url.strip().rstrip("/") for url in self.engines.split(",") if url.strip())


def read_settings(kind: type[_S]) -> _S:
    """Read one class of settings from the environment.

    Raises:
        ServiceError: a value is invalid; the message names the variable, but not the value, which
            may be a secret.
    """
    prefix = kind.model_config.get("env_prefix", "")
    try:
        return kind()
    except ValidationError as exc:
        wrong = "; ".join(
            f"{(prefix + '__'.join(map(str, e['loc']))).upper()}: {e['msg']}" for e in exc.errors()
        )
        raise ServiceError(f"invalid setting in the environment: {wrong}") from exc
    except SettingsError as exc:
        raise ServiceError(
            f"invalid setting in the environment: {exc}; write a list as JSON"
        ) from exc


def compiler() -> str:
    """The C++ compiler that torch uses."""
    return os.environ.get("CXX", "g++")


def set_environment(changes: Mapping[str, str]) -> None:
    """Set variables of this process's environment, for libraries that read it."""
    os.environ.update(changes)


def default_environment(defaults: Mapping[str, str]) -> None:
    """As `set_environment`, for variables that are not set."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment updated with `changes`, for a child process or exec."""
    return {**os.environ, **changes}
