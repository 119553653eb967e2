"""Products with rounded weights in Triton against the rounded values' own product in float64."""

from __future__ import annotations

import pytest
import torch

from kernels import rounding
from kernels.gpu import multiply, packed
from kernels.rounding import FP8
from tests.kernels.gpu.conftest import DEVICE, normal

SHAPES = [(48, 128), (200, 576), (64, 1536)]  # outputs, inputs
ROWS = (1, 5, 70)


def relative(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_rounded_as_in_torch(dtype: torch.dtype, x_dtype: torch.dtype):
    x = (normal(5, 576) * torch.logspace(-3, 2, 5)[:, None].to(normal(1).device)).to(x_dtype)
    x[3] = 0
    rounded, scales = multiply.round_rows(x, dtype)
    expected, expected_scales = rounding.round_rows(x, dtype)
    assert torch.equal(scales, expected_scales)
    step = 1 if dtype == torch.int8 else 32  # of the largest FP8 numbers; a quotient may fall on the other side
    difference = (rounded.float() - expected.float()).abs()
    assert difference.max() <= step
    assert (difference > 0).float().mean() < 0.01
    x[1, 7] = float("nan")
    assert multiply.round_rows(x, dtype)[1].isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
def test_rounded_on_both_sides(shape: tuple[int, int], rows: int, dtype: torch.dtype):
    x, weight = normal(rows, shape[1]), rounding.round_weight(normal(*shape, seed=1), dtype)
    bias = normal(shape[0], seed=2) if rows == 5 else None
    rounded, scales = multiply.round_rows(x, dtype)
    exact = (rounded.double() * scales.double()[:, None]) @ weight.values().double().T
    exact = exact if bias is None else exact + bias.double()
    result = multiply.multiply_rounded(x, weight, bias)
    tolerance = 1e-3 if DEVICE == "cuda" and dtype == FP8 else 1e-6  # tensor cores add a tile's products in 14 bits
    assert relative(result, exact) < tolerance
    planted = weight._replace(scales=weight.scales * (1 + 20 * tolerance))
    assert relative(multiply.multiply_rounded(x, planted, bias), exact) > 5 * tolerance
    loss = relative(result, x.double() @ normal(*shape, seed=1).double().T + (0 if bias is None else bias.double()))
    assert 1e-3 < loss < 0.06


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["int4, groups of 32", "int4, groups of 64", "mxfp4", "int4, one group"])
def test_four_bit_weights(shape: tuple[int, int], rows: int, kind: str):
    x, whole = normal(rows, shape[1]), normal(*shape, seed=1)
    weight = (
        rounding.round_mxfp4(whole)
        if kind == "mxfp4"
        else rounding.round_int4(whole, shape[1] if kind.endswith("group") else int(kind[-2:]))
    )
    bias = normal(shape[0], seed=2) if rows == 5 else None
    exact = x.double() @ weight.values().double().T + (0 if bias is None else bias.double())
    result = packed.multiply_packed(x, weight, bias)
    assert relative(result, exact) < 3e-6
    swapped = weight._replace(packed=weight.packed.roll(1, 2))
    assert relative(packed.multiply_packed(x, swapped, bias), exact) > 1e-2
    assert 0.03 < relative(weight.values(), whole.double()) < 0.2
    in_bf16 = packed.multiply_packed(x.bfloat16(), weight, None if bias is None else bias.bfloat16())
    assert relative(in_bf16, exact) < 1e-2


def test_packing_is_undone():
    q = torch.randint(0, 16, (24, 192), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ones = torch.ones(6, 24)
    packed = rounding.pack(q, ones, torch.zeros_like(ones, dtype=torch.uint8))
    assert packed.shape == (24, 192)
    assert packed.group == 32
    assert torch.equal(packed.values(), q.float())
    with pytest.raises(ValueError, match="multiple of 16"):
        rounding.pack(q[:, :40], ones[:1], None)


def test_mxfp4_keeps_what_it_can_say():
    values = torch.tensor(rounding.FP4_VALUES).repeat(2) * 0.25
    assert torch.equal(rounding.round_mxfp4(values[None].repeat(16, 1)).values(), values[None].repeat(16, 1))
