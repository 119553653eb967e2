"""Paged attention: `store` this step's keys and values, then `attend` over each sequence's blocks.

Chooses the Triton kernel on a GPU, the C++ kernel on a CPU where it was built and fits, the torch reference elsewhere;
all have the contract of `kernels.reference`.
"""

from __future__ import annotations

import torch

from kernels import gpu, native, reference
from kernels.cache import LayerCache
from kernels.plan import AttentionPlan


def store(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan) -> None:
    if gpu.serves(keys):
        from kernels.gpu import writing

        writing.store(cache, keys, values, plan)
    elif library := native.supports(cache) and native.load():
        native.store(library, cache, keys, values, plan)
    else:
        reference.store(cache, keys, values, plan)


def attend(
    query: torch.Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None = None
) -> torch.Tensor:
    if gpu.serves(query):
        from kernels.gpu import attention

        return attention.attend(query, cache, plan, scale, window)
    if library := native.supports(cache) and native.load():
        return native.attend(library, query, cache, plan, scale, window)
    return reference.attend(query, cache, plan, scale, window)
