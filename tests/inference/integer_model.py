"""A model whose next token is a hash of what it reads through the block tables.

Any wrong block, slot, length or order changes the next token with near certainty, so schedules can be compared
for exact equality: `expected` says what any correct engine must generate.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from inference import Sampling
from inference.engine.core import EngineCore, EngineOptions
from kernels import BLOCK_SIZE

VOCABULARY = 97
EOS = 0


def stored(before: int, token: int) -> int:
    """What a token leaves in its slot: like keys and values, it depends on every token before it."""
    return zlib.crc32(before.to_bytes(4, "little") + token.to_bytes(4, "little"))


def next_token(seen: list[int]) -> int:
    return zlib.crc32(b"".join(value.to_bytes(4, "little") for value in seen)) % (VOCABULARY - 1) + 1


def expected(prompt: list[int], count: int) -> list[int]:
    tokens, seen = list(prompt), []
    for _ in range(count):
        for token in tokens[len(seen) :]:
            seen.append(stored(seen[-1] if seen else 0, token))
        tokens.append(next_token(seen))
    return tokens[len(prompt) :]


class IntegerModel:
    """`before_step` may raise, to break a step."""

    def __init__(self, before_step: Callable[[], None] = lambda: None):
        self.before_step = before_step
        self.poisoned: set[int] = set()

    def new_cache(self, blocks: int) -> torch.Tensor:
        return torch.full((blocks, BLOCK_SIZE), -1)

    def forward(self, tokens, plan, cache, wanted):
        self.before_step()
        logits = torch.zeros(len(wanted), VOCABULARY)
        row_of = {row: i for i, row in enumerate(wanted.tolist())}
        starts = plan.query_start.tolist()
        contexts = []
        for s, context in enumerate(plan.context_lens.tolist()):
            slots = (plan.block_tables[s].long()[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:context]
            contexts.append(slots)
            first = context - (starts[s + 1] - starts[s])
            assert slots[first:].tolist() == plan.slot_mapping[starts[s] : starts[s + 1]].tolist()
            before = int(cache.view(-1)[slots[first - 1]]) if first else 0
            for slot, token in zip(slots[first:], tokens[starts[s] : starts[s + 1]].tolist(), strict=True):
                assert before >= 0, "read a slot that nobody wrote"
                before = stored(before, token)
                cache.view(-1)[slot] = before
        for s, slots in enumerate(contexts):
            if (i := row_of.get(starts[s + 1] - 1)) is not None:
                seen = cache.view(-1)[slots].tolist()
                assert -1 not in seen, "read a slot that nobody wrote"
                logits[i, next_token(seen)] = 1.0
                if int(tokens[starts[s]]) in self.poisoned:
                    logits[i].fill_(float("nan"))
        return logits


class TokensAsText:
    """A text stream that writes token ids, each followed by a space."""

    def __init__(self, stop=()):
        self.stopped = False

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def make_core(blocks: int = 64, model: IntegerModel | None = None, **options) -> EngineCore:
    ticks = iter(range(10**9))
    return EngineCore(
        model or IntegerModel(),
        EngineOptions(
            identity="integers",
            blocks=blocks,
            max_context_tokens=options.pop("max_context_tokens", 4096),
            eos_token_ids=frozenset({EOS}),
            **options,
        ),
        text_stream=TokensAsText,
        clock=lambda: float(next(ticks)),
    )


def add(core: EngineCore, request_id: str, prompt: list[int], max_tokens: int = 8, scope: str = "public") -> None:
    core.add(request_id, prompt, Sampling(max_tokens=max_tokens), scope, seed=0)


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
