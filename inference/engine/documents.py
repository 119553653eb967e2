"""The documents of the engine's prompts: in which order they stand, and which of them are reused at other places."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from inference.backend import Sampling
from inference.engine.blocks import BlockName
from inference.engine.detokenizer import TextStream
from inference.engine.ordering import DocumentTree, Parts
from inference.engine.segments import Segments
from inference.engine.sequence import Sequence


class Documents:
    """Plans the documents of sequences from their arrival to their end.

    `room`: the most tokens of a sequence.  Without `segments` documents are reused in their prefix alone.
    """

    def __init__(
        self,
        tree: DocumentTree,
        segments: Segments | None,
        room: int,
        text_stream: Callable[[tuple[str, ...]], TextStream],
    ):
        self.tree = tree
        self.segments = segments
        self._room = room
        self._text_stream = text_stream
        self._compiling: set[str] = set()

    def expect(self, root: BlockName, parts: Parts, now: float) -> None:
        """Note that the documents of `parts` will be asked for: they are no strangers when they are."""
        if self.segments is not None:
            self.segments.plan(root, parts, parts.ranks, now)

    def replan(self, sequence: Sequence) -> None:
        """Put the documents of a sequence that has not begun into the order that is best by now."""
        if sequence.reuse is not None and self.segments.missing(sequence.reuse):
            sequence.reuse = None  # evicted meanwhile: it computes them itself
        parts = sequence.parts
        if parts is None or sequence.scheduled is not None or sequence.reuse is not None:
            return
        if sequence.path and sequence.ordering != "planned":  # what the cache holds does not matter to it
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
        sequence.reuse = self.segments.plan(sequence.root, sequence.parts, sequence.order, sequence.arrived)
        begun: list[Sequence] = []
        if sequence.reuse is not None and max(len(s.compiled) for s in sequence.reuse.spans) + 2 > self._room:
            sequence.reuse = None
        for span in self.segments.missing(sequence.reuse) if sequence.reuse is not None else ():
            name = f"document {span.names[-1].hex()}"
            sequence.reuse.awaits.add(name)
            if name in self._compiling:
                continue
            self._compiling.add(name)
            begun.append(
                Sequence(
                    request_id=name,
                    tokens=[*span.compiled, span.compiled[-1]],  # a token more, so that all blocks are full
                    prompt_tokens=len(span.compiled) + 1,
                    sampling=Sampling(max_tokens=1, ignore_eos=True),
                    root=sequence.root,
                    text=self._text_stream(()),
                    seed=0,
                    arrived=sequence.arrived,
                    priority=sequence.priority,
                    compiles=True,
                )
            )
        return begun

    def leave(self, sequence: Sequence, waiting: Iterable[Sequence]) -> None:
        """A sequence has ended: if it computed a document, nobody of those `waiting` awaits it any more."""
        self.tree.leave(sequence.path)
        if not sequence.compiles:
            return
        self._compiling.discard(sequence.request_id)
        for other in waiting:
            if other.reuse is not None:
                other.reuse.awaits.discard(sequence.request_id)
