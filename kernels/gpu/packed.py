"""Products with four-bit weights in Triton, which the few rows of a decode take to the rows' dtype in registers.

Where the time goes is the taking apart, not the reading: a shift, a mask and a subtraction for each weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.gpu import stages
from kernels.gpu.multiply import FEW_ROWS, split
from kernels.rounding import Packed

VECTOR_N, VECTOR_WARPS = 32, 2  # outputs and warps of a program, for one row


def multiply_packed(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, inputs] times the transpose of four-bit weights, plus bias [outputs]: [rows, outputs] in x's dtype.
    Few rows take the weights to x's dtype tile by tile, in registers; for more, all are written out in x's dtype once
    and multiplied as any others."""
    outputs, inputs = weight.shape
    if len(x) > FEW_ROWS:
        return F.linear(x, unpack(weight, x.dtype), bias)
    x = x.contiguous()
    one = len(x) == 1
    span = weight.group // 16
    each = 8 if span % 8 == 0 else span if 8 % span == 0 else 1  # sixteens of a tile that are surely in one group

    def launch(out, splits, block_m, block_n, partial):
        kernel = _multiply_vector if one else _multiply_packed
        kernel[(triton.cdiv(len(x), block_m), triton.cdiv(outputs, block_n), splits)](
            x,
            weight.packed,
            weight.scales,
            weight.scales if weight.zeros is None else weight.zeros,
            out if bias is None else bias,
            out,
            len(x),
            outputs,
            INPUTS=inputs,
            GROUP=weight.group,
            EACH=each,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            SPLITS=splits,
            FP4=weight.zeros is None,
            BIASED=bias is not None and not partial,
            PARTIAL=partial,
            num_warps=VECTOR_WARPS if one else 4,
            num_stages=stages(3),
        )

    programs = 2048 if one else 1024 if len(x) <= 16 else 512  # the parts of many rows take long to write and to add
    return split(x, outputs, inputs, bias, launch, programs, VECTOR_N if one else 64)


def unpack(weight: Packed, dtype: torch.dtype) -> torch.Tensor:
    """What four-bit weights stand for, [outputs, inputs] in `dtype`."""
    outputs, inputs = weight.shape
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.packed.device)
    _unpack[(len(weight.packed), triton.cdiv(outputs, 64))](
        weight.packed,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        out,
        outputs,
        INPUTS=inputs,
        GROUP=weight.group,
        BLOCK_N=64,
        FP4=weight.zeros is None,
        num_warps=4,
    )
    return out


@triton.jit
def _scales(scales, zeros, sixteen, n, is_n, outputs, GROUPS: tl.constexpr, SPAN: tl.constexpr, FP4: tl.constexpr):
    """What the weights of the outputs n are multiplied with, and what `_whole` takes off before, [outputs] float32
    each; SPAN sixteens of inputs are a group."""
    at = tl.minimum(sixteen // SPAN, GROUPS - 1) * outputs + n
    scale = tl.load(scales + at, mask=is_n, other=0).to(tl.float32)
    if FP4:
        return tl.exp2(scale - 127), scale
    return scale, 8388608.0 + tl.load(zeros + at, mask=is_n, other=0).to(tl.float32)


@triton.jit
def _whole(words, i: tl.constexpr, offset, FP4: tl.constexpr):
    """The weights in bits 4 * i of `words` [outputs, 16] before they are scaled, float32."""
    q = words >> (4 * i)
    if FP4:  # E2M1: as the top bits of a float its exponent is biased by 127, not by 1
        return (((q & 8) << 28) | ((q & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126
    # 2 ** 23 + q: a conversion would take longer
    return ((q & 15) | 0x4B000000).to(tl.float32, bitcast=True) - offset[:, None]


@triton.jit(do_not_specialize=["rows"])
def _multiply_vector(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    FP4: tl.constexpr,
    BIASED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    # One row: tensor cores would have nothing to do but wait for their operands to be laid out.
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < outputs
    j = tl.arange(0, 16)
    TILES: tl.constexpr = (INPUTS + 127) // 128
    low = tl.program_id(2) * TILES // SPLITS
    high = (tl.program_id(2) + 1) * TILES // SPLITS
    total = tl.zeros([BLOCK_N, 16], tl.float32)
    for tile in range(low, high):
        at = (tile * outputs + n.to(tl.int64))[:, None] * 16 + j[None, :]
        words = tl.load(packed + at, mask=is_n[:, None], other=0)
        for first in tl.static_range(0, 8, EACH):
            scale, offset = _scales(
                scales, zeros, tile * 8 + first, n, is_n, outputs, INPUTS // GROUP, GROUP // 16, FP4
            )
            sums = tl.zeros([BLOCK_N, 16], tl.float32)
            for i in tl.static_range(first, first + EACH):
                k = tile * 128 + i * 16 + j
                a = tl.load(x + k, mask=k < INPUTS, other=0.0).to(tl.float32)
                sums += _whole(words, i, offset, FP4) * a[None, :]
            total += sums * scale[:, None]
    result = tl.sum(total, 1)
    if BIASED:
        result += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)
    if PARTIAL:
        out += tl.program_id(2).to(tl.int64) * outputs
    tl.store(out + n, result.to(out.dtype.element_ty), mask=is_n)


@triton.jit(do_not_specialize=["rows"])
def _multiply_packed(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    FP4: tl.constexpr,
    BIASED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    # The weight stands on the left, which the tensor cores can read from registers, where its values are made.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_m, is_n = m < rows, n < outputs
    j = tl.arange(0, 16)
    TILES: tl.constexpr = (INPUTS + 127) // 128
    low = tl.program_id(2) * TILES // SPLITS
    high = (tl.program_id(2) + 1) * TILES // SPLITS
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(low, high):
        at = (tile * outputs + n.to(tl.int64))[:, None] * 16 + j[None, :]
        words = tl.load(packed + at, mask=is_n[:, None], other=0)
        for first in tl.static_range(0, 8, EACH):
            scale, offset = _scales(
                scales, zeros, tile * 8 + first, n, is_n, outputs, INPUTS // GROUP, GROUP // 16, FP4
            )
            for i in tl.static_range(first, first + EACH):
                k = tile * 128 + i * 16 + j
                mask = is_m[None, :] & (k < INPUTS)[:, None]
                a = tl.load(x + m.to(tl.int64)[None, :] * INPUTS + k[:, None], mask=mask, other=0.0)
                b = (_whole(words, i, offset, FP4) * scale[:, None]).to(a.dtype)
                total = tl.dot(b, a, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    if PARTIAL:
        out += tl.program_id(2).to(tl.int64) * rows * outputs
    at = m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_m[None, :] & is_n[:, None])


@triton.jit
def _unpack(
    packed,
    scales,
    zeros,
    out,
    outputs,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP4: tl.constexpr,
):
    tile = tl.program_id(0)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_n = n < outputs
    j = tl.arange(0, 16)
    words = tl.load(packed + (tile * outputs + n)[:, None] * 16 + j[None, :], mask=is_n[:, None], other=0)
    for i in tl.static_range(8):
        scale, offset = _scales(scales, zeros, tile * 8 + i, n, is_n, outputs, INPUTS // GROUP, GROUP // 16, FP4)
        k = tile * 128 + i * 16 + j
        values = (_whole(words, i, offset, FP4) * scale[:, None]).to(out.dtype.element_ty)
        tl.store(out + n[:, None] * INPUTS + k[None, :], values, mask=is_n[:, None] & (k < INPUTS)[None, :])
