"""The engine core: pure and synchronous.  No asyncio, no threads, no clock of its own.

step:  schedule → build the batch → run the model → sample → deliver

On a GPU the host works ahead (`overlap`): it launches the next step before it reads the tokens of the one in flight,
which stand in that next step's inputs as -1 - their row, and are told too late for a request that turns out to have
ended: its token of the next step is dropped.  Steps run in the order in which they were launched, so a block that is
free may be given away at once: whatever is still in flight reads and writes it before its new owner does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import torch

from inference.backend import FinishReason, Sampling, TokenLogprob, Usage
from inference.config import Eviction
from inference.engine import batch as batches
from inference.engine.blocks import BlockName, BlockPool, root_name
from inference.engine.detokenizer import TextStream
from inference.engine.documents import Documents
from inference.engine.ordering import DocumentTree, Parts
from inference.engine.sampler import Choices, adjusts, choose
from inference.engine.scheduler import Policy, Scheduled, Scheduler
from inference.engine.segments import Reusing, Segments
from inference.engine.sequence import Drafter, Grammar, Sequence
from inference.errors import BackendError, GenerationFailed, Overloaded, PromptTooLong, RequestRefused
from inference.prompt import DocumentOrder, DocumentReuse
from kernels import BLOCK_SIZE

log = logging.getLogger(__name__)


class Model(Protocol):
    """What the core needs of a model; `forward` as `inference.models.Llama.forward`, and where steps overlap with the
    tokens [rows] of the one in flight.  One that has `copy`, as Llama, shares documents that end within a block; on a
    GPU that would be some hundred small kernels for a few tokens."""

    def new_cache(self, blocks: int) -> object: ...

    def forward(self, tokens, plan, cache, wanted, *sampled) -> torch.Tensor: ...


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`identity` names the model and its dtype: cache blocks are only ever shared under one identity.
    `block_size` in tokens: that of the model's cache.  `overlap`: the model only launches steps.
    `order`: of the documents in a prompt (`engine.ordering`); `eviction`: of cached blocks (`engine.eviction`);
    `reuse`: of documents at other places, where the model allows it (`engine.gate`)."""

    identity: str
    blocks: int
    block_size: int = BLOCK_SIZE
    max_context_tokens: int
    eos_token_ids: frozenset[int]
    policy: Policy = Policy()
    max_queued: int = 256
    overlap: bool = False
    order: DocumentOrder = "relevance"
    eviction: Eviction = "gdsf"
    reuse: Reusing | None = None


