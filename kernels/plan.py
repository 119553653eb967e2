"""Where a step's queries find their keys and values: planned once on the host, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

BLOCK_SIZE = 16
FEW_TOKENS = 8  # a sequence with at most so many query tokens in a step is a decode, with or without guesses


@dataclass(slots=True)
class AttentionPlan:
    """One step's flat batch: `tokens` query tokens of `seqs` sequences, prefill chunks and decodes together.

    query_start    [seqs + 1] int32   sequence s owns query tokens query_start[s] : query_start[s + 1]
    context_lens   [seqs] int32       tokens of s in the cache once this step has written its own; the queries
                                      of s are the last ones of its context, so causality follows from both
    block_tables   [seqs, width] int32   blocks of s in order; entries past its context are never read
    slot_mapping   [tokens] int64     where each token's K and V go: block * BLOCK_SIZE + offset; -1 nowhere
    positions      [tokens] int64     position of each token, for rotary embedding
    few_sequences, few_tokens         the batch begins with so many sequences of at most FEW_TOKENS query tokens
                                      each, so many query tokens in all

    A context is one run of blocks at their own positions.  What several sequences share, perhaps at other positions
    than it was computed at, is planned beside it: `kernels.segments.SharedPlan`.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    few_sequences: int
    few_tokens: int

    @property
    def decode_only(self) -> bool:
        """Every sequence has exactly one query token."""
        return len(self.positions) == len(self.context_lens)

    def to(self, device: torch.device | str) -> AttentionPlan:
        tensors = {name: value for name in self.__slots__ if isinstance(value := getattr(self, name), torch.Tensor)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})

    @classmethod
    def of(
        cls, queries: list[int], contexts: list[int], tables: np.ndarray, block_size: int = BLOCK_SIZE
    ) -> AttentionPlan:
        """The plan of sequences with so many `queries` at the end of their `contexts`, over the blocks `tables`
        [seqs, width] int32; those of at most FEW_TOKENS queries come first."""
        lengths, ends = np.array(queries, dtype=np.int32), np.array(contexts, dtype=np.int32)
        query_start = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])
        few = int((lengths <= FEW_TOKENS).sum())
        assert (lengths[:few] <= FEW_TOKENS).all(), "sequences with few query tokens come first"
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(len(sequence)) + (ends - query_start[1:])[sequence]
        slots = tables[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
        return cls(
            query_start=torch.from_numpy(query_start),
            context_lens=torch.from_numpy(ends),
            block_tables=torch.from_numpy(tables),
            slot_mapping=torch.from_numpy(slots),
            positions=torch.from_numpy(positions),
            few_sequences=few,
            few_tokens=int(query_start[few]),
        )
