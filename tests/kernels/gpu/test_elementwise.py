"""The Triton kernels between the matrix products against torch; each tolerance is shown to catch a planted bug."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu import elementwise
from tests.kernels.gpu.conftest import normal
from tests.kernels.test_paged_attention import worst

ROWS = (1, 3, 17)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.016}  # relative to numbers around 1; bf16 has 8 bits


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("width", [64, 576])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("residual", [True, False])
def test_norm(dtype: torch.dtype, rows: int, width: int, residual: bool):
    hidden, weight = normal(rows, width).to(dtype), normal(width, seed=1).to(dtype)
    delta = normal(rows, width, seed=2).to(dtype) if residual else None
    ours, theirs = hidden.clone(), hidden.clone()
    expected = reference.add_rms_norm(theirs, delta, weight, 1e-5)
    result = elementwise.add_rms_norm(ours, delta, weight, 1e-5)
    assert torch.equal(ours, theirs), "the sum is what the next layer adds to: the same bits"
    tolerance = TOLERANCE[dtype] * 4  # numbers up to about 4
    assert worst(result, expected) < tolerance
    assert worst(reference.add_rms_norm(hidden * 1.1, None, weight, 0.3), expected) > 2 * tolerance


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [96, 1500])
def test_silu(dtype: torch.dtype, rows: int, width: int):
    x = (normal(rows, 2 * width) * 4).to(dtype)
    x[0, :4] = torch.tensor([-80.0, 80.0, 0.0, -0.0])
    result, expected = elementwise.silu_mul(x), reference.silu_mul(x.double())
    tolerance = TOLERANCE[dtype] * expected.abs().clamp(min=1)
    assert ((result.double() - expected).abs() <= tolerance).all()
    swapped = reference.silu_mul(x.double().roll(width, 1))
    assert ((swapped - expected).abs() > 2 * tolerance).any()
