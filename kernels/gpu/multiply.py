"""Products with rounded weights in Triton: FP8 and int8 on both sides, four-bit weights alone.

Both kernels walk the inputs in tiles and keep float32 sums.  A decode has few rows, and its time is the time to read
the weights: then SPLITS programs share the inputs of a tile of outputs, so that enough of them read at once, and a
second kernel adds their sums in order.  The number of splits follows from the weight's shape and from whether the rows
are few, never from what else is in the batch.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.gpu import stages
from kernels.rounding import FP8, LARGEST, LEAST_SCALE, Packed, Rounded

FEW_ROWS = 64
PROGRAMS = 512  # a few for each multiprocessor
TILE_K = 128
VECTOR_N, VECTOR_WARPS = 32, 2  # outputs and warps of a program, for one row


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

    return _split(x, outputs, inputs, bias, launch, PROGRAMS)


@functools.cache
def _vendor_multiplies(device: torch.device, outputs: int, inputs: int) -> bool:
    """Whether NVIDIA's own product of FP8 matrices takes these: from Hopper on it is quicker for many rows."""
    there = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
    return there and outputs % 16 == 0 and inputs % 16 == 0


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
    return _split(x, outputs, inputs, bias, launch, programs, VECTOR_N if one else 64)


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


def _split(x, outputs: int, inputs: int, bias, launch, programs: int, block_n: int = 64) -> torch.Tensor:
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
