"""What stands between the matrix products of a decoder layer, in Triton: one pass over the rows each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SILU_BLOCK = 1024


def add_rms_norm(hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.reference.add_rms_norm`: the sum is rounded to the rows' dtype, the norm is taken of what was
    rounded, in float32, and rounded once."""
    out = torch.empty_like(hidden)
    width = hidden.shape[-1]
    padded = triton.next_power_of_2(width)
    _add_rms_norm[(hidden.numel() // width,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        out,
        eps,
        WIDTH=width,
        PADDED=padded,
        ADDS=delta is not None,
        num_warps=min(max(padded // 512, 1), 16),
    )
    return out


@triton.jit
def _add_rms_norm(hidden, delta, weight, out, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADDS: tl.constexpr):
    i = tl.arange(0, PADDED)
    mask = i < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + i
    x = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        total = (x + tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(hidden + at, total, mask=mask)
        x = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (x * scale * w).to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.silu_mul`, in float32, rounded once."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _silu_mul[(rows, triton.cdiv(width, SILU_BLOCK))](gate_up, out, WIDTH=width, BLOCK=SILU_BLOCK, num_warps=4)
    return out


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)
