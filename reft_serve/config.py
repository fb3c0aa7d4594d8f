"""Settings, each readable from a `REFT_*` environment variable. The only module that reads the environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, field_validator
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
    "read_settings",
    "set_environment",
]

_S = TypeVar("_S", bound=BaseSettings)


class EngineSettings(BaseSettings):
    """What an engine process may hold. Read once, when the engine starts."""

    model_config = SettingsConfigDict(env_prefix="REFT_", frozen=True, extra="ignore")

    lora: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="LoRA beside ReFT. auto: on where the model supports it. off: a ReFT-only engine, which wraps no "
        "linear layer, allocates no LoRA buffer and keeps torch.compile on CPU.",
    )
    max_rank: int | None = Field(
        default=None, ge=1, le=1024, description="Largest rank of an intervention; default: vLLM's --max-lora-rank."
    )
    max_interventions: int | None = Field(
        default=None, ge=1, description="Largest number of interventions of one adapter; default: 2 per layer."
    )
    components: frozenset[Literal["block", "mlp_output", "attention_output"]] = Field(
        default=frozenset({"block", "mlp_output", "attention_output"}),
        description="Places that can be edited, as a JSON list. Each one left out saves an op per layer and step on CPU.",
    )
    max_adapter_bytes: int = Field(
        default=2**30, ge=1, description="Largest size in bytes of an adapter's tensor file."
    )
    home: Path = Field(
        default=Path("~/.cache/reft-serve"), description="Where adapters converted on the fly by `serve` are kept."
    )


class ServeSettings(BaseSettings):
    """What `reft-serve serve` must know of vLLM's own environment before it starts vLLM."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    reft_engine_key: SecretStr | None = Field(
        default=None, description="A key that callers of the engine must send. Gateways send theirs, of the same name."
    )
    reft_engine_key_next: SecretStr | None = Field(
        default=None,
        description="A second key that is accepted, so that keys can be replaced without a refused request.",
    )
    vllm_api_key: SecretStr | None = Field(
        default=None, description="vLLM's own name for such a key; accepted as well."
    )
    vllm_plugins: str | None = Field(default=None, description="Plugins that vLLM loads; all where it is not set.")
    vllm_allow_runtime_lora_updating: str | None = Field(
        default=None, description="1 or true: adapters can be loaded over HTTP, LoRAs among them."
    )
    vllm_cpu_kvcache_space: str | None = Field(default=None, description="GiB of KV cache on a machine without a GPU.")
    onednn_primitive_cache_capacity: str | None = Field(
        default=None,
        description="Kernels that oneDNN keeps on a machine without a GPU, of about 0.3 MB each: one for every shape of a "
        "layer and number of tokens in a step. oneDNN's own default is 1,024.",
    )

    @property
    def engine_keys(self) -> tuple[str, ...]:
        """The keys that the engine accepts; none if it asks for no key."""
        keys = (self.reft_engine_key, self.reft_engine_key_next, self.vllm_api_key)
        return tuple(
            dict.fromkeys(key.get_secret_value() for key in keys if key is not None and key.get_secret_value())
        )


