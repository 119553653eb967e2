"""The documents of the engine's prompts: in which order they stand, and which of them are reused at other places."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from inference.backend import Sampling
from inference.engine.blocks import BlockName, BlockPool
from inference.engine.detokenizer import TextStream
from inference.engine.ordering import DocumentTree, Parts
from inference.engine.segments import Reuse, Segments, Span
from inference.engine.sequence import Sequence


class Documents:
    """Plans the documents of sequences from their arrival to their end.

    `room`: the most tokens of a sequence.  Without `segments` documents are reused in their prefix alone.
    """

    def __init__(
        self,
        pool: BlockPool,
        tree: DocumentTree,
        segments: Segments | None,
        room: int,
        text_stream: Callable[[tuple[str, ...]], TextStream],
    ):
        self._pool = pool
        self.tree = tree
        self.segments = segments
        self._room = room
        self._text_stream = text_stream
        self._compiling: dict[str, Sequence] = {}

    def expect(self, root: BlockName, parts: Parts, now: float) -> None:
        """Note that the documents of `parts` will be asked for: they are no strangers when they are."""
        if self.segments is not None:
            self.segments.plan(root, parts, parts.ranks, now)

    def replan(self, sequence: Sequence) -> None:
        """Put the documents of a sequence that has not begun into the order that is best by now."""
        if sequence.reuse is not None and self._missing(sequence):
            sequence.reuse = None  # evicted meanwhile: it computes them itself
        parts = sequence.parts
        if parts is None or sequence.scheduled is not None or sequence.reuse is not None:
            return
        if sequence.path and sequence.ordering in ("relevance", "canonical"):  # what the cache holds is all one to them
            return
        held, sequence.path = sequence.path, []
        self.tree.leave(held)  # what it holds itself is not there yet
        order = self.tree.plan(sequence.root, parts, sequence.ordering).order
        if order != sequence.order:
            tokens = parts.tokens(order)
            if len(tokens) + sequence.sampling.max_tokens > self._room:  # by its hint
                order, tokens = sequence.order, sequence.tokens
            sequence.order, sequence.tokens, sequence.prompt_tokens = order, tokens, len(tokens)
            sequence.names = []
        sequence.path = self.tree.hold(sequence.root, parts, order)

    def reuse(self, sequence: Sequence) -> list[Sequence]:
        """Have `sequence` reuse its documents where that saves work.  It awaits those that no blocks hold; of these the
        ones that nobody computes yet, each as a sequence of its own."""
        if self.segments is None or sequence.parts is None:
            return []
        reuse = self.segments.plan(sequence.root, sequence.parts, sequence.order, sequence.arrived)
        if reuse is None or not self._fits(sequence, reuse):
            return []
        sequence.reuse = reuse
        begun = []
        for span in self._missing(sequence):
            name = span.request_id
            reuse.awaits.add(name)
            if name not in self._compiling:
                begun.append(self._compile(name, span, sequence))
            compiled = self._compiling[name]
            compiled.priority = min(compiled.priority, sequence.priority)
        return begun

    def _compile(self, name: str, span: Span, asker: Sequence) -> Sequence:
        tokens = span.compiled(self._pool.block_size)
        tokens.append(tokens[-1])  # one more, so that all blocks are full
        self._compiling[name] = Sequence(
            request_id=name,
            tokens=tokens,
            prompt_tokens=len(tokens),
            sampling=Sampling(max_tokens=1, ignore_eos=True),
            root=asker.root,
            text=self._text_stream(()),
            seed=0,
            arrived=asker.arrived,
            priority=asker.priority,
            compiles=True,
        )
        return self._compiling[name]

    def _fits(self, sequence: Sequence, reuse: Reuse) -> bool:
        """Whether there is room for the sequence beside all that it copies from: else it would wait for ever."""
        block = self._pool.block_size
        copied = {name for span in reuse.spans for name in span.names}
        own = len(sequence.tokens) + sequence.sampling.max_tokens
        longest = max(len(span.names) for span in reuse.spans)
        return own + len(copied) * block <= self._pool.capacity * block and (longest + 1) * block <= self._room

    def _missing(self, sequence: Sequence) -> list[Span]:
        """The documents that `sequence` would copy and that no blocks hold."""
        block = self._pool.block_size
        prefix = len(self._pool.match(sequence.block_names(block))) * block
        return self.segments.missing(sequence.reuse, prefix)

    def leave(self, sequence: Sequence, waiting: Iterable[Sequence]) -> None:
        """A sequence has ended: if it computed a document, nobody of those `waiting` awaits it any more."""
        self.tree.leave(sequence.path)
        if not sequence.compiles:
            return
        self._compiling.pop(sequence.request_id, None)
        for other in waiting:
            if other.reuse is not None:
                other.reuse.awaits.discard(sequence.request_id)
