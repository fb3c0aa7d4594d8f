"""The vLLM functions that the plugin wraps, one row each: why, and the source that the wrapper was
written against.

`plugin.register` compares each fingerprint with the installed source before it wraps anything. For
a new vLLM version, `scripts/seams --diff OLD NEW` shows which of these functions changed and how.
Nothing here imports vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ADDITIONS", "SEAMS", "Addition", "Seam", "fingerprint"]


@dataclass(frozen=True, slots=True)
class Seam:
    """A vLLM function, and our function that makes its replacement from the original."""

    #: `module` or `module:Class`, where the function is defined.
    owner: str
    name: str
    #: Our function, with its module.
    wrapper: str
    why: str
    #: `fingerprint` of the function's source, by vLLM version.
    sources: Mapping[str, str]
    #: Other modules that import the function by name. One that is imported already gets the
    #: replacement too.
    holders: tuple[str, ...] = ()
    #: Subclasses that override the method, known to call it.
    overridden_by: tuple[str, ...] = ()
    #: The issue or pull request of a fault of vLLM's own that this works around, with no part in
    #: ReFT.
    upstream: str | None = None

    def __str__(self) -> str:
        return f"{self.owner.replace(':', '.')}.{self.name}"


@dataclass(frozen=True, slots=True)
class Addition:
    """Our method that is added to a vLLM class, so that vLLM's RPC can call it."""

    owner: str
    name: str
    function: str


