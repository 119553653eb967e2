"""Checkpoints whose weights were rounded before they were published: AWQ, GPTQ, FP8 and compressed-tensors, as they lie
on Hugging Face.  A layer is read as a plain weight, or as what `kernels.multiply` takes.

    format                          tensors of a layer
    awq (gemm)                      qweight [in, out / 8] int32, eight outputs in a word in AWQ's order; qzeros, scales
    gptq (4 bits, no act order)     qweight [in / 8, out] int32, eight inputs in a word; qzeros, scales
    fp8 (blocks), as DeepSeek's     weight [out, in] FP8, weight_scale_inv [out / 128, in / 128]
    compressed-tensors              weight in FP8 or int8 with weight_scale [out, 1] or [1]; or weight_packed
                                    [out, in / 8] int32 with weight_scale [out, in / group], weight_zero_point
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inference.models.config import ModelError
from kernels import rounding
from kernels.rounding import FP8, Packed, Rounded

Stored = torch.Tensor | Rounded | Packed
Read = Callable[[str], torch.Tensor | None]  # a tensor by its whole name
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output the first, second, ... four bits of a word hold


def check(config: dict[str, Any]) -> None:
    """Raises ModelError for a kind of rounding that the engine doesn't read; `config` is config.json's
    quantization_config."""
    method = str(config.get("quant_method", "none"))
    bits = config.get("bits", config.get("w_bit", 4))
    if method in ("awq", "gptq") and bits == 4:
        if config.get("desc_act"):
            raise ModelError("GPTQ with act order (desc_act) is not supported: take a checkpoint without it, or AWQ")
        if config.get("version", "gemm").lower() != "gemm" and method == "awq":
            raise ModelError(f"AWQ version {config['version']!r} is not supported: take one in version gemm")
        return
    if method == "fp8" or (method == "compressed-tensors" and config.get("format") in _COMPRESSED):
        return
    known = "awq and gptq with 4 bits, fp8, and compressed-tensors (" + ", ".join(_COMPRESSED) + ")"
    told = f"{method} {config.get('format', '')}".strip() + (f" with {bits} bits" if method in ("awq", "gptq") else "")
    raise ModelError(f"the checkpoint is rounded as {told}; the engine reads {known}")


_COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


def linear(read: Read, name: str, config: dict[str, Any]) -> Stored | None:
    """The weight of the layer `name`, whichever way it is stored; None if there is none."""
    if (words := read(f"{name}.qweight")) is not None:
        zeros, scales = read(f"{name}.qzeros"), read(f"{name}.scales")
        if config["quant_method"] == "awq":
            return _awq(words, zeros, scales)
        return _gptq(words, zeros, scales, less=config.get("checkpoint_format") != "gptq_v2")
    if (words := read(f"{name}.weight_packed")) is not None:
        return _packed(words, read(f"{name}.weight_scale"), read(f"{name}.weight_zero_point"))
    weight = read(f"{name}.weight")
    if weight is None or weight.dtype not in (FP8, torch.int8):
        return weight
    if (scales := read(f"{name}.weight_scale_inv")) is not None:
        return _blocks(weight, scales)
    scales = read(f"{name}.weight_scale")
    if scales is None:
        raise ModelError(f"{name} holds rounded weights without their scales (weight_scale)")
    return Rounded(weight, scales.float().reshape(-1).expand(len(weight)).contiguous())


def to(stored: Stored, device: torch.device, dtype: torch.dtype) -> Stored:
    """On `device`; a plain weight in `dtype`, rounded ones as they are."""
    if isinstance(stored, torch.Tensor):
        return stored.to(device, dtype)
    return type(stored)(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in stored))


def join(parts: list[Stored]) -> Stored:
    """Layers that read the same inputs as one, their outputs side by side."""
    if isinstance(parts[0], Packed):
        zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts], 1)
        scales = torch.cat([part.scales for part in parts], 1)
        return Packed(torch.cat([part.packed for part in parts], 1), scales, zeros, parts[0].inputs)
    if isinstance(parts[0], Rounded):
        weight = torch.cat([part.weight.view(torch.uint8) for part in parts]).view(parts[0].weight.dtype)
        return Rounded(weight, torch.cat([part.scales for part in parts]))
    return torch.cat(parts)


def _nibbles(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """words [rows, count] int32 as [rows, count * 8] uint8; `order[i]` is where the i-th four bits belong."""
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(order)] = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 15).to(torch.uint8).flatten(1)


def _awq(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Packed:
    q = _nibbles(words, AWQ_ORDER).T.contiguous()
    return rounding.pack(q, scales, _nibbles(zeros, AWQ_ORDER))


def _gptq(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, less: bool) -> Packed:
    """`less`: zeros are stored less one, as in GPTQ's first format."""
    q = _nibbles(words.T.contiguous())
    return rounding.pack(q, scales, _nibbles(zeros) + int(less))


def _packed(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> Packed:
    q = _nibbles(words)
    scales = scales.T
    if zeros is None:
        offsets = torch.full(scales.shape, 8, dtype=torch.uint8)
    else:  # packed along the outputs
        offsets = _nibbles(zeros.T.contiguous())[:, : scales.shape[1]]
    return rounding.pack(q, scales, offsets)


def _blocks(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Square blocks with a scale each, as plain float32: no kernel takes them, so they are rounded again where that is
    asked for."""
    rows, columns = (-(-n // s) for n, s in zip(weight.shape, scales.shape, strict=True))
    whole = scales.float().repeat_interleave(rows, 0)[: weight.shape[0]]
    return weight.float() * whole.repeat_interleave(columns, 1)[:, : weight.shape[1]]