def _not_a_truth(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("it must be a whole number")
    return value


# Strings are taken, as the environment has nothing else.
_Count = Annotated[int, Field(ge=0, le=10**15), BeforeValidator(_not_a_truth)]
_AtLeastOne = Annotated[int, Field(ge=1, le=10**15), BeforeValidator(_not_a_truth)]


class TenantLimits(BaseModel):
    """What one tenant, or one key, may use; None sets no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: _AtLeastOne | None = Field(
        default=None, description="Inference requests per minute; a sixth of them, but at least ten, in ten seconds."
    )
    tokens_per_minute: _AtLeastOne | None = Field(default=None, description="Tokens per minute, prompts and answers.")
    concurrent_requests: _AtLeastOne | None = Field(default=None, description="Requests under way at once.")
    management_requests_per_minute: _AtLeastOne | None = Field(
        default=None,
        description="Requests per minute that are not inference: lists, uploads, jobs, keys. Not of admins.",
    )
    adapters: _Count | None = Field(default=None, description="Adapters that a tenant may own.")
    files: _Count | None = Field(default=None, description="Files that a tenant may keep.")
    keys: _AtLeastOne | None = Field(default=None, description="Keys that are neither revoked nor expired.")
    event_streams: _AtLeastOne | None = Field(
        default=None, description="Streams of jobs' events that are open at once."
    )
    storage_bytes: _Count | None = Field(default=None, description="Of all versions and files together.")
    jobs: _Count | None = Field(default=None, description="Fine-tuning jobs that wait, run or are paused.")
    running_jobs: _AtLeastOne | None = Field(default=None, description="Fine-tuning jobs that run at once.")
    job_examples: _AtLeastOne | None = Field(
        default=None, description="Examples of a fine-tuning job, each counted once per epoch."
    )
    job_tokens: _AtLeastOne | None = Field(
        default=None, description="Tokens of a fine-tuning job, prompts and answers of every epoch."
    )
    job_hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Hours that a fine-tuning job trains, over all of its attempts."
    )
    choices: _AtLeastOne | None = Field(default=None, description="Largest `n` of a request.")
    output_tokens: _AtLeastOne | None = Field(default=None, description="Largest `max_tokens` of a request.")

    def merged(self, own: Mapping[str, Any]) -> TenantLimits:
        """A tenant's limits: its own, and these for the rest."""
        return self.model_copy(update={name: own[name] for name in own if name in TenantLimits.model_fields})


class _Installation(BaseSettings):
    """What gateways and workers of one installation must agree on."""

    # A limit in the environment leaves the defaults of the others.
    model_config = SettingsConfigDict(
        env_prefix="REFT_",
        env_nested_delimiter="__",
        frozen=True,
        extra="ignore",
        nested_model_default_partial_update=True,
    )

    database: str = Field(
        default="sqlite:///~/.local/share/reft-serve/reft.db", description="sqlite:///PATH or postgresql://..."
    )
    store: Path = Field(
        default=Path("~/.local/share/reft-serve/adapters"),
        description="Where adapters lie; gateways, workers and engines see it under the same path.",
    )
    blobs: str | None = Field(
        default=None,
        description="Where uploaded files, results and checkpoints lie: a directory, or s3://BUCKET/PREFIX (its keys and "
        "endpoint in the usual AWS_* variables). Default: `blobs` beside the store.",
    )
    base_model: str = Field(default="base", max_length=100, description="What the base model is called in public.")
    migrate: bool = Field(default=True, description="Bring the database to this version's schema at start.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level of our log lines."
    )
    train_attempts: int = Field(
        default=3,
        ge=1,
        description="Attempts of a job that may end without getting farther; then it has failed, whether a gateway or a "
        "worker finds it.",
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
        description="Limits of tenants that have none of their own, as REFT_LIMITS__REQUESTS_PER_MINUTE and so on. Give "
        "workers the same ones.",
    )

    @property
    def blobs_url(self) -> str:
        """Where the file store is."""
        return self.blobs or str(self.store.expanduser().parent / "blobs")


class TrainerSettings(_Installation):
    """What a training worker needs. Read once, when it starts."""

    model: str = Field(description="The base model: its local directory, or its name on the Hugging Face hub.")
    worker_name: str = Field(
        default_factory=socket.gethostname, max_length=120, description="What the worker is called, for people."
    )
    work: Path = Field(
        default=Path("~/.local/share/reft-serve/work"), description="Where runs under way lie; local and fast."
    )
    train_jobs: int | None = Field(
        default=None, ge=1, description="Jobs at once; default: one for each GPU, or for every four cores."
    )
    train_memory_bytes: int | None = Field(
        default=None, ge=1, description="Memory for jobs, of each GPU or of the machine; default: four fifths of it."
    )
    train_threads: int | None = Field(
        default=None, ge=1, description="Threads of a job that runs on the CPU; default: its share of the cores."
    )
    train_running_per_tenant: int | None = Field(
        default=None, ge=1, description="Jobs of a tenant at once, where it has no limit of its own."
    )
    train_turn_seconds: float = Field(
        default=600.0,
        ge=0,
        description="How long a job runs before it gives way to the waiting job of a tenant with fewer running ones. It goes "
        "back to the queue with a checkpoint.",
    )
    lease_seconds: float = Field(
        default=30.0,
        ge=1,
        description="How long a job stays with a worker that is not heard of; then another takes it.",
    )
    poll_seconds: float = Field(default=1.0, gt=0, description="Time between looks at the queue.")
    sweep_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Time between looks for what dead processes left; younger things are left alone.",
    )
    patience_seconds: float = Field(
        default=60.0, ge=0, description="How long a job waits for a store that does not answer before it is given back."
    )
    drain_seconds: float = Field(
        default=60.0, ge=0, description="How long jobs may take at shutdown to end their step and store a checkpoint."
    )

    @property
    def running_per_tenant(self) -> int | None:
        """Jobs of a tenant at once, where it has no limit of its own."""
        return self.train_running_per_tenant or self.limits.running_jobs


# Arguments of Transformers' apply_chat_template, which an engine would pass on.
_RENDERING = frozenset({
    "add_generation_prompt", "chat_template", "conversation", "continue_final_message", "documents", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools",
    "truncation",
})  # fmt: skip


