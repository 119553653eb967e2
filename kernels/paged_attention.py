"""Paged attention: `store` this step's keys and values, then `attend` over each sequence's blocks.

Chooses the C++ kernel where it was built and fits, the torch reference elsewhere; both have the contract of
`kernels.reference`.
"""

from __future__ import annotations

import torch

from kernels import native, reference
from kernels.cache import LayerCache
from kernels.plan import AttentionPlan


def store(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan) -> None:
    library = native.load() if native.supports(cache) else None
    if library is None:
        reference.store(cache, keys, values, plan)
    else:
        native.store(library, cache, keys, values, plan)


def attend(
    query: torch.Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None = None
) -> torch.Tensor:
    library = native.load() if native.supports(cache) else None
    if library is None:
        return reference.attend(query, cache, plan, scale, window)
    return native.attend(library, query, cache, plan, scale, window)
