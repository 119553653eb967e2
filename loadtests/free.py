"""A model and texts that cost nothing, for what is measured around them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from inference.config import Eviction
from inference.engine import EngineCore, EngineOptions, Policy
from inference.engine.segments import Reusing
from inference.prompt import DocumentOrder


class Free:
    """A model that costs nothing: every logit is 0."""

    def __init__(self) -> None:
        self._logits = torch.zeros(1024, 256)

    def new_cache(self, blocks: int) -> object:
        return object()

    def forward(self, tokens, plan, cache, wanted):
        return self._logits[: len(wanted)]

    def look(self, tokens, plan, cache, layers):
        return torch.zeros(int(plan.context_lens[0]))

    def copy(self, cache, source, target):
        pass

    def splice(self, cache, source, target, by):
        pass


class NoText:
    stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def core_over(
    model,
    blocks: int,
    order: DocumentOrder = "relevance",
    eviction: Eviction = "gdsf",
    reuse: Reusing | None = None,
    clock: Callable[[], float] = time.monotonic,
    cache: object = None,
    **policy,
) -> EngineCore:
    """An engine over `model` that has `blocks` of cache, in `cache` if given, and writes no text; `policy` as for
    Policy."""
    return EngineCore(
        model,
        EngineOptions(
            identity="bench",
            blocks=blocks,
            max_context_tokens=8192,
            eos_token_ids=frozenset(),
            policy=Policy(**policy),
            max_queued=10_000,
            order=order,
            eviction=eviction,
            reuse=reuse,
        ),
        text_stream=lambda stop: NoText(),
        clock=clock,
        cache=cache,
    )
