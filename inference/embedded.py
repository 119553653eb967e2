"""Our engine as a backend: tokenise, hand over to the engine's thread, stream what comes back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import torch
from msgspec import structs

from inference.backend import (
    Capabilities,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Health,
    TextDelta,
    TokenLogprob,
)
from inference.config import EngineConfig
from inference.engine import EngineCore, EngineOptions, EngineThread, Policy
from inference.engine.calibrate import measure_step_cost
from inference.engine.detokenizer import TextStream
from inference.engine.device import DeviceModel
from inference.engine.gate import allowed_reuse
from inference.engine.grammar import Grammars
from inference.engine.lead import MOST, lead_of
from inference.engine.lookup import PromptLookup, TokenText
from inference.engine.ordering import Parts
from inference.errors import RequestRefused
from inference.models import ModelError, load_model
from inference.models.tokenizer import PromptEncoder, by_relevance, load_tokenizer
from inference.placement import cache_blocks, choose_place, cores
from inference.prompt import Prompt, length_of
from inference.running import Run, Running
from kernels import BLOCK_SIZE

log = logging.getLogger(__name__)

HUNG_AFTER_SECONDS = 30.0
DRAFT_ROWS = 6  # guesses of a step in all: one stream gets the most, and none get any from seven on
PRIORITIES = {"interactive": 0, "batch": 1}
LONG_PROMPT_CHARACTERS = 20_000  # tokenising more than this takes milliseconds that the event loop has not got


class EmbeddedBackend:
    """The in-process engine behind the `Backend` seam."""

    def __init__(self, config: EngineConfig):
        started = time.perf_counter()
        threads = config.threads or cores()
        torch.set_num_threads(threads)
        place = choose_place(config)
        model, path = load_model(config.model, place.dtype, config.quantization, place.device, place.kv_dtype)
        shape = model.config
        self._encoder = PromptEncoder(load_tokenizer(path), tells_ranking=config.tell_ranking)
        context = min(config.max_context_tokens or shape.max_context_tokens, shape.max_context_tokens)
        blocks = cache_blocks(config, model, place, context)
        self._name = config.served_name or served_name(config.model, path)
        cache = model.new_cache(blocks)
        if place.on_gpu:
            replayed = config.max_running + DRAFT_ROWS if model.replays else 0
            model = DeviceModel(model, cache, place.device, context, replayed)
        options = EngineOptions(
            identity=f"{path.resolve()}|{place.dtype}|{place.kv_dtype}|{config.quantization}",
            blocks=blocks,
            max_context_tokens=context,
            eos_token_ids=frozenset(shape.eos_token_ids) | self._end_of_turn(),
            policy=Policy(
                max_tokens=place.max_batch_tokens,
                max_running=config.max_running,
                step_seconds=place.step_seconds,
                cost=measure_step_cost(
                    model,
                    cache,
                    blocks,
                    BLOCK_SIZE,
                    shape.max_context_tokens,
                    many=place.timed_chunk,
                    farthest=place.timed_context,
                ),
                max_draft=config.max_draft_tokens,
                draft_rows=DRAFT_ROWS if config.max_draft_tokens else 0,
            ),
            max_queued=config.max_queued,
            overlap=place.on_gpu,
            order=config.document_order,
            eviction=config.cache_eviction,
        )
        if config.document_reuse == "segments":
            log.info("asking the model whether it bears documents reused at other places")
            lead = lead_of(config.document_lead, self._encode_plain, min(MOST, context // 4))
            reuse = allowed_reuse(model, cache, options, self._encode_plain, self._text_stream, shape.layers, lead)
            options = structs.replace(options, reuse=reuse)
        core = EngineCore(model, options, self._text_stream, time.monotonic, cache)
        self._drafts = config.max_draft_tokens > 0
        self._grammars = Grammars(self._encoder.hugging_face, shape.vocab_size, tuple(core.options.eos_token_ids))
        self._thread = EngineThread(core, threads)
        self._running = Running()
        self._seeds = itertools.count(int.from_bytes(os.urandom(4), "little"))
        self.capabilities = Capabilities(
            model=self._name,
            max_context_tokens=context,
            continues_reply=True,
            counts_tokens=True,
            shares_documents=True,
            cache_tokens=core.pool.capacity * BLOCK_SIZE,
        )
        log.info(
            "engine ready in %.1f s: %s, %s on %s, %d cache blocks of %d tokens",
            time.perf_counter() - started, self._name, place.dtype, place.device, blocks, BLOCK_SIZE,
        )  # fmt: skip

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        return self._stream(request, self._running.open(request.request_id))

    async def _stream(self, request: GenerationRequest, run: Run) -> AsyncGenerator[GenerationEvent, None]:
        sampling = request.sampling
        parts, texts = await self._encode(request.prompt)
        grammar = await asyncio.to_thread(self._grammars.open, sampling.constraint) if sampling.constraint else None
        seed = next(self._seeds)
        mailbox = self._thread.submit(
            request.request_id,
            lambda core: core.add(
                request.request_id,
                parts,
                sampling,
                request.scope,
                seed,
                priority=PRIORITIES[request.priority],
                grammar=grammar,
                drafter=PromptLookup(texts) if self._drafts else None,
                order=request.document_order,
                reuse=request.document_reuse,
            ),
        )
        try:
            run.attach(lambda: self._thread.abort(request.request_id))
            if run.aborted:
                self._thread.abort(request.request_id)
            while True:
                output = await mailbox.take()
                if output.error is not None:
                    raise output.error
                if (output.text or output.logprobs) and not run.aborted:
                    yield TextDelta(output.text, output.tokens, self._named(output.logprobs))
                if output.finish is not None:
                    yield Finished(output.finish, output.usage, output.queued_seconds)
                    return
        finally:
            self._thread.leave(request.request_id)

    def abort(self, request_id: str) -> None:
        self._running.abort(request_id)

    async def count_tokens(self, prompt: Prompt) -> int:
        return len(by_relevance((await self._encode(prompt))[0]))

    async def health(self) -> Health:
        if not self._thread.alive:
            return Health(False, "the engine has stopped: restart the server")
        stuck = self._thread.busy_seconds()
        if stuck > HUNG_AFTER_SECONDS:
            return Health(False, f"the engine has not finished a step for {stuck:.0f} s")
        return Health(True)

    def metrics(self) -> dict[str, float]:
        core = self._thread.core
        used, allocated = core.slots
        return {
            "requests_running": len(core.scheduler.running),
            "requests_waiting": len(core.scheduler.waiting),
            "requests_total": core.counters.finished_requests,
            "requests_aborted_total": core.counters.aborted_requests,
            "requests_failed_total": core.counters.failed_requests,
            "prompt_tokens_total": core.counters.prompt_tokens,
            "cached_tokens_total": core.counters.cached_tokens,
            "approximate_tokens_total": core.counters.approximate_tokens,
            "recomputed_tokens_total": core.counters.recomputed_tokens,
            "reordered_requests_total": core.counters.reordered_requests,
            "completion_tokens_total": core.counters.generated_tokens,
            "computed_tokens_total": core.counters.computed_tokens,
            "drafted_tokens_total": core.counters.drafted_tokens,
            "accepted_tokens_total": core.counters.accepted_tokens,
            "steps_total": core.counters.steps,
            "preemptions_total": core.scheduler.preempted_total,
            "kv_blocks": core.pool.capacity,
            "kv_free_blocks": core.pool.free_blocks,
            "kv_published_blocks": core.pool.published_blocks,
            "kv_evicted_blocks_total": core.pool.evicted_total,
            "kv_slots_used": used,
            "kv_slots_allocated": allocated,
        }

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.close)

    async def _encode(self, prompt: Prompt) -> tuple[list[int] | Parts, list[TokenText]]:
        try:
            if length_of(prompt) < LONG_PROMPT_CHARACTERS:
                return self._encoder.encode_texts(prompt)
            return await asyncio.to_thread(self._encoder.encode_texts, prompt)
        except ModelError as error:
            raise RequestRefused(str(error)) from error

    def _named(self, logprobs: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...]:
        """With the text of each token."""
        decode = self._encoder.tokenizer.decode
        return tuple(
            structs.replace(each, text=decode([each.token], skip_special_tokens=False), top=self._named(each.top))
            for each in logprobs
        )

    def _text_stream(self, stop: tuple[str, ...]) -> TextStream:
        return TextStream(self._encoder.tokenizer, stop)

    def _encode_plain(self, text: str) -> list[int]:
        return self._encoder.tokenizer.encode(text, add_special_tokens=False).ids

    def _end_of_turn(self) -> frozenset[int]:
        eos = self._encoder.tokenizer.token_to_id("<|im_end|>")
        return frozenset() if eos is None else frozenset({eos})


def served_name(model: str, path: Path) -> str:
    return model if model == "smollm2" else path.stem
