"""Which token comes next, chosen where the logits are: no round trip to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import gpu, reference


class SamplingRows(NamedTuple):
    """How each row is sampled, tensors [rows] on the device of the logits.

    temperature  float32   0: the best token
    top_k        int32     0: all
    top_p        float32   1: all
    min_p        float32   0: all
    seed         int64
    position     int64     of the token to be drawn: a draw depends on (seed, position) alone
    allowed      [rows, ceil(vocab / 32)] int32: bit i % 32 of word i // 32 allows token i (llguidance's and XGrammar's
                 mask); None allows all
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    allowed: torch.Tensor | None = None


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Tokens [rows] int64 for logits [rows, vocab]; -1 for a row with NaN or without a token that may be drawn."""
    if gpu.serves(logits):
        from kernels.gpu import sampling

        return sampling.sample(logits, rows)
    return reference.sample(logits, rows)
