"""The seam between the gateway and whatever turns prompts into tokens.

    async with aclosing(backend.generate(request)) as stream:
        async for event in stream:        # TextDelta* then exactly one Finished
            ...

Leaving the stream early (aclose, cancellation) aborts the request; so does `abort`, which is
synchronous, idempotent and callable from any thread, since a clean-up that awaits may never
run when a client disconnects.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol, runtime_checkable

import msgspec

from inference.prompt import DocumentOrder, DocumentReuse, Prompt

FinishReason = Literal["stop", "length", "abort"]
Priority = Literal["interactive", "batch"]


class Constraint(msgspec.Struct, frozen=True):
    """What a whole answer must be: JSON of a schema (`value` is the schema as JSON text), any JSON object, or a
    match of a regular expression."""

    kind: Literal["json_schema", "json_object", "regex"]
    value: str = ""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens.  `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off.

    `repetition_penalty` divides the positive logits of tokens that the prompt or the answer holds (1: off);
    `presence_penalty` and `frequency_penalty` are taken off the logits of tokens that the answer holds, once and per
    occurrence; `logit_bias` is added by token.  `logprobs`: how many of the best tokens to tell of beside each.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`scope` is the access scope, chosen by the server: cache blocks are shared only inside one.  `priority`: what
    somebody waits for goes before what nobody does, where a backend can choose.  `document_order` of the prompt's
    documents and their `document_reuse`, where a backend shares them; None for the backend's own."""

    request_id: str
    prompt: Prompt
    sampling: Sampling = Sampling()
    scope: str = "public"
    priority: Priority = "interactive"
    document_order: DocumentOrder | None = None
    document_reuse: DocumentReuse | None = None


class Usage(msgspec.Struct, frozen=True):
    """`cached_tokens` of the `prompt_tokens` were read from the cache; each None where a remote server doesn't say.
    `approximate_tokens` of these were computed at another place of another prompt; `recomputed_tokens` of the same
    documents were computed again."""

    prompt_tokens: int | None
    completion_tokens: int
    cached_tokens: int | None = None
    approximate_tokens: int = 0
    recomputed_tokens: int = 0

    @property
    def kv_mode(self) -> Literal["exact", "segments"]:
        return "segments" if self.approximate_tokens else "exact"


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token of the answer and the natural logarithm of its probability, before temperature and filters; `top` are
    the most likely ones in its place, best first."""

    token: int
    logprob: float
    text: str = ""
    top: tuple[TokenLogprob, ...] = ()


class TextDelta(msgspec.Struct, frozen=True):
    """Text to append.  `tokens` is how many tokens it took; text is held back at most for a stop
    string or an unfinished character, so a delta never ends inside a character.  There is text in it, or where
    they were asked for at least `logprobs`."""

    text: str
    tokens: int = 1
    logprobs: tuple[TokenLogprob, ...] = ()


class Finished(msgspec.Struct, frozen=True):
    """The last event.  `queued_seconds`: from arrival to first being scheduled, where known."""

    reason: FinishReason
    usage: Usage
    queued_seconds: float | None = None


GenerationEvent = TextDelta | Finished


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend can do.  `max_context_tokens` counts prompt and answer; `cache_tokens` is what its cache holds of
    all prompts together.  Both None if unknown."""

    model: str
    max_context_tokens: int | None = None
    continues_reply: bool = False
    counts_tokens: bool = False
    shares_documents: bool = False
    cache_tokens: int | None = None


class Health(msgspec.Struct, frozen=True):
    ready: bool
    detail: str = ""


@runtime_checkable
class Backend(Protocol):
    """Turns prompts into tokens.  Errors are raised from `generate` as `inference.errors.BackendError`."""

    @property
    def capabilities(self) -> Capabilities: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]: ...

    def abort(self, request_id: str) -> None: ...

    async def count_tokens(self, prompt: Prompt) -> int | None:
        """Length of the prompt in the model's tokens, template included; None where it can't be known."""

    async def health(self) -> Health: ...

    def metrics(self) -> dict[str, float]:
        """Gauges and counters by name (`..._total` for counters), for the gateway's /metrics."""

    async def close(self) -> None: ...
