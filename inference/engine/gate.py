"""May this model reuse documents at other places, and how much must be computed again?  Asked of the model itself at
start, since some bear it and some don't.

A few prompts over Python's own manual, which lies at hand everywhere, are answered three ways: by a full prefill, with
their documents in another order, and with their documents reused.  Reuse may be switched on where

    with all of it computed again nothing differs      the copying is right
    the more is computed again, the less differs       so is the choosing
    it differs by at most half of what another order does

and as much is computed again as the last one needs.  What differs is the distribution of the next token, over the
tokens that the full prefill answers: KL, in nats.
"""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Callable
from pydoc_data.topics import topics

import msgspec
import torch

from inference.backend import Sampling
from inference.engine.core import EngineCore, EngineOptions
from inference.engine.ordering import Document, Parts
from inference.engine.segments import LEAST, Reusing, looked_at
from inference.models.config import ModelError

log = logging.getLogger(__name__)

SHARES = (0.12, 0.25, 0.5)  # tried in this order
PROMPTS, DOCUMENTS, CHARACTERS, TOLD = 4, 3, 700, 8
LONGEST = 160  # tokens of a document
OF_ANOTHER_ORDER = 0.5
SAME = 0.01  # nats; bf16 alone makes 0.0015


class Followed:
    """A model whose next tokens are given, and whose distributions are kept."""

    def __init__(self, model, forced: list[int]):
        self._model = model
        self._forced = forced
        self.seen: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def forward(self, tokens, plan, cache, wanted, *sampled):
        logits = self._model.forward(tokens, plan, cache, wanted, *sampled)
        if len(logits):
            self.seen.append(logits[-1].float().log_softmax(-1).cpu())
            if self._forced:
                logits = logits.clone()
                logits[-1, self._forced[len(self.seen) - 1]] = 1e9
        return logits


def allowed_reuse(
    model,
    cache: object,
    options: EngineOptions,
    encode: Callable[[str], list[int]],
    text_stream: Callable[[tuple[str, ...]], object],
    layers: int,
    lead: tuple[int, ...],
) -> Reusing:
    """How `model` of so many `layers` may reuse documents over `cache`, whose content is overwritten, computed behind
    the tokens `lead`.  Raises ModelError where it may not."""

    def answer(parts: Parts, reuse: Reusing | None, forced: list[int]) -> tuple[list[int], torch.Tensor]:
        """The first tokens behind `parts`, or those `forced`, and the distributions they come from [tokens, vocab]."""
        followed = Followed(model, forced)
        how = msgspec.structs.replace(options, reuse=reuse, order="relevance", overlap=False)
        core = EngineCore(followed, how, text_stream, lambda: 0.0, cache)
        core.expect(parts, "")
        core.add("calibration", parts, Sampling(max_tokens=TOLD, ignore_eos=True), "", 0)
        while core.has_work:
            if core.scheduler.waiting:
                followed.seen.clear()  # it was a document alone
            core.step()
        counted = core.counters
        if reuse is not None and not counted.approximate_tokens + counted.recomputed_tokens:
            raise ModelError(
                'the KV cache is too small for document_reuse = "segments": set "prefix", or more kv_cache_mb'
            )
        return [int(row.argmax()) for row in followed.seen], torch.stack(followed.seen)

    if not hasattr(model, "look"):
        raise ModelError(
            'document_reuse = "segments" needs one of the engine\'s own models (Llama, Mistral, Qwen2, Qwen3) whole: '
            'set "prefix"'
        )
    longest = min(LONGEST, options.max_context_tokens // (2 * DOCUMENTS))
    if longest < LEAST:
        raise ModelError(
            f'a context of {options.max_context_tokens} tokens is too short for document_reuse = "segments"'
        )
    differs: dict[str, list[float]] = {}
    for i in range(PROMPTS):
        parts = _prompt(i, lambda text: encode(text)[:longest])
        told, truth = answer(parts, None, [])
        another = (*parts.ranks[1:], 0)
        turned = parts._replace(documents=tuple(parts.documents[rank] for rank in another))
        found = {"order": answer(turned, None, told)[1]}
        for share in (*SHARES, 1.0):
            found[f"{share}"] = answer(parts, Reusing(share, looked_at(layers), lead), told)[1]
        for name, logprobs in found.items():
            differs.setdefault(name, []).append(float((truth.exp() * (truth - logprobs)).sum(-1).mean()))
    mean = {name: statistics.fmean(values) for name, values in differs.items()}
    told_all = ", ".join(f"{mean[f'{share}']:.4f} with {share:.0%} computed again" for share in (*SHARES, 1.0))
    log.info("reuse of documents differs by %s; another order by %.4f nats", told_all, mean["order"])
    curve = [mean[f"{share}"] for share in (*SHARES, 1.0)]
    if curve[-1] > SAME or curve != sorted(curve, reverse=True):
        raise ModelError(f'document_reuse = "segments" does not work with this model ({told_all}): set "prefix"')
    for share in SHARES:
        if mean[f"{share}"] <= OF_ANOTHER_ORDER * mean["order"]:
            return Reusing(share, looked_at(layers), lead)
    raise ModelError(
        f'document_reuse = "segments" would change this model\'s answers too much ({told_all}; another order of the '
        f'documents {mean["order"]:.4f}): set "prefix"'
    )


def _prompt(number: int, encode: Callable[[str], list[int]]) -> Parts:
    rng = random.Random(number)
    names = sorted(name for name in topics if len(topics[name]) > 2 * CHARACTERS)
    chosen = rng.sample(names, DOCUMENTS)
    documents = []
    for name in chosen:
        begin = rng.randrange(len(topics[name]) - CHARACTERS)
        documents.append(" ".join(topics[name][begin : begin + CHARACTERS].split()) + "\n\n")
    question = f"Question: what do these passages say about {chosen[0]} and about {chosen[-1]}?\nAnswer:"
    return Parts(
        encode("You answer questions about a software manual from the passages below.\n\n"),
        tuple(Document(f"{number}/{i}".encode(), encode(text)) for i, text in enumerate(documents)),
        encode(question),
    )
