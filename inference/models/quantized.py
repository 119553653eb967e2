"""Linear layers with rounded weights, named as vLLM and compressed-tensors name them: bits of the weights, bits of what
they multiply.

On a CPU the products are torch's and oneDNN's: W8A8 for throughput, W8A16 and W4A16 for a stream by itself.  On a GPU
they are `kernels.multiply`'s: FP8 and W8A8 round both sides, W4A16 and MXFP4 the weights alone.  What rounding
costs on a CPU is measured by `python -m loadtests.quantization`.
"""

from __future__ import annotations

import torch

import kernels
from inference.models.config import ModelError
from inference.models.linear import WIDE_ROWS, Linear, padded
from inference.models.published import Stored
from kernels import rounding
from kernels.rounding import Packed, Rounded

CPU_KINDS = ("none", "w8a8", "w8a16", "w4a16")
GPU_KINDS = ("none", "fp8", "w8a8", "w4a16", "mxfp4")
GROUP = 32  # inputs that share a scale in W4A16
NARROW_ROWS = {"w8a16": 4, "w4a16": 8}  # up to here torch's products of rounded weights gain on a plain one


def linear(kind: str, weight: Stored, bias: torch.Tensor | None, rows: str, dtype: torch.dtype | None = None):
    """A layer of `kind` for weight [out, in], where it is; `rows` as for `Linear`.  A weight that was published rounded
    stays so on a GPU; on a CPU the values that it stands for are multiplied, in `dtype`.  Raises ModelError where
    `kind` can't be had."""
    if not isinstance(weight, torch.Tensor):
        if kind != "none":
            raise ModelError(f'the checkpoint is rounded already: quantization = "{kind}" has to be "none"')
        if kernels.on_gpu(torch.empty(0, dtype=dtype, device=weight[0].device)):
            return OnGpu(weight, bias)
        return Linear(weight.values().to(dtype), bias, rows)
    if kind == "none":
        return Linear(weight, bias, rows)
    on_gpu = kernels.on_gpu(weight)
    where, kinds = ("a GPU", GPU_KINDS) if on_gpu else ("a CPU", CPU_KINDS)
    if kind not in kinds:
        raise ModelError(f'quantization = "{kind}" does not run on {where}: choose one of {", ".join(kinds)}')
    outputs, inputs = weight.shape
    if kind in ("w8a16", "w4a16", "mxfp4") and (outputs % 16 or inputs % GROUP):
        raise ModelError(f'quantization = "{kind}" needs widths in multiples of {GROUP}, not {outputs} x {inputs}')
    if on_gpu:
        return OnGpu(rounded(kind, weight), bias)
    if not torch.backends.mkldnn.is_available():
        raise ModelError(f'quantization = "{kind}" needs oneDNN on a CPU, which this torch is without: use "none"')
    return W8A8(weight, bias) if kind == "w8a8" else WeightOnly(kind, weight, bias, rows)


def rounded(kind: str, weight: torch.Tensor) -> Rounded | Packed:
    """weight [out, in] as one of GPU_KINDS."""
    if kind in ("fp8", "w8a8"):
        return rounding.round_weight(weight, rounding.FP8 if kind == "fp8" else torch.int8)
    wide = 128 if weight.shape[1] % 128 == 0 else GROUP  # as AWQ's and GPTQ's files have them
    return rounding.round_mxfp4(weight) if kind == "mxfp4" else rounding.round_int4(weight, wide)


class OnGpu:
    """y = x W^T + b with rounded W, by `kernels.multiply`.  x [tokens, in]; y in x's dtype."""

    def __init__(self, weight: Rounded | Packed, bias: torch.Tensor | None = None):
        self._weight, self._bias = weight, bias
        self._multiply = kernels.multiply_packed if isinstance(weight, Packed) else kernels.multiply_rounded

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self._weight, self._bias)


class W8A8:
    """y = x W^T + b with W in int8, a scale for each output channel, and x rounded to int8 on the way in, a scale for
    each token (dynamic: SmoothQuant's and vLLM's "per-channel, per-token").  Half the bytes of bf16 to read, and int8
    dot products where the processor has them.  x [tokens, in], float32 or bf16; y in x's dtype.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        rounded, self._scale = _int8(weight.float())
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zero = torch.zeros(len(weight), dtype=torch.int32)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Unsigned around 128: without AMX the processor multiplies u8 by s8, and oneDNN has no fast path for two s8.
        rows = len(x)
        rounded, scales = kernels.quantize_rows(x if rows < WIDE_ROWS else padded(x, x.dtype))
        y = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 128, self._weight, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return kernels.scale_rows(y, scales, self._bias, x.dtype)[:rows]


class WeightOnly:
    """y = x W^T + b with W in int8 (a scale for each output) or int4 (a scale and a zero for each GROUP inputs), x as
    it is.  Few rows read the rounded weights, half or a quarter of the bytes; more rows multiply the same rounded
    values in the model's dtype: the same but for the order of sums in float32, and one more rounding of each in bf16.
    """

    def __init__(self, kind: str, weight: torch.Tensor, bias: torch.Tensor | None, rows: str):
        self._bias, self._narrow_rows = bias, NARROW_ROWS[kind]
        if kind == "w8a16":
            self._rounded, self._scale = _int8(weight)
            values = self._rounded * self._scale.float()[:, None]
            self._multiply = self._multiply_int8
        else:
            values = self._pack_int4(weight)
            self._multiply = self._multiply_int4
        self._whole = Linear(values.to(weight.dtype), bias, rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self._narrow_rows:
            return self._whole(x)
        y = self._multiply(x)
        return y if self._bias is None else y + self._bias

    def _multiply_int8(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x, self._rounded, self._scale)

    def _multiply_int4(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self._packed, GROUP, self._scale)

    def _pack_int4(self, weight: torch.Tensor) -> torch.Tensor:
        """Round to 4 bits and return the values that they stand for, [out, in] float32: (q - 8) * scale + zero."""
        outputs, inputs = weight.shape
        grouped = weight.float().view(outputs, inputs // GROUP, GROUP)
        low, high = grouped.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-9).to(weight.dtype)
        zero = (low + 8 * scale.float()).to(weight.dtype)
        q = ((grouped - zero.float()) / scale.float()).round().add(8).clamp(0, 15)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.view(outputs, inputs).to(torch.int32), 1)
        self._scale = torch.cat([scale, zero], dim=2).transpose(0, 1).contiguous()  # [groups, out, 2]
        return ((q - 8) * scale.float() + zero.float()).view(outputs, inputs)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] as int8, and its scales [out] in the weight's dtype."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12).to(weight.dtype)
    return (weight.float() / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8), scale
