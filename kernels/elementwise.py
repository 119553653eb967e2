"""What stands between the matrix products of a decoder layer, each one pass over its rows.

Chooses the Triton kernels on a GPU, the C++ kernels on a CPU where they were built and fit, the torch reference
elsewhere; all have the contract that stands here.  Rows are float32 or bf16 (float64 in the reference), arithmetic is
float32, and the result is rounded once.
"""

from __future__ import annotations

import torch

from kernels import gpu, native, reference
from kernels.cache import LayerCache
from kernels.plan import AttentionPlan


def add_rms_norm(hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add `delta` into `hidden` [..., width], in place, and return the sum's RMSNorm (Zhang and Sennrich 2019) times
    `weight` [width]: what vLLM calls fused_add_rms_norm."""
    if gpu.serves(hidden):
        from kernels.gpu import elementwise

        return elementwise.add_rms_norm(hidden, delta, weight, eps)
    library = native.load() if native.takes_rows(hidden, weight, *([] if delta is None else [delta])) else None
    if library is None:
        return reference.add_rms_norm(hidden, delta, weight, eps)
    return native.add_rms_norm(library, hidden, delta, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate_up [rows, 2 * width], the gate first: [rows, width] (SwiGLU, Shazeer 2020)."""
    if gpu.serves(gate_up):
        from kernels.gpu import elementwise

        return elementwise.silu_mul(gate_up)
    library = native.load() if native.takes_rows(gate_up) and gate_up.shape[1] % (2 * native.LANES) == 0 else None
    return reference.silu_mul(gate_up) if library is None else native.silu_mul(library, gate_up)


def rotate_and_store(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
) -> torch.Tensor:
    """Turn queries and keys by their positions (Su et al. 2021), write keys and values into their slots, and return the
    turned queries.  query [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim], tokens may be
    strided; cos and sin [positions, head_dim] in the cache's dtype, the first half of sin negated."""
    if gpu.serves(query):
        from kernels.gpu import writing

        return writing.rotate_and_store(query, keys, values, cos, sin, cache, plan)
    library = native.load() if native.rotates(cache, (cos, sin), query, keys, values) else None
    if library is None:
        return reference.rotate_and_store(query, keys, values, cos, sin, cache, plan)
    return native.rotate_and_store(library, query, keys, values, cos, sin, cache, plan)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] in int8 with a scale for each row: uint8 around 128, and scales [rows] float32."""
    library = native.load() if native.takes_rows(x) else None
    return reference.quantize_rows(x) if library is None else native.quantize_rows(library, x)


def scale_rows(x: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x [rows, width] float32 times scales [rows], plus bias [width] float32, in `dtype`."""
    fits = native.takes_rows(x) and dtype in (torch.float32, torch.bfloat16)
    library = native.load() if fits else None
    if library is None:
        return reference.scale_rows(x, scales, bias, dtype)
    return native.scale_rows(library, x, scales, bias, dtype)
