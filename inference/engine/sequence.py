"""One request inside the engine: its tokens, how many of them are computed, and the blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from inference.backend import FinishReason, Sampling
from inference.engine.blocks import BlockName, extend_names
from inference.engine.detokenizer import TextStream


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` = prompt and what was generated.  `computed` of them have their keys and values in `blocks`.

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
    scheduled: float | None = None
    computed: int = 0
    cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    names: list[BlockName] = field(default_factory=list)
    published: int = 0
    preemptions: int = 0
    untold: int = 0  # tokens since the last text that was given out
    finish: FinishReason | None = None

    @property
    def pending(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt_tokens and self.pending == 1

    def block_names(self, block_size: int) -> list[BlockName]:
        """The names of all full blocks, hashed once each."""
        extend_names(self.names, self.root, self.tokens, block_size)
        return self.names
