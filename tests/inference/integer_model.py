"""A model whose next token is a hash of what it reads through the block tables.

Every slot remembers a hash of (scope, the tokens up to it): like keys and values it depends on all that came
before, and, unlike them, on whose request computed it.  Any wrong block, slot, length, order or owner changes the
next token with near certainty, so schedules can be compared for exact equality: `expected` says what any correct
engine must generate.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import torch

from inference import Sampling
from inference.engine.core import EngineCore, EngineOptions
from inference.engine.device import told
from inference.engine.ordering import Parts
from inference.engine.sampler import Choices
from inference.engine.scheduler import Policy, Scheduled
from inference.engine.sequence import Sequence
from kernels import BLOCK_SIZE, FEW_TOKENS

VOCABULARY = 97
EOS = 0
UNWRITTEN = -1
POLICY = {field.name for field in dataclasses.fields(Policy)}


def origin(scope: str) -> int:
    """What stands before the first token of a request."""
    return zlib.crc32(scope.encode())


def stored(before: int, token: int) -> int:
    """What a token leaves in its slot."""
    return zlib.crc32(before.to_bytes(4, "little") + token.to_bytes(4, "little"))


def chain(scope: str, tokens: list[int]) -> list[int]:
    """What all slots of a sequence hold once it is computed."""
    seen = [origin(scope)]
    for token in tokens:
        seen.append(stored(seen[-1], token))
    return seen[1:]


def next_token(seen: list[int]) -> int:
    return zlib.crc32(b"".join(value.to_bytes(4, "little") for value in seen)) % (VOCABULARY - 1) + 1


def expected(prompt: list[int], count: int, scope: str = "public") -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(chain(scope, tokens)))
    return tokens[len(prompt) :]


class IntegerModel:
    """`before_step` may raise, to break a step before anything is written; `after_step` once all is written.
    A sequence that begins with a token in `poisoned` gets logits without a number."""

    def __init__(self, before_step: Callable[[], None] = lambda: None, block_size: int = BLOCK_SIZE):
        self.before_step = before_step
        self.after_step: Callable[[], None] = lambda: None
        self.block_size = block_size
        self.poisoned: set[int] = set()
        self.scope_of: dict[str, str] = {}
        self.planned: list[Scheduled] = []
        self.cache: list[int] = []
        self.wrong: list[str] = []  # what was noticed while a step ran

    def new_cache(self, blocks: int) -> list[int]:
        self.cache = [UNWRITTEN] * (blocks * self.block_size)
        return self.cache

    def forward(self, tokens, plan, cache, wanted, sampled=None):
        self.before_step()
        if sampled is not None:
            tokens = told(tokens, sampled)
        self._must(bool((tokens >= 0).all()), "was given a token that nobody had chosen")
        logits = torch.zeros(len(wanted), VOCABULARY)
        row_of = {row: i for i, row in enumerate(wanted.tolist())}
        tokens, starts, written = tokens.tolist(), plan.query_start.tolist(), plan.slot_mapping.tolist()
        self._must(len(self.planned) == len(plan.context_lens), "the batch has other sequences than the plan")
        sequences = []
        for s, context in enumerate(plan.context_lens.tolist()):  # all writes come before all reads, as in a layer
            table = plan.block_tables[s].tolist()
            slots = [table[i // self.block_size] * self.block_size + i % self.block_size for i in range(context)]
            first = context - (starts[s + 1] - starts[s])
            self._must(slots[first:] == written[starts[s] : starts[s + 1]], "writes elsewhere than it will read")
            scope = self.scope_of.get(self.planned[s].sequence.request_id, "public")
            before = cache[slots[first - 1]] if first else origin(scope)
            for slot, token in zip(slots[first:], tokens[starts[s] : starts[s + 1]], strict=True):
                self._must(before != UNWRITTEN, "read a slot that nobody wrote")
                cache[slot] = before = stored(before, token)
            sequences.append((first, slots, starts[s]))
        for first, slots, start in sequences:
            for position in range(first, len(slots)):
                if (i := row_of.get(start + position - first)) is None:
                    continue
                seen = [cache[slot] for slot in slots[: position + 1]]
                self._must(UNWRITTEN not in seen, "read a slot that nobody wrote")
                logits[i, next_token(seen)] = 1.0
                if tokens[start] in self.poisoned:
                    logits[i].fill_(float("nan"))
        self.after_step()
        return logits

    def copy(self, cache, source, target):
        for at, to in zip(source.tolist(), target.tolist(), strict=True):
            self._must(cache[at] != UNWRITTEN, "copied a slot that nobody wrote")
            cache[to] = cache[at]

    def _must(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)
            raise AssertionError(what)


class LateChoices(Choices):
    """As on a GPU: no token can be read before it was waited for, but the next step may have it."""

    def __init__(self, logits: torch.Tensor, sampled: list[Scheduled]):
        super().__init__(logits)
        best, tokens = logits.max(-1)
        self.tokens = tokens.where(best.isfinite(), -1)
        self._came = False

    def wait(self) -> None:
        self._came = True

    def token(self, row: int, sequence: Sequence) -> int | None:
        assert self._came, "read a token before it came"
        return super().token(row, sequence)


class TokensAsText:
    """A text stream that writes token ids, each followed by a space."""

    def __init__(self, stop=()):
        self.stopped = False

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def make_core(blocks: int = 64, model: IntegerModel | None = None, **options) -> EngineCore:
    """`options` of EngineOptions and of Policy."""
    policy = {"max_tokens": 256, "min_chunk": 1} | {k: options.pop(k) for k in POLICY if k in options}
    ticks = iter(range(10**9))
    model = model or IntegerModel(block_size=options.pop("block_size", BLOCK_SIZE))
    core = EngineCore(
        model,
        EngineOptions(
            identity="integers",
            blocks=blocks,
            block_size=model.block_size,
            max_context_tokens=options.pop("max_context_tokens", 4096),
            eos_token_ids=frozenset({EOS}),
            policy=Policy(**policy),
            **options,
        ),
        text_stream=TokensAsText,
        clock=lambda: float(next(ticks)),
    )
    core._choose = LateChoices
    schedule = core.scheduler.schedule

    def noted(now: float) -> list[Scheduled]:
        model.planned = sorted(schedule(now), key=lambda s: s.tokens > FEW_TOKENS)  # in the order of a batch
        return model.planned

    core.scheduler.schedule = noted  # the model must know whose rows it is given
    return core


def add(
    core: EngineCore, request_id: str, prompt: list[int] | Parts, max_tokens: int = 8, scope: str = "public", **more
) -> None:
    core._model.scope_of[request_id] = scope
    core.add(request_id, prompt, Sampling(max_tokens=max_tokens), scope, seed=0, **more)


def drain(core: EngineCore, each_step: Callable[[], None] = lambda: None) -> dict[str, list]:
    """Step until idle; outputs by request.  The pool is checked after every step."""
    outputs: dict[str, list] = {}
    while core.has_work:
        made = core.step()
        for output in made:
            outputs.setdefault(output.request_id, []).append(output)
        core.pool.check()
        each_step()
    return outputs


def tokens_of(outputs: list) -> list[int]:
    return [int(t) for output in outputs for t in output.text.split()]
