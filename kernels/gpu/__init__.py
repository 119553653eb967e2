"""The Triton kernels, for NVIDIA's and AMD's GPUs.  Each has its contract in `kernels` and its reference in
`kernels.reference`.

KERNELS_TRITON=interpret runs them on the CPU in Triton's interpreter, thousands of times slower, to check them where
there is no GPU.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("KERNELS_TRITON") == "interpret"
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


def serves(x: torch.Tensor) -> bool:
    """Whether the Triton kernels run for what is where x is, in its dtype."""
    return (x.is_cuda or INTERPRETED) and x.dtype in NUMBERS


def stages(most: int) -> int:
    """How many loads a kernel's loop keeps ahead: AMD's 64 KiB of shared memory hold two."""
    return min(most, 2) if torch.version.hip else most
