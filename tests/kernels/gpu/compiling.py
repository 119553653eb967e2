"""Compile every Triton kernel for a GPU that isn't here, and say what each takes of it.

    python -m tests.kernels.gpu.compiling cuda:90        NVIDIA Hopper; hip:gfx942 is AMD's MI300

The launchers run as they are, over tensors in memory, but a launch only compiles.  Prints a line for each kernel and
set of constants: shared memory in bytes, and registers and spilled bytes of a thread where they can be read.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partialmethod
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.pop("KERNELS_TRITON", None)
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import LayerCache, SharedPlan, rounding
from kernels.cache import FP8
from kernels.gpu import attention, elementwise, multiply, packed, sampling, segments, writing
from tests.kernels.test_paged_attention import plan_for

SHAPES = {"8B": (4096, 32, 8, 128, 14336), "SmolLM2": (576, 9, 3, 64, 1536)}  # hidden, heads, kv_heads, dim, mlp
SHARED = {"cuda": 227 * 1024, "hip": 64 * 1024}  # bytes that a program may have


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_everything() -> None:
    plan = plan_for([(1, 33), (6, 40), (40, 100)])
    tokens = len(plan.positions)
    for hidden, heads, kv_heads, dim, mlp in SHAPES.values():
        qkv = torch.empty(tokens, heads + 2 * kv_heads, dim, dtype=torch.bfloat16)
        query, keys, values = qkv.split((heads, kv_heads, kv_heads), dim=1)
        table = torch.empty(128, dim, dtype=torch.bfloat16)
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, FP8):
            cache = LayerCache.empty(64, kv_heads, dim, dtype)
            writing.rotate_and_store(query, keys, values, table, table, cache, plan)
            writing.store(cache, keys, values, plan)
            for window in (None, 4096):
                attention.attend(query.contiguous(), cache, plan, 0.1, window)
            few = plan_for([(1, 33), (6, 40)])
            shared = SharedPlan.of([([1, 2], 20, [(0, 5), (1, 5)])])
            segments.attend_shared(query[:7], table, table, cache, few, shared, 0.1)
        elementwise.add_rms_norm(x, x, x[0], 1e-5)
        elementwise.add_rms_norm(x, None, x[0], 1e-5)
        elementwise.silu_mul(torch.empty(tokens, 2 * mlp, dtype=torch.bfloat16))
        weight = torch.empty(mlp, hidden)
        for rows in (x[:1], x[:16], x.repeat(2, 1)):
            for dtype in (FP8, torch.int8):
                multiply.multiply_rounded(rows, rounding.Rounded(weight.to(dtype), weight[:, 0].clone()), None)
            q, scale = torch.zeros(mlp, hidden, dtype=torch.uint8), torch.zeros(hidden // 32, mlp, dtype=torch.uint8)
            packed.multiply_packed(rows, rounding.pack(q, scale.bfloat16(), scale), rows[0].new_empty(mlp))
            packed.multiply_packed(rows, rounding.pack(q, scale, None), None)
    for masked in (None, torch.empty(4, 4008, dtype=torch.int32)):
        ints, floats, longs = (torch.empty(4, dtype=d) for d in (torch.int32, torch.float32, torch.int64))
        rows = sampling.SamplingRows(floats, ints, floats, floats, longs, longs, masked)
        sampling.sample(torch.empty(4, 128256), rows)


def main() -> int:
    if len(sys.argv) != 2 or ":" not in sys.argv[1]:
        print(__doc__)
        return 2
    backend, arch = sys.argv[1].split(":")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
    driver.set_active(NoDevice(target))
    torch.version.hip = arch if backend == "hip" else None  # the kernels ask it how much shared memory there is
    compiled: dict[tuple, object] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = (self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    JITFunction.__getitem__ = lambda self, grid: partialmethod(JITFunction.run, grid=grid, warmup=True).__get__(self)
    launch_everything()
    too_much = 0
    for name, kernel in sorted(compiled.values(), key=lambda each: each[0]):
        used = usage(kernel) if backend == "cuda" else ""
        print(f"{name:20} {kernel.metadata.num_warps} warps  shared {kernel.metadata.shared:6}  {used}")
        too_much += kernel.metadata.shared > SHARED[backend] or ("STACK" in used and "STACK:0" not in used)
    print(f"{len(compiled)} kernels compiled for {sys.argv[1]}, {too_much} take more than there is")
    return 1 if too_much else 0


def usage(kernel) -> str:
    """Registers and stack of a compiled kernel, by NVIDIA's own tool, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = next(line for line in said.splitlines() if "REG:" in line).split()
    return "  ".join(word for word in words if word.startswith(("REG", "STACK")))


if __name__ == "__main__":
    sys.exit(main())
