"""The C++ kernels between the matrix products, and the product for few rows, against torch; each tolerance is shown to
catch a planted bug."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import LayerCache, native, reference
from tests.kernels.test_paged_attention import BLOCKS, plan_for, worst

ROWS = (1, 3, 40)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.016}  # relative to numbers around 1; bf16 has 8 bits
SEQUENCES = [(5, 5), (1, 17), (40, 100)]


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("residual", [True, False])
def test_norm(library, dtype, rows: int, residual: bool):
    hidden, weight = normal(rows, 576).to(dtype), normal(576, seed=1).to(dtype)
    delta = normal(rows, 576, seed=2).to(dtype) if residual else None
    exact, expected_sum = hidden.clone(), hidden.clone()
    expected = reference.add_rms_norm(expected_sum, delta, weight, 1e-5)
    result = native.add_rms_norm(library, exact, delta, weight, 1e-5)
    assert torch.equal(exact, expected_sum), "the sum is what the next layer adds to: the same bits"
    tolerance = TOLERANCE[dtype] * 4  # numbers up to about 4
    assert worst(result, expected) < tolerance
    assert worst(reference.add_rms_norm(hidden * 1.1, None, weight, 0.3), expected) > 2 * tolerance


@pytest.mark.parametrize("rows", ROWS)
def test_silu(library, dtype, rows: int):
    x = (normal(rows, 192) * 4).to(dtype)
    x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])  # the exponential of any of them is a number
    result, expected = native.silu_mul(library, x), reference.silu_mul(x.double())
    tolerance = TOLERANCE[dtype] * expected.abs().clamp(min=1)
    assert ((result.double() - expected).abs() <= tolerance).all()
    swapped = reference.silu_mul(x.double().roll(96, 1))
    assert ((swapped - expected).abs() > 2 * tolerance).any()


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_rotary_and_store(library, dtype, dim: int):
    plan = plan_for(SEQUENCES)
    tokens, heads, kv_heads = len(plan.positions), 6, 2
    qkv = normal(tokens, heads + 2 * kv_heads, dim).to(dtype)  # tokens strided, as the fused projection leaves them
    query, keys, values = qkv.split((heads, kv_heads, kv_heads), dim=1)
    cos, sin = normal(128, dim, seed=1).to(dtype), normal(128, dim, seed=2).to(dtype)

    def empty() -> LayerCache:
        cache = LayerCache.empty(BLOCKS, kv_heads, dim, dtype)
        cache.keys.zero_(), cache.values.zero_()
        return cache

    ours, theirs, planted = empty(), empty(), empty()
    assert native.rotates(ours, (cos, sin), query, keys, values)
    result = native.rotate_and_store(library, query, keys, values, cos, sin, ours, plan)
    expected = reference.rotate_and_store(query, keys, values, cos, sin, theirs, plan)
    reference.rotate_and_store(query, keys, values, cos, -sin, planted, plan)
    assert torch.equal(ours.values, theirs.values)
    tolerance = TOLERANCE[dtype] * 16  # products of two, and three roundings in the reference
    assert worst(result, expected) < tolerance
    assert worst(ours.keys, theirs.keys) < tolerance
    assert worst(planted.keys, theirs.keys) > 2 * tolerance


def test_rotary_of_a_narrow_head_runs_in_torch(library):
    plan = plan_for([(2, 2)])
    cache = LayerCache.empty(BLOCKS, 1, 80, torch.float32)
    query, key = normal(2, 1, 80), normal(2, 1, 80, seed=1)
    ones = torch.ones(4, 80)
    assert not native.rotates(cache, (ones, ones), query, key, key)
    assert torch.equal(kernels.rotate_and_store(query, key, key, ones, 0 * ones, cache, plan), query)


@pytest.mark.parametrize("rows", ROWS)
def test_rounding_to_int8_and_back(library, dtype, rows: int):
    x = (normal(rows, 576) * torch.logspace(-3, 2, rows)[:, None]).to(dtype)
    x[-1] = 0
    rounded, scales = native.quantize_rows(library, x)
    expected, expected_scales = reference.quantize_rows(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(rounded, expected)
    bias = normal(576, seed=3)
    units = rounded.float() - 128
    back = native.scale_rows(library, units, scales, bias, dtype)
    assert worst(back, reference.scale_rows(units, scales, bias, dtype)) <= TOLERANCE[dtype] * 256
    error = (native.scale_rows(library, units, scales, None, torch.float32) - x.float()).abs()
    assert (error <= 0.501 * scales[:, None]).all()


def test_a_broken_row_stays_broken(library, dtype):
    x = normal(3, 64).to(dtype)
    x[1, 7] = float("nan")
    rounded, scales = native.quantize_rows(library, x)
    assert scales.isnan().tolist() == [False, True, False]
    assert native.scale_rows(library, rounded.float(), scales, None, dtype)[1].isnan().all()


@pytest.mark.parametrize("shape", [(960, 576), (48, 1536), (3072, 96)])
def test_few_rows(library, shape: tuple[int, int]):
    weight, x = normal(*shape).bfloat16(), normal(40, shape[1], seed=1).bfloat16()
    few = kernels.FewRows.of(weight)
    if few is None:
        pytest.skip("this processor lacks AVX512-BF16")
    expected = F.linear(x.double(), weight.double())
    whole = few(x)
    tolerance = 0.004 * expected.abs().clamp(min=shape[1] ** 0.5)
    assert ((whole.double() - expected).abs() <= tolerance).all()
    planted = F.linear(x.double().roll(1, 1), weight.double())
    assert ((planted - expected).abs() > 2 * tolerance).any()
    for rows in range(1, 18):
        assert torch.equal(few(x[:rows]), whole[:rows]), "the same bits in any company"


def test_few_rows_refuses_what_it_cannot_lay_out():
    assert kernels.FewRows.of(torch.zeros(20, 32, dtype=torch.bfloat16)) is None
    assert kernels.FewRows.of(torch.zeros(32, 32)) is None
