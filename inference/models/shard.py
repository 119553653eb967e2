"""A part of a model: tensor parallelism as Megatron-LM's (Shoeybi et al. 2019).

Each of `size` processes holds some heads and some of the MLP's inner width of every layer, and the whole of embedding,
norms and head.  The projections into a block are cut by their outputs, those out of it by their inputs, so that a layer
needs two sums over all processes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from inference.models.config import ModelConfig, ModelError


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` of `size`; the default is the whole.  The sums go through torch.distributed's default group."""

    rank: int = 0
    size: int = 1

    def of(self, config: ModelConfig) -> ModelConfig:
        """The shape of this part.  Raises ModelError where it can't be cut so."""
        for what, count in (
            ("attention heads", config.heads), ("KV heads", config.kv_heads), ("inner width", config.intermediate_size),
        ):  # fmt: skip
            if count % self.size:
                raise ModelError(f"a model with {what} {count} can't be cut into {self.size} parts")
        return replace(
            config,
            heads=config.heads // self.size,
            kv_heads=config.kv_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
        )

    def outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """This part of the outputs of a weight [out, in], or of a bias [out]."""
        return weight.chunk(self.size)[self.rank]

    def inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """This part of the inputs of a weight [out, in]."""
        return weight.chunk(self.size, 1)[self.rank]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all parts' x, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


WHOLE = Shard()
