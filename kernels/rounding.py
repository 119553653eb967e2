"""How numbers are rounded and packed, in torch: FP8, int8, groups of int4, MXFP4.  Weights are rounded once, at load,
on whatever device they are; `kernels.multiply` reads what comes out here.

Four-bit weights are packed so that a product needs no shuffling: the inputs are cut into tiles of PACK, the last filled
up with zeros, and a word of 32 bits holds every sixteenth input of a tile: word j has input 16 * i + j in its bits from
4 * i on.  So a shift and a mask of a tile's sixteen words are sixteen inputs that stand side by side, in one group.  A
tile of all outputs lies together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FP8 = torch.float8_e4m3fn
LARGEST = {FP8: 448.0, torch.int8: 127.0}
LEAST_SCALE = 1e-12
# FP4 E2M1 (OCP Microscaling Formats 1.0, table 5): the sign is the highest of four bits
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_GROUP = 32  # inputs that share a scale in MXFP4
PACK, PACK_WORDS = 128, 16


class Rounded(NamedTuple):
    """weight [outputs, inputs] in FP8 or int8, scales [outputs] float32: what it stands for is their product."""

    weight: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        return self.weight.float() * self.scales[:, None]


class Packed(NamedTuple):
    """Four-bit weights for so many `inputs`: `packed` as above, [tiles, outputs, PACK_WORDS] int32, and for each group
    of inputs `scales` [groups, outputs].

    int4     scales in a float dtype, zeros [groups, outputs] uint8: a weight is (q - zero) * scale
    MXFP4    scales uint8, the exponent of a power of two plus 127 (E8M0), zeros None: a weight is
             FP4_VALUES[q] * 2 ** (scale - 127)
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self.packed.shape[1], self.inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.inputs // len(self.scales)

    def values(self) -> torch.Tensor:
        """[outputs, inputs] float32"""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.packed.device)
        q = (self.packed[:, :, None] >> shifts[:, None]) & 15  # [tiles, outputs, 8, words]
        q = q.transpose(0, 1).flatten(1)[:, : self.inputs]
        scales = self.scales.T.repeat_interleave(self.group, 1).float()
        if self.zeros is None:
            return torch.tensor(FP4_VALUES, device=q.device)[q.long()] * torch.exp2(scales - 127)
        return (q.float() - self.zeros.T.repeat_interleave(self.group, 1).float()) * scales


def round_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] in FP8 or int8, and a scale for each row, [rows] float32."""
    # Divided by a tensor, which is exact: by a number, CUDA multiplies with its reciprocal.
    scales = (x.float().abs().amax(1) / torch.full((), LARGEST[dtype], device=x.device)).clamp(min=LEAST_SCALE)
    scaled = x.float() / scales[:, None]
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scales


def round_weight(weight: torch.Tensor, dtype: torch.dtype) -> Rounded:
    """weight [outputs, inputs] with a scale for each output."""
    return Rounded(*round_rows(weight, dtype))


def round_int4(weight: torch.Tensor, group: int) -> Packed:
    """weight [outputs, inputs] in int4, a scale and a zero for each `group` inputs (asymmetric, to the nearest)."""
    outputs, inputs = weight.shape
    grouped = weight.float().view(outputs, inputs // group, group)
    low, high = grouped.aminmax(dim=2)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / 15).clamp(min=LEAST_SCALE).to(weight.dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    q = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return pack(q.view(outputs, inputs).to(torch.uint8), scales.T, zeros.T.to(torch.uint8))


def round_mxfp4(weight: torch.Tensor) -> Packed:
    """weight [outputs, inputs] in MXFP4: FP4 values and a power of two for each 32 inputs (the OCP way: the largest
    magnitude's exponent less the largest FP4 exponent, 2)."""
    outputs, inputs = weight.shape
    grouped = weight.float().view(outputs, inputs // MX_GROUP, MX_GROUP)
    exponents = (grouped.abs().amax(2).clamp(min=2.0**-120).log2().floor() - 2).clamp(-127, 127)
    values = torch.tensor(FP4_VALUES[:8], device=weight.device)
    scaled = grouped / torch.exp2(exponents)[..., None]
    middles = (values[1:] + values[:-1]) / 2
    q = torch.bucketize(scaled.abs().contiguous(), middles) + 8 * (scaled < 0)
    return pack(q.view(outputs, inputs).to(torch.uint8), (exponents + 127).T.to(torch.uint8), None)


def pack(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> Packed:
    """q [outputs, inputs] uint8 below 16, scales and zeros as `Packed` has them.  Raises ValueError for groups in no
    multiple of 16 inputs."""
    outputs, inputs = q.shape
    if inputs % (len(scales) * PACK_WORDS):
        raise ValueError(
            f"four-bit weights come in groups of a multiple of {PACK_WORDS} inputs, not {inputs} in {len(scales)}"
        )
    tiles = -(-inputs // PACK)
    padded = torch.zeros(outputs, tiles * PACK, dtype=torch.int32, device=q.device)
    padded[:, :inputs] = q
    words = torch.zeros(outputs, tiles, PACK_WORDS, dtype=torch.int32, device=q.device)
    for i in range(8):
        words |= padded.view(outputs, tiles, 8, PACK_WORDS)[:, :, i] << (4 * i)
    packed = words.transpose(0, 1).contiguous()
    return Packed(packed, scales.contiguous(), None if zeros is None else zeros.contiguous(), inputs)
