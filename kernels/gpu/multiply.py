"""Products with FP8 and int8 on both sides in Triton, and what they share with `kernels.gpu.packed`.

A kernel walks the inputs in tiles and keeps float32 sums.  A decode has few rows, and its time is the time to read the
weights: then SPLITS programs share the inputs of a tile of outputs, so that enough of them read at once, and a second
kernel adds their sums in order.  The number of splits follows from the weight's shape and from how many rows there are
(for 8 bits only from whether they are few), never from what the rows hold.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.gpu import stages
from kernels.rounding import FP8, LARGEST, LEAST_SCALE, Rounded

FEW_ROWS = 64
PROGRAMS = 512  # a few for each multiprocessor
TILE_K = 128


def round_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.rounding.round_rows`, in one pass over each row."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(width)
    _round_rows[(rows,)](
        x,
        out,
        scales,
        WIDTH=width,
        PADDED=padded,
        LARGEST=LARGEST[dtype],
        LEAST=LEAST_SCALE,
        INTEGERS=dtype == torch.int8,
        num_warps=min(max(padded // 512, 1), 16),
    )
    return out, scales


@triton.jit
def _round_rows(
    x,
    out,
    scales,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    values = tl.load(x + row * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 0), LARGEST), LEAST)
    broken = tl.sum((values != values).to(tl.int32), 0)
    scale = tl.where(broken > 0, float("nan"), scale)  # a maximum may pass over NaN
    tl.store(scales + row, scale)
    values = tl.div_rn(values, scale)
    if INTEGERS:
        values = tl.where(values >= 0, tl.floor(values + 0.5), tl.ceil(values - 0.5))
    tl.store(out + row * WIDTH + i, values.to(out.dtype.element_ty), mask=i < WIDTH)


def multiply_rounded(x: torch.Tensor, weight: Rounded, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, inputs] rounded as the weight is, times its transpose, plus bias [outputs]: [rows, outputs], x's
    dtype."""
    rounded, scales = round_rows(x.contiguous(), weight.weight.dtype)
    outputs, inputs = weight.weight.shape
    fp8 = weight.weight.dtype == FP8 and x.dtype == torch.bfloat16
    if fp8 and len(x) > FEW_ROWS and _vendor_multiplies(x.device, outputs, inputs):
        by_row, by_output = scales[:, None], weight.scales[None, :]
        out = torch._scaled_mm(rounded, weight.weight.t(), by_row, by_output, out_dtype=x.dtype)
        return out if bias is None else out + bias

    def launch(out, splits, block_m, block_n, partial):
        _multiply_rounded[(triton.cdiv(len(x), block_m), triton.cdiv(outputs, block_n), splits)](
            rounded,
            weight.weight,
            scales,
            weight.scales,
            out if bias is None else bias,
            out,
            len(x),
            outputs,
            INPUTS=inputs,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=TILE_K,
            SPLITS=splits,
            BIASED=bias is not None and not partial,
            PARTIAL=partial,
            num_warps=4 if block_m < 64 else 8,
            num_stages=stages(4 if block_m < 64 else 3),
        )

    return split(x, outputs, inputs, bias, launch, PROGRAMS)


@functools.cache
def _vendor_multiplies(device: torch.device, outputs: int, inputs: int) -> bool:
    """Whether NVIDIA's own product of FP8 matrices takes these: from Hopper on it is quicker for many rows."""
    there = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
    return there and outputs % 16 == 0 and inputs % 16 == 0


def split(x, outputs: int, inputs: int, bias, launch, programs: int, block_n: int = 64) -> torch.Tensor:
    """Launch with the tiles that suit the rows; where they are few, in parts over the inputs that are then added."""
    out = x.new_empty(len(x), outputs)
    if len(x) > FEW_ROWS:
        launch(out, 1, 64, 128, False)
        return out
    block_m = max(16, triton.next_power_of_2(len(x)))
    wanted = programs // triton.cdiv(outputs, block_n)
    splits = min(max(1, triton.next_power_of_2(wanted)), max(1, inputs // (2 * TILE_K)))
    if splits == 1:
        launch(out, 1, block_m, block_n, False)
        return out
    parts = torch.empty(splits, len(x), outputs, dtype=torch.float32, device=x.device)
    launch(parts, splits, block_m, block_n, True)
    _add_parts[(len(x), triton.cdiv(outputs, 512))](
        parts,
        parts if bias is None else bias,
        out,
        len(x),
        outputs,
        SPLITS=splits,
        BLOCK=512,
        BIASED=bias is not None,
        num_warps=2,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _add_parts(parts, bias, out, rows, outputs, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(SPLITS):
        total += tl.load(parts + (part * rows + row) * outputs + n, mask=mask, other=0.0)
    if BIASED:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + n, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _put(total, bias, out, m, n, rows, outputs, BIASED: tl.constexpr, PARTIAL: tl.constexpr):
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    if BIASED:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if PARTIAL:
        out += tl.program_id(2).to(tl.int64) * rows * outputs
    tl.store(out + m.to(tl.int64)[:, None] * outputs + n[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _multiply_rounded(
    x,
    weight,
    x_scales,
    weight_scales,
    bias,
    out,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    # All rows for one tile of the weight, then the next: x stays in the cache, and the weight is read once.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_m, is_n = m < rows, n < outputs
    TILES: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    low = tl.program_id(2) * TILES // SPLITS
    high = (tl.program_id(2) + 1) * TILES // SPLITS
    INTEGERS: tl.constexpr = weight.dtype.element_ty == tl.int8
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGERS else tl.float32)
    for tile in range(low, high):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        is_k = k < INPUTS
        a = tl.load(x + m.to(tl.int64)[:, None] * INPUTS + k[None, :], mask=is_m[:, None] & is_k[None, :], other=0.0)
        b = tl.load(
            weight + n.to(tl.int64)[:, None] * INPUTS + k[None, :], mask=is_n[:, None] & is_k[None, :], other=0.0
        )
        if INTEGERS:
            total = tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)
        else:  # Hopper's tensor cores add FP8 products in 14 bits: not more than a tile of them
            total = tl.dot(a, tl.trans(b), total, max_num_imprecise_acc=BLOCK_K)
    scale = tl.load(x_scales + m, mask=is_m, other=0.0)[:, None] * tl.load(weight_scales + n, mask=is_n, other=0.0)
    _put(total.to(tl.float32) * scale, bias, out, m, n, rows, outputs, BIASED, PARTIAL)