class GatewaySettings(_Installation):
    """What a gateway process needs. Read once, when it starts."""

    engines: str = Field(
        default="http://127.0.0.1:8001",
        description="The engines, comma-separated: http://HOST:PORT, unix:/PATH, or dns+http://NAME:PORT for every "
        "address of NAME, looked up again with every probe.",
    )
    engine_key: SecretStr | None = Field(default=None, description="The key that engines ask for.")
    gateway_name: str = Field(
        default_factory=socket.gethostname,
        max_length=128,
        description="Unique among running gateways and the same after a restart: what it left half done is found by it.",
    )
    limits_storage: str = Field(
        default="async+memory://", description="Where limits are counted; async+redis://... for several gateways."
    )
    max_request_bytes: int = Field(default=4 << 20, ge=1024, description="Largest body of a request.")
    max_upload_bytes: int = Field(default=1 << 30, ge=1024, description="Largest upload of an adapter or a file.")
    max_file_bytes: int = Field(default=512 << 20, ge=1024, description="Largest data file.")
    max_header_bytes: int = Field(
        default=32 << 10, ge=1024, description="Largest request line and headers of a request."
    )
    max_json_values: int = Field(
        default=1 << 18,
        ge=64,
        description="Most numbers, texts, lists and objects in the body of an inference request.",
    )
    max_memory_bytes: int = Field(
        default=256 << 20,
        ge=1 << 20,
        description="Memory for the bodies of all requests and for answers that are not streamed; a tenant gets half of it.",
    )
    max_spooled_bytes: int = Field(
        default=2 << 30, ge=1024, description="Disk for all uploads until they are checked; a tenant gets half of it."
    )
    max_connections: int = Field(
        default=4096, ge=1, description="Client connections at once; at most half of the process's open files."
    )
    connections_per_address: int = Field(
        default=1024,
        ge=1,
        description="Client connections of one address at once. Behind a proxy every connection has the proxy's address: set "
        "it to the value of REFT_MAX_CONNECTIONS there.",
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        description="How long a connection may take until the headers of its next request are complete.",
    )
    body_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long a body may take to arrive, plus a second for each 32 KiB; and how long it may pause.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description='Origins whose web pages may call the API, as a JSON list such as ["https://app.example.com"]; '
        "default: none.",
    )
    file_seconds: int | None = Field(
        default=None,
        ge=1,
        description="How long files are kept that were uploaded without an expiry; default: for ever.",
    )
    upkeep_seconds: float = Field(
        default=30.0, gt=0, description="Time between looks for files that have expired and workers that were lost."
    )
    webhook_retry_seconds: float = Field(
        default=5.0, gt=0, description="Wait before a webhook is tried again; six times as long after each failure."
    )
    webhooks_to_private_addresses: bool = Field(
        default=False, description="Whether webhooks may go to private and loopback addresses, and over plain HTTP."
    )
    in_flight_per_engine: int = Field(default=256, ge=1, description="Requests that one engine gets at once.")
    queue_seconds: float = Field(default=30.0, gt=0, description="How long a request may wait for an engine.")
    request_seconds: float = Field(default=600.0, gt=0, description="How long a request may take altogether.")
    probe_seconds: float = Field(default=2.0, gt=0, description="Time between looks at each engine's health.")
    cache_seconds: float = Field(
        default=1.0, ge=0, description="How long what another gateway changes (keys, aliases) may go unnoticed."
    )
    notice_seconds: float = Field(
        default=0.0,
        ge=0,
        description="How long a gateway that is told to end says so, not ready but serving, before it closes its socket; "
        "longer than balancers take to notice.",
    )
    drain_seconds: float = Field(default=30.0, ge=0, description="How long requests under way may go on at shutdown.")
    named_labels: int = Field(default=100, ge=0, description="Tenants and adapters that metrics name; the rest: other.")
    otlp_endpoint: str | None = Field(default=None, description="Where traces go, for instance http://HOST:4318.")

    max_strength: float = Field(
        default=100.0, ge=0, le=100, description="Largest `reft_strength` of a request, either way."
    )
    chat_template_kwargs: str = Field(
        default="enable_thinking,thinking",
        description="Arguments of the chat template that a request may give in `chat_template_kwargs`, comma-separated.",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _harmless(cls, names: str) -> str:
        found = {name.strip() for name in names.split(",")} & _RENDERING
        if found:
            raise ValueError(f"{sorted(found)[0]} decides what is rendered, so no request may give it")
        return names

    @property
    def template_arguments(self) -> tuple[str, ...]:
        """The names of `chat_template_kwargs`, one by one."""
        return tuple(name.strip() for name in self.chat_template_kwargs.split(",") if name.strip())

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """The engines, one by one."""
        return tuple(url.strip().rstrip("/") for url in self.engines.split(",") if url.strip())


def read_settings(kind: type[_S]) -> _S:
    """One kind of settings from the environment.

    Raises:
        ServiceError: some of them cannot be used; the message names their variables, and no value: it may be a secret.
    """
    prefix = kind.model_config.get("env_prefix", "")
    try:
        return kind()
    except ValidationError as exc:
        wrong = "; ".join(f"{(prefix + '__'.join(map(str, e['loc']))).upper()}: {e['msg']}" for e in exc.errors())
        raise ServiceError(f"a setting in the environment cannot be used: {wrong}") from exc
    except SettingsError as exc:
        raise ServiceError(f"a setting in the environment cannot be used: {exc}; write a list as JSON") from exc


def compiler() -> str:
    """The C++ compiler that torch uses."""
    return os.environ.get("CXX", "g++")


def set_environment(changes: Mapping[str, str]) -> None:
    """Change this process's own environment, for libraries that read it."""
    os.environ.update(changes)


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `changes`, for a process that it starts or becomes."""
    return {**os.environ, **changes}
