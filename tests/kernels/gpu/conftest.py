"""Where the Triton kernels are checked: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import LayerCache

pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def empty(blocks: int, kv_heads: int, dim: int, dtype: torch.dtype) -> LayerCache:
    """A cache of zeros, laid out as on a GPU."""
    cache = LayerCache.empty(blocks, kv_heads, dim, dtype, DEVICE)
    cache = cache._replace(keys=cache.keys.contiguous())
    for tensor in cache:
        if tensor is not None:
            tensor.view(torch.uint8).zero_()
    return cache


@pytest.fixture(autouse=True)
def casts_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.6 to 3.7) cuts float32 off where a GPU rounds it to bf16, loses the carry on the way to
    FP8, and multiplies matrices of bf16 by their bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }
    bits = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.uint16), 32: (np.uint32, torch.uint32)}

    def convert(data, source, target, rounding):
        flat, unsigned = np.frombuffer(data.tobytes(), bits[source.primitive_bitwidth][0]), target.primitive_bitwidth
        values = torch.from_numpy(flat.copy()).view(dtypes[source]).to(dtypes[target])
        return values.view(bits[unsigned][1]).numpy().reshape(data.shape)

    def wide(operand):
        known = operand.dtype.scalar in dtypes
        return interpreter.TensorHandle(convert(operand.data, operand.dtype.scalar, tl.float32, None).view(np.float32),
                                        tl.float32) if known else operand  # fmt: skip

    def create_dot(self, a, b, d, precision, imprecise):
        return dot(self, wide(a), wide(b), d, precision, imprecise)

    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
