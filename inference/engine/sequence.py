"""One request inside the engine: its tokens, how many of them are computed, and the blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from inference.backend import Sampling
from inference.engine.blocks import BlockName, extend_names
from inference.engine.detokenizer import TextStream
from inference.engine.ordering import Node, Parts
from inference.engine.segments import Reuse
from inference.prompt import DocumentOrder


class Grammar(Protocol):
    """What an answer must be, and how much of it is there."""

    def forbid(self, logits: torch.Tensor) -> None:
        """Set the logits [vocab] of tokens that may not come next to -inf."""

    def accept(self, token: int) -> bool:
        """Note the next token; True when nothing may follow but the end."""


class Drafter(Protocol):
    """Guesses what comes next, so that one step can check several tokens."""

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`; none where there is no good guess."""

    def learn(self, proposed: int, accepted: int) -> None:
        """How many of the last proposal were right."""


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` = prompt and what was generated.  `computed` of them have their keys and values in `blocks`, or will by
    the end of the step in flight.  Where that step chooses the last token, it is `owed`: -1 - its row of the step.
    A prompt of documents has `parts`, in an `order` that may change until it is scheduled; `path` holds it in the tree.
    `reuse`: of documents at other places than they were computed at.

    Everything the scheduler does is progress of `computed` towards len(tokens): a prefill, a chunk of one,
    a decode (one token behind) and a restart after preemption (computed = 0) are the same thing.
    """

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    sampling: Sampling
    root: BlockName
    text: TextStream
    seed: int
    arrived: float = 0.0
    priority: int = 0
    grammar: Grammar | None = None
    drafter: Drafter | None = None
    scheduled: float | None = None
    computed: int = 0
    cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    names: list[BlockName] = field(default_factory=list)
    published: int = 0
    preemptions: int = 0
    owed: bool = False
    parts: Parts | None = None
    ordering: DocumentOrder = "relevance"
    order: tuple[int, ...] = ()
    path: list[Node] = field(default_factory=list)
    reuse: Reuse | None = None
    compiles: bool = False  # a document for others: nobody is told of it
    untold: int = 0  # tokens since the last text that was given out
    _table: tuple[list[int], np.ndarray] = ([], np.zeros(0, dtype=np.int32))  # `blocks`, and what `table` made of them

    @property
    def pending(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed - self._skipped(self.computed, len(self.tokens))

    @property
    def publishable(self) -> int:
        """Tokens from the beginning that are computed exactly, or will be by the end of the step in flight."""
        return self.computed if self.reuse is None else min(self.computed, self.reuse.exact)

    def end_of(self, start: int, tokens: int) -> int:
        """Where `tokens` tokens end that are computed from `start` on."""
        end = start + tokens
        if self.reuse is not None:
            for first, last in self.reuse.skips:
                if start <= first < end:
                    end += last - first
        return end

    def runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """What is computed from `start` to `end`, as (start, end) of tokens that stand side by side."""
        runs = []
        for first, last in self.reuse.skips if self.reuse is not None else ():
            if start <= first < end:
                if start < first:
                    runs.append((start, first))
                start = last
        return [*runs, (start, end)] if start < end else runs

    def _skipped(self, start: int, end: int) -> int:
        return 0 if self.reuse is None else sum(b - a for a, b in self.reuse.skips if start <= a < end)

    @property
    def known(self) -> int:
        return len(self.tokens) - self.owed

    @property
    def generated(self) -> int:
        """Tokens that are known, after the prompt."""
        return self.known - self.prompt_tokens

    @property
    def complete(self) -> bool:
        """Nothing is to be computed any more, whatever the token that is owed may be."""
        return len(self.tokens) - self.prompt_tokens >= self.sampling.max_tokens

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt_tokens and self.pending == 1

    def table(self) -> np.ndarray:
        """`blocks` as int32; only those that were added since the last step are converted."""
        of, table = self._table
        if of is not self.blocks or len(table) > len(of):
            table = np.array(self.blocks, dtype=np.int32)
        elif len(table) < len(of):
            table = np.concatenate([table, np.array(of[len(table) :], dtype=np.int32)])
        self._table = self.blocks, table
        return table

    def block_names(self, block_size: int) -> list[BlockName]:
        """The names of all full blocks whose tokens are known, hashed once each."""
        extend_names(self.names, self.root, self.tokens, self.known, block_size)
        return self.names
