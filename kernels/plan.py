"""Where a step's queries find their keys and values: planned once on the host, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_SIZE = 16


@dataclass(slots=True)
class AttentionPlan:
    """One step's flat batch: `tokens` query tokens of `seqs` sequences, prefill chunks and decodes together.

    query_start    [seqs + 1] int32   sequence s owns query tokens query_start[s] : query_start[s + 1]
    context_lens   [seqs] int32       tokens of s in the cache once this step has written its own; the queries
                                      of s are the last ones of its context, so causality follows from both
    block_tables   [seqs, width] int32   blocks of s in order; entries past its context are never read
    slot_mapping   [tokens] int64     where each token's K and V go: block * BLOCK_SIZE + offset
    positions      [tokens] int64     position of each token, for rotary embedding
    decode_only    every sequence has exactly one query token

    A context is one run of blocks at their own positions.  Documents reused at another position will add a
    shift per block here (the rotary difference belongs to the query, never to the stored keys), and nothing
    else has to know.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    decode_only: bool