def fingerprint(source: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a function's source text."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


_ENGINES = "vllm.v1.engine"
_INPUTS = f"{_ENGINES}.input_processor:InputProcessor"
_OUTPUTS = f"{_ENGINES}.output_processor:OutputProcessor"
_CORE = f"{_ENGINES}.core:EngineCore"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_MIXIN = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin"
_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_STRUCTURED = "vllm.v1.structured_output:StructuredOutputManager"
_BEAMS = "vllm.entrypoints.generate.beam_search"
_POOLING = "vllm.entrypoints.pooling"

SEAMS = (
    # Configuration
    Seam(
        "vllm.engine.arg_utils:EngineArgs",
        "create_engine_config",
        "reft_serve.engine.configuration.wrap_create_engine_config",
        "decides REFT_* settings once; they travel in the configuration to every process",
        {"0.32.0": "b9b94288f46d2f67"},
    ),
    Seam(
        "vllm.engine.arg_utils:EngineArgs",
        "from_cli_args",
        "reft_serve.engine.configuration.wrap_from_cli_args",
        "notes whether this server can get ReFT adapters only",
        {"0.32.0": "51a013f61829ac5c"},
    ),
    Seam(
        "vllm.platforms.cpu:CpuPlatform",
        "check_and_update_config",
        "reft_serve.engine.configuration.wrap_check_and_update_config",
        "keeps torch.compile on a CPU, which vLLM turns off if --enable-lora is set, for an "
        "engine without LoRA layers",
        {"0.32.0": "d2960ad5d1836767"},
        upstream="not reported: right for LoRAs, and no setting says that none will come",
    ),
    # Front end
    Seam(
        "vllm.v1.structured_output.backend_guidance",
        "validate_guidance_grammar",
        "reft_serve.engine.front_end.grammar_checks.wrap_validate_guidance_grammar",
        "the front end's check compiles in its own process; `grammar_checks` does so in another "
        "one, with bounds",
        {"0.32.0": "dc3fa0999e37057c"},
    ),
    Seam(
        _INPUTS,
        "__init__",
        "reft_serve.engine.front_end.grammar_checks.wrap_input_processor_init",
        "starts the process that compiles constraints",
        {"0.32.0": "5137c92ffb9254d2"},
    ),
    Seam(
        _INPUTS,
        "process_inputs",
        "reft_serve.engine.front_end.grammar_checks.wrap_process_inputs",
        "only compiled constraints reach the engine core",
        {"0.32.0": "e22b5f772979054c"},
    ),
    Seam(
        f"{_ENGINES}.async_llm:AsyncLLM",
        "generate",
        "reft_serve.engine.front_end.grammar_checks.wrap_generate",
        "waits for a constraint's verdict without blocking the event loop",
        {"0.32.0": "5bd0ee90459b0e29"},
    ),
    Seam(
        _INPUTS,
        "process_inputs",
        "reft_serve.engine.front_end.binding.wrap_process_inputs",
        "binds each request to the version, rule and strength of its adapter",
        {"0.32.0": "e22b5f772979054c"},
    ),
    Seam(
        f"{_ENGINES}.llm_engine:LLMEngine",
        "add_lora",
        "reft_serve.engine.front_end.binding.wrap_add_lora",
        "checks an adapter before the engine sees it",
        {"0.32.0": "ad12a2e7820577e3"},
    ),
    Seam(
        f"{_ENGINES}.llm_engine:LLMEngine",
        "remove_lora",
        "reft_serve.engine.front_end.binding.wrap_remove_lora",
        "frees what the front end keeps of an adapter",
        {"0.32.0": "28d68220a867884d"},
    ),
    Seam(
        f"{_ENGINES}.llm_engine:LLMEngine",
        "pin_lora",
        "reft_serve.engine.front_end.binding.wrap_pin_lora",
        "pins every strength of an adapter",
        {"0.32.0": "357b71dfd9e2be52"},
    ),
    Seam(
        f"{_ENGINES}.llm_engine:LLMEngine",
        "list_loras",
        "reft_serve.engine.front_end.binding.wrap_list_loras",
        "lists adapters by the ids that callers gave",
        {"0.32.0": "504942c407bc05a4"},
    ),
    Seam(
        f"{_ENGINES}.async_llm:AsyncLLM",
        "add_lora",
        "reft_serve.engine.front_end.binding.wrap_add_lora",
        "checks an adapter before the engine sees it",
        {"0.32.0": "72ca27e79c0049a2"},
    ),
    Seam(
        f"{_ENGINES}.async_llm:AsyncLLM",
        "remove_lora",
        "reft_serve.engine.front_end.binding.wrap_remove_lora",
        "frees what the front end keeps of an adapter",
        {"0.32.0": "9aac9679ae874477"},
    ),
    Seam(
        f"{_ENGINES}.async_llm:AsyncLLM",
        "pin_lora",
        "reft_serve.engine.front_end.binding.wrap_pin_lora",
        "pins every strength of an adapter",
        {"0.32.0": "e6749af01db82104"},
    ),
    Seam(
        f"{_ENGINES}.async_llm:AsyncLLM",
        "list_loras",
        "reft_serve.engine.front_end.binding.wrap_list_loras",
        "lists adapters by the ids that callers gave",
        {"0.32.0": "f3389baef0c9bf01"},
    ),
    Seam(
        f"{_BEAMS}.offline:BeamSearchOfflineMixin",
        "beam_search",
        "reft_serve.engine.front_end.beams.wrap_beam_search",
        "refuses beam search with an adapter, whose beams would lose it",
        {"0.32.0": "b4b93229fd76b6a8"},
    ),
    Seam(
        f"{_BEAMS}.online:BeamSearchOnlineMixin",
        "beam_search",
        "reft_serve.engine.front_end.beams.wrap_beam_search",
        "as offline",
        {"0.32.0": "e2e6d1893a8f2c1d"},
    ),
    Seam(
        _MODELS,
        "load_lora_adapter",
        "reft_serve.engine.front_end.server_answers.wrap_load_lora_adapter",
        "answers a bad adapter with a 400 that lists every fault",
        {"0.32.0": "10dfa2a6fcf10de4"},
    ),
    Seam(
        _MODELS,
        "unload_lora_adapter",
        "reft_serve.engine.front_end.server_answers.wrap_unload_lora_adapter",
        "frees the slot and the host memory of an adapter",
        {"0.32.0": "9d3e23adf5199694"},
    ),
    Seam(
        _MODELS,
        "show_available_models",
        "reft_serve.engine.front_end.server_answers.wrap_show_available_models",
        "adds the engine's limits to its model card",
        {"0.32.0": "8ec3d280b3591c81"},
    ),
    # Pooling: first the classes whose modules hold `init_pooling_io_processors`
    Seam(
        f"{_POOLING}.offline:PoolingOfflineMixin",
        "_verify_pooling_task",
        "reft_serve.engine.front_end.classifying.wrap_verify_pooling_task",
        "as init_pooling_state, for vLLM's LLM",
        {"0.32.0": "b59342c40b166143"},
    ),
    Seam(
        f"{_POOLING}.base.serving:PoolingBaseServing",
        "_preprocessing",
        "reft_serve.engine.front_end.pairs.wrap_preprocessing",
        "tokenises pairs of texts to classify, off the event loop",
        {"0.32.0": "ca7d6a510467a86b"},
        overridden_by=(f"{_POOLING}.embed.serving:ServingEmbedding",),
    ),
    Seam(
        f"{_POOLING}.classify.serving:ServingClassification",
        "_build_response",
        "reft_serve.engine.front_end.labels.wrap_build_response",
        "names the labels of the adapter that answered",
        {"0.32.0": "3652a955ae54c74c"},
    ),
    Seam(
        f"{_POOLING}.factories",
        "init_pooling_state",
        "reft_serve.engine.front_end.classifying.wrap_init_pooling_state",
        "a server classifies by adapters and embeds, where vLLM does one of its model's tasks",
        {"0.32.0": "2a94f3f2cafe89c5"},
    ),
    Seam(
        f"{_POOLING}.factories",
        "init_pooling_io_processors",
        "reft_serve.engine.front_end.classifying.wrap_init_pooling_io_processors",
        "as init_pooling_state, for vLLM's LLM",
        {"0.32.0": "bc82b3dcd4c4a972"},
        holders=(f"{_POOLING}.offline", f"{_POOLING}.pooling.serving"),
    ),
    Seam(
        "vllm.renderers.hf",
        "safe_apply_chat_template",
        "reft_serve.engine.front_end.server_answers.wrap_safe_apply_chat_template",
        "a missing chat template is named by the answer's `param`",
        {"0.32.0": "b60e88ebf7002c15"},
        holders=("vllm.entrypoints.pooling.scoring.io_processor",),
    ),
    Seam(
        f"{_ENGINES}.async_llm:AsyncLLM",
        "_run_output_handler",
        "reft_serve.engine.front_end.telemetry.wrap_run_output_handler",
        "samples the workers' ReFT counters",
        {"0.32.0": "5111696248ec17f0"},
    ),
    Seam(
        _OUTPUTS,
        "_update_stats_from_finished",
        "reft_serve.engine.front_end.telemetry.wrap_update_stats_from_finished",
        "counts prompt tokens by source: computed, cached, shared with the base",
        {"0.32.0": "611dcabf0c11b4b9"},
    ),
    Seam(
        _OUTPUTS,
        "_update_stats_from_finished",
        "reft_serve.engine.front_end.usage.wrap_update_stats_from_finished",
        "notes what a request has used, for a gateway whose caller has left",
        {"0.32.0": "611dcabf0c11b4b9"},
    ),
    Seam(
        _OUTPUTS,
        "abort_requests",
        "reft_serve.engine.front_end.usage.wrap_abort_requests",
        "as _update_stats_from_finished, for requests that are aborted",
        {"0.32.0": "6dd03abb8ea35e7c"},
    ),
    Seam(
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat",
        "__init__",
        "reft_serve.engine.front_end.usage.wrap_serving_init",
        "usage reports cached prompt tokens without a flag",
        {"0.32.0": "36059defbe726c97"},
    ),
    Seam(
        "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion",
        "__init__",
        "reft_serve.engine.front_end.usage.wrap_serving_init",
        "as for chats",
        {"0.32.0": "321fd18beab5c13e"},
    ),
    # Engine core
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        "reft_serve.engine.core.prefix_cache.wrap_generate_block_hash_extra_keys",
        "keys a block by the edits inside it instead of by the adapter's name",
        {"0.32.0": "fabb6e4b928af21a"},
        holders=("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager"),
    ),
    Seam(
        _CORE,
        "preprocess_add_request",
        "reft_serve.engine.core.admission.wrap_preprocess_add_request",
        "reads an adapter's files in the input thread, off the step",
        {"0.32.0": "a8b386db3f85cf76"},
    ),
    Seam(
        _CORE,
        "add_request",
        "reft_serve.engine.core.admission.wrap_add_request",
        "holds the adapter for as long as the request lives",
        {"0.32.0": "e1292d26930e5b72"},
        overridden_by=("vllm.v1.engine.core:DPEngineCoreProc",),
    ),
    Seam(
        _CORE,
        "add_lora",
        "reft_serve.engine.core.admission.wrap_add_lora",
        "fills the slot from host memory",
        {"0.32.0": "8337cb3be82e49c9"},
    ),
    Seam(
        _CORE,
        "remove_lora",
        "reft_serve.engine.core.admission.wrap_remove_lora",
        "drops the host memory too",
        {"0.32.0": "6d4a54223bd13b19"},
    ),
    Seam(
        _CORE,
        "pin_lora",
        "reft_serve.engine.core.admission.wrap_pin_lora",
        "pins the host memory too",
        {"0.32.0": "770a979322c19a1c"},
    ),
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "_free_request",
        "reft_serve.engine.core.admission.wrap_free_request",
        "releases the adapter of a request that ends",
        {"0.32.0": "1b386dca84e6bb73"},
    ),
    Seam(
        _STRUCTURED,
        "__init__",
        "reft_serve.engine.core.grammars.wrap_manager_init",
        "one backend for all requests, independent of the first one",
        {"0.32.0": "585ff4311f12b214"},
    ),
    Seam(
        _STRUCTURED,
        "grammar_bitmask",
        "reft_serve.engine.core.grammars.wrap_grammar_bitmask",
        "ends the costliest requests of a step that takes too long",
        {"0.32.0": "46f2867ad31aea09"},
    ),
    Seam(
        _STRUCTURED,
        "accept_tokens",
        "reft_serve.engine.core.grammars.wrap_accept_tokens",
        "the answer says that its constraint was too costly",
        {"0.32.0": "67b4e70569349367"},
    ),
    Seam(
        "vllm.v1.structured_output.backend_guidance:GuidanceBackend",
        "compile_grammar",
        "reft_serve.engine.core.grammars.wrap_compile_grammar",
        "compiles with llguidance's bounds, which vLLM does not set",
        {"0.32.0": "264c741ffceff04c"},
    ),
    # Workers
    Seam(
        _MIXIN,
        "load_lora_model",
        "reft_serve.engine.worker.runners.wrap_load_lora_model",
        "uses the manager that holds ReFT adapters and LoRAs",
        {"0.32.0": "dbd70775ffc57fc6"},
    ),
    Seam(
        _MIXIN,
        "set_active_loras",
        "reft_serve.engine.worker.runners.wrap_set_active_loras",
        "computes the edited rows of a step",
        {"0.32.0": "b706b820550c0679"},
    ),
    Seam(
        _RUNNER,
        "_determine_batch_execution_and_padding",
        "reft_serve.engine.worker.runners.wrap_determine_batch_execution_and_padding",
        "a step without edited rows replays the graph without adapters",
        {"0.32.0": "8a022812851793da"},
    ),
    Seam(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader",
        "create_model",
        "reft_serve.engine.configuration.wrap_create_model",
        "experts get the Triton kernels for LoRAs if --enable-lora is set, also on a CPU, which "
        "has none",
        {"0.32.0": "476e680313ee6b3f"},
        upstream="not reported: right for LoRAs, and no setting says that none will come",
    ),
    # Workarounds of faults of vLLM's own
    Seam(
        "vllm.lora.ops.torch_ops.lora_ops",
        "bgmv_expand",
        "reft_serve.engine.worker.workarounds.wrap_bgmv_expand",
        "a row without a LoRA (index -1) gets the last slot's LoRA on a CPU",
        {"0.32.0": "634dfed323317a2a"},
        holders=("vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu"),
        upstream="https://github.com/vllm-project/vllm/pull/48421 and https://github.com/vllm-project/vllm/pull/49656",
    ),
    Seam(
        "vllm.lora.ops.torch_ops.lora_ops",
        "bgmv_expand_slice",
        "reft_serve.engine.worker.workarounds.wrap_bgmv_expand",
        "as bgmv_expand",
        {"0.32.0": "3534905281a25201"},
        holders=("vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu"),
        upstream="https://github.com/vllm-project/vllm/pull/48421 and https://github.com/vllm-project/vllm/pull/49656",
    ),
    Seam(
        _RUNNER,
        "sync_and_gather_intermediate_tensors",
        "reft_serve.engine.worker.workarounds.wrap_sync_and_gather_intermediate_tensors",
        "On a CPU, the first step of a pipeline without compilation (--enforce-eager, or LoRA on) "
        "fails: every rank but the first asserts `self.intermediate_tensors is not None`. The "
        "buffers are made in the warm-up only, and CPUModelRunner.warming_up_model returns "
        "without one if the compilation mode is NONE. To reproduce: vllm serve MODEL "
        "--pipeline-parallel-size 2 --enforce-eager on a CPU, and one request. The buffers could "
        "be made on first use",
        {"0.32.0": "ab853c8015d42481"},
        upstream="not reported",
    ),
    Seam(
        _RUNNER,
        "_sample",
        "reft_serve.engine.worker.workarounds.wrap_sample",
        "On a CPU, a request with a seed whose prompt is longer than --max-num-batched-tokens "
        "ends the engine. vLLM samples after each chunk of a prompt, discards the token, and "
        "rewinds the request's generator with gen.set_offset(gen.get_offset() - 4), which raises "
        "for a CPU generator: it has no offset. To reproduce: vllm serve MODEL "
        "--max-num-batched-tokens 16 --max-num-seqs 4 on a CPU, and a completion of 40 tokens of "
        'prompt with "seed": 1. The generator\'s state could be kept before sampling and restored',
        {"0.32.0": "5cb5c1da02cfdc68"},
        upstream="not reported; the offset came with "
        "https://github.com/vllm-project/vllm/pull/10097",
    ),
    Seam(
        _RUNNER,
        "_bookkeeping_sync",
        "reft_serve.engine.worker.workarounds.wrap_bookkeeping_sync",
        "as _sample",
        {"0.32.0": "13c3e81003a7e168"},
        upstream="not reported; the offset came with "
        "https://github.com/vllm-project/vllm/pull/10097",
    ),
    Seam(
        "vllm.v1.sample.ops.logprobs",
        "batched_count_greater_than",
        "reft_serve.engine.worker.workarounds.wrap_batched_count_greater_than",
        "on a CPU the first request for logprobs would build C++ inside a step; all requests wait",
        {"0.32.0": "85869de0f00bb508"},
        holders=("vllm.v1.sample.sampler",),
        upstream="not reported for vLLM; "
        "https://github.com/torch-spyre/sendnn-inference/issues/550 describes it",
    ),
)

ADDITIONS = (
    Addition(_CORE, "reft_read_ahead", "reft_serve.engine.core.admission.read_ahead"),
    *(
        Addition(
            "vllm.v1.worker.worker_base:WorkerBase",
            name,
            f"reft_serve.engine.worker.runners.{name}",
        )
        for name in ("reft_counters", "reft_stats", "reft_hold", "reft_add", "reft_release")
    ),
)
