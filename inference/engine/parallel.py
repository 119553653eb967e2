"""One engine over a model in several processes: the leader schedules and samples, the followers compute what it tells
them.

What a step reads goes from the leader to all in one broadcast of bytes on the CPU; the sums inside the model go through
whatever the devices have between them.  A step is the same on every process, so the followers keep no state but the
cache.  A process that fails in the middle of a step leaves the others without its sums, so the engine ends with it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from inference.engine.inputs import Buffer, Shape, carve, size_of
from kernels import AttentionPlan

STOP = -1


class Leader:
    """`model`, this process' part, as the whole: `forward` has the followers compute theirs."""

    def __init__(self, model):
        self._model = model
        self._buffer = Buffer(0, torch.device("cpu"))
        self.config = model.config

    def new_cache(self, blocks: int) -> object:
        return self._model.new_cache(blocks)

    def forward(self, tokens: torch.Tensor, plan: AttentionPlan, cache: object, wanted: torch.Tensor) -> torch.Tensor:
        """As `Llama.forward`."""
        shape = Shape.of(tokens, plan, wanted)
        self._buffer.send(tokens, plan, wanted, shape)
        dist.broadcast(torch.tensor(shape), 0)
        dist.broadcast(self._buffer.bytes(shape), 0)
        return self._model.forward(tokens, plan, cache, wanted)

    def close(self) -> None:
        """The followers return."""
        dist.broadcast(torch.full((len(Shape._fields),), STOP), 0)


def follow(model, cache: object) -> None:
    """Compute each step of the leader over `model`, this process' part, and its `cache`, until the leader closes."""
    while True:
        header = torch.empty(len(Shape._fields), dtype=torch.int64)
        dist.broadcast(header, 0)
        shape = Shape(*header.tolist())
        if shape.tokens == STOP:
            return
        received = torch.empty(size_of(shape), dtype=torch.uint8)
        dist.broadcast(received, 0)
        inputs = carve(received, shape)
        model.forward(inputs.tokens, inputs.plan, cache, inputs.wanted)