class Output(msgspec.Struct):
    """News of one request after a step: `text`, which took `tokens`.  `finish` or `error` is set on its last."""

    request_id: str
    text: str = ""
    tokens: int = 0
    finish: FinishReason | None = None
    usage: Usage | None = None
    queued_seconds: float | None = None
    error: BackendError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Counters(msgspec.Struct):
    """Totals since the start, in tokens where not said otherwise."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    approximate_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished_requests: int = 0
    reordered_requests: int = 0
    aborted_requests: int = 0
    failed_requests: int = 0


class Launched(NamedTuple):
    """A step that the model has been given, and what is chosen from its logits."""

    batch: batches.Batch
    choices: Choices


class EngineCore:
    """Continuous batching over one model and one paged cache.

    `text_stream(stop)` makes the detokeniser of a request; `cache` is one that the model made before, of
    `options.blocks`.  Requests are known by id from `add` until their
    last output or `abort`, whichever is first; after that no block is held for them.
    """

    def __init__(
        self,
        model: Model,
        options: EngineOptions,
        text_stream: Callable[[tuple[str, ...]], TextStream],
        clock: Callable[[], float],
        cache: object = None,
    ):
        self.options = options
        self.counters = Counters()
        cost = options.policy.cost
        self.pool = BlockPool(options.blocks, options.block_size, options.eviction, cost.pair_over_token)
        self._model = model
        self._cache = model.new_cache(options.blocks) if cache is None else cache
        reuse = options.reuse
        segments = None if reuse is None else Segments(self.pool, model, self._cache, reuse)
        tree = DocumentTree(self.pool, cost.pair_over_token)
        room = min(options.max_context_tokens, self.pool.capacity * self.pool.block_size)
        self.documents = Documents(self.pool, tree, segments, room, text_stream)
        copy = self._copy_beginning if hasattr(model, "copy") else None
        self.scheduler = Scheduler(self.pool, options.policy, self.documents.replan, segments, copy)
        self._text_stream = text_stream
        self._choose = choose
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._epochs: dict[str, int] = {}
        self._in_flight: Launched | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def add(
        self,
        request_id: str,
        prompt: list[int] | Parts,
        sampling: Sampling,
        scope: str,
        seed: int,
        *,
        priority: int = 0,
        grammar: Grammar | None = None,
        drafter: Drafter | None = None,
        order: DocumentOrder | None = None,
        reuse: DocumentReuse | None = None,
    ) -> None:
        """Queue a request; the lower `priority`, the more urgent.  The documents of a `prompt` in parts are put into
        the `order` asked for, or that of the options, and reused so or as the options say.  Raises RequestRefused,
        PromptTooLong or Overloaded, and then nothing has changed."""
        parts = prompt if isinstance(prompt, Parts) else None
        ranks = () if parts is None else parts.ranks
        tokens = prompt if parts is None else parts.tokens(ranks)
        self.check_fits(len(tokens), sampling.max_tokens)
        if reuse == "segments" and self.documents.segments is None:
            raise RequestRefused('document_reuse "segments" is switched off here: its operator sets it in [backend]')
        if request_id in self._sequences:
            raise RequestRefused(f"request id {request_id!r} is already running")
        if len(self.scheduler.waiting) >= self.options.max_queued:
            raise Overloaded(f"{len(self.scheduler.waiting)} requests are waiting already: try again later")
        sequence = Sequence(
            request_id=request_id,
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            sampling=sampling,
            root=self._root(scope),
            text=self._text_stream(sampling.stop),
            seed=seed if sampling.seed is None else sampling.seed,
            arrived=self._clock(),
            priority=priority,
            grammar=grammar,
            drafter=drafter,
            parts=parts,
            ordering=order or self.options.order,
            order=ranks,
        )
        self.documents.replan(sequence)
        compiled = [] if reuse == "prefix" else self.documents.reuse(sequence)
        for each in (*compiled, sequence):
            self._sequences[each.request_id] = each
            self.scheduler.add(each)

    def expect(self, parts: Parts, scope: str) -> None:
        """Note that the documents of `parts` will be asked for: they are no strangers when they are."""
        self.documents.expect(self._root(scope), parts, self._clock())

    def _root(self, scope: str) -> BlockName:
        return root_name(self.options.identity, scope, str(self._epochs.get(scope, 0)))

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        """Refuse at once what could never be served."""
        if prompt_tokens == 0:
            raise RequestRefused("the prompt is empty")
        if max_tokens < 1:
            raise RequestRefused(f"max_tokens must be at least 1, got {max_tokens}")
        needed = prompt_tokens + max_tokens
        if needed > self.options.max_context_tokens:
            raise PromptTooLong(needed, self.options.max_context_tokens)
        if needed > self.pool.capacity * self.pool.block_size:
            raise PromptTooLong(needed, self.pool.capacity * self.pool.block_size, "KV cache")

    def abort(self, request_id: str) -> Output | None:
        """Forget a request in whatever state it is and free its blocks; its last output, None for an unknown id."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        self._release(sequence)
        self.counters.aborted_requests += 1
        output = Output(request_id, finish="abort")
        _account(sequence, output)
        return output

    def revoke(self, scope: str) -> None:
        """No request that comes after this finds a block that was computed in `scope` before it, as when the people
        of a scope, or what they may read, have changed.  What runs already goes on."""
        self._epochs[scope] = self._epochs.get(scope, 0) + 1

    def step(self) -> list[Output]:
        """Advance every scheduled request; a failure is delivered to the requests of its step and to no others.  With
        `overlap` the news are those of the step launched before, unless the host had to have a say in this one."""
        now = self._clock()
        earlier, self._in_flight = self._in_flight, None
        plan = self.scheduler.schedule(now)
        for scheduled in plan:
            if scheduled.sequence.scheduled is None:
                scheduled.sequence.scheduled = now
        launched, refused = None, None
        if plan:
            try:
                launched = self._launch(plan, earlier)
            except Exception as error:
                log.exception("a step of %d requests failed", len(plan))
                refused = error
        outputs = self._land(earlier) if earlier is not None else []
        if refused is not None:
            return outputs + self._fail_all([s.sequence for s in plan], refused)
        if launched is None:
            return outputs
        if not self.options.overlap or self._host_has_a_say(launched.batch.sampled):
            return outputs + self._land(launched)
        for row, scheduled in enumerate(launched.batch.sampled):
            if self._runs(scheduled.sequence):
                self.scheduler.commit(scheduled)
                scheduled.sequence.tokens.append(-1 - row)
                scheduled.sequence.owed = True
        self._in_flight = launched
        return outputs

    def _launch(self, plan: list[Scheduled], earlier: Launched | None) -> Launched:
        batch = batches.build(plan, self.pool.block_size)
        sampled = (earlier.choices.tokens,) if earlier is not None and earlier.batch.sampled else ()
        logits = self._model.forward(batch.tokens, batch.attention, self._cache, batch.wanted, *sampled)
        choices = self._choose(logits, batch.sampled)
        self.counters.steps += 1
        self.counters.computed_tokens += len(batch.tokens)
        for scheduled in batch.unfinished:
            self.scheduler.commit(scheduled)
        return Launched(batch, choices)

    def _host_has_a_say(self, sampled: list[Scheduled]) -> bool:
        """Whether what follows depends on tokens that the host must see first."""
        guesses = self.scheduler.drafts_each(len(sampled))
        return any(
            adjusts(s.sequence)
            or s.sequence.sampling.logprobs is not None
            or s.drafts
            or (guesses and s.sequence.drafter is not None)
            for s in sampled
        )

    def _land(self, step: Launched) -> list[Output]:
        """Wait for the tokens of `step`; the news of its requests, but those that have ended meanwhile."""
        try:
            step.choices.wait()
        except Exception as error:
            log.exception("a step of %d requests failed on the device", len(step.batch.sampled))
            self.pool.forget()
            whose = [*step.batch.sampled, *step.batch.unfinished]
            return self._fail_all([s.sequence for s in whose], error)
        outputs, row = [], 0
        for scheduled in step.batch.sampled:
            if self._runs(scheduled.sequence):
                output = self._advance(scheduled, step.choices, row)
                if not scheduled.sequence.compiles:
                    outputs.append(output)
            row += 1 + len(scheduled.drafts)
        return outputs

    def _runs(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request_id) is sequence

    def _advance(self, scheduled: Scheduled, choices: Choices, row: int) -> Output:
        """Choose the next tokens of a sequence, whose logits begin at `row`: as many as its drafts were right, and
        one.  What goes wrong with one request is its own failure."""
        sequence, drafts, counted = scheduled.sequence, scheduled.drafts, scheduled.sequence.owed
        output = Output(sequence.request_id)
        accepted = 0
        try:
            for draft in (*drafts, None):
                token = choices.token(row + accepted, sequence)
                if token is None:
                    # its keys and values may be as broken as its logits: nothing stored is trusted any more
                    self.pool.forget()
                    raise ArithmeticError("the model produced no finite logits")
                self._append(sequence, token, output, choices, row + accepted)
                if output.finish or token != draft:
                    break
                accepted += 1
            if drafts:
                sequence.drafter.learn(len(drafts), accepted)
                self.counters.drafted_tokens += len(drafts)
                self.counters.accepted_tokens += accepted
            if counted:  # when it was launched, but for a block's last token that nobody knew
                self.scheduler.publish(sequence)
            else:
                self.scheduler.commit(scheduled, rejected=len(drafts) - accepted)
            if output.finish:
                output.text += sequence.text.flush()
                self._finish(sequence, output)
            if output.text:
                output.tokens, sequence.untold = sequence.untold, 0
        except Exception as error:
            log.exception("request %s failed after its step", sequence.request_id)
            return self._fail(sequence, error)
        return output

    def _append(self, sequence: Sequence, token: int, output: Output, choices: Choices, row: int) -> None:
        """One more token: its text, and whether it is the last."""
        sampling = sequence.sampling
        if sampling.logprobs is not None:
            output.logprobs += (choices.logprob(row, token, sampling.logprobs),)
        if sequence.owed:
            sequence.tokens[-1], sequence.owed = token, False
        else:
            sequence.tokens.append(token)
        sequence.untold += 1
        ended = token in sampling.stop_token_ids or (token in self.options.eos_token_ids and not sampling.ignore_eos)
        if not ended:
            output.text += sequence.text.push(token)
            ended = sequence.grammar is not None and sequence.grammar.accept(token)
        if ended or sequence.text.stopped:
            output.finish = "stop"
        elif sequence.generated >= sampling.max_tokens:
            output.finish = "length"

    def _finish(self, sequence: Sequence, output: Output) -> None:
        del self._sequences[sequence.request_id]
        self._release(sequence)
        _account(sequence, output)
        if sequence.compiles:
            return
        self.counters.finished_requests += 1
        self.counters.prompt_tokens += sequence.prompt_tokens
        self.counters.cached_tokens += sequence.cached_tokens
        self.counters.reordered_requests += sequence.order != tuple(range(len(sequence.order)))
        if sequence.reuse is not None:
            self.counters.approximate_tokens += sequence.reuse.approximate
            self.counters.recomputed_tokens += sequence.reuse.again
        self.counters.generated_tokens += sequence.generated

    def _fail_all(self, sequences: list[Sequence], cause: Exception) -> list[Output]:
        """The last news of those that still run."""
        failed = [(s, self._fail(s, cause)) for s in sequences if self._runs(s)]
        return [output for sequence, output in failed if not sequence.compiles]

    def _fail(self, sequence: Sequence, cause: Exception) -> Output:
        if self._sequences.pop(sequence.request_id, None) is not None:
            self._release(sequence)
        self.counters.failed_requests += 1
        error = GenerationFailed(f"the step that held this request failed ({type(cause).__name__}): try again")
        return Output(sequence.request_id, finish="abort", error=error)

    def _release(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.documents.leave(sequence, self.scheduler.waiting)

    def _copy_beginning(self, source: int, target: int, count: int) -> None:
        within, size = torch.arange(count), self.pool.block_size
        self._model.copy(self._cache, source * size + within, target * size + within)

    @property
    def slots(self) -> tuple[int, int]:
        """(used, allocated) cache slots of all running requests, shared blocks counted once.  From any thread."""
        owned: dict[int, int] = {}
        size = self.pool.block_size
        for sequence in list(self.scheduler.running.values()):  # a copy: the engine may be in the middle of a step
            for i, block in enumerate(sequence.blocks):
                owned[block] = max(owned.get(block, 0), min(size, sequence.computed - i * size))
        return sum(owned.values()), len(owned) * size


def _account(sequence: Sequence, output: Output) -> None:
    """What a request that ends has used and waited; the wait is None where it never ran."""
    reuse = sequence.reuse
    output.usage = Usage(
        sequence.prompt_tokens,
        sequence.generated,
        sequence.cached_tokens,
        0 if reuse is None else reuse.approximate,
        0 if reuse is None else reuse.again,
    )
    output.queued_seconds = None if sequence.scheduled is None else sequence.scheduled - sequence.arrived
