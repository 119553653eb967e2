"""The C++ attention kernel: compiled on first use into the user's cache, called through ctypes.

Where no compiler is found, or the build fails, `load` returns None with a warning and the torch reference
serves instead.  KERNELS_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from kernels.cache import LayerCache
from kernels.plan import AttentionPlan

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("paged_attention.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
)
HEAD_DIMS = frozenset({16, 32, 64, 80, 96, 128, 256})


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refdesk"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, built if it isn't in the cache yet (about three seconds)."""
    if os.environ.get("KERNELS_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or platform.system() != "Linux":
        log.warning("no C++ compiler found: attention runs in plain torch, several times slower (install g++)")
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (
            error.stderr.decode(errors="replace")[-800:] if isinstance(error, subprocess.CalledProcessError) else error
        )
        log.warning("the attention kernel could not be built, plain torch serves instead: %s", detail)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.refdesk_attend.argtypes = [integer, integer, *[pointer] * 7, *[integer] * 5, ctypes.c_float]
    library.refdesk_attend.restype = integer
    library.refdesk_store.argtypes = [integer, *[pointer] * 5, *[integer] * 3, ctypes.c_int64, ctypes.c_int64]
    library.refdesk_store.restype = None
    return library


def _build(compiler: str) -> Path:
    openmp = _openmp_of_torch()
    identity = b"\0".join(
        [SOURCE.read_bytes(), " ".join(FLAGS).encode(), str(openmp).encode(), compiler.encode(), _cpu_flags()]
    )
    target = cache_dir() / f"attention-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / "attention.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            if openmp is not None:  # -fopenmp compiles, but must not link a second runtime
                objects = Path(folder) / "attention.o"
                compile_flags = [flag for flag in FLAGS if flag != "-shared"]
                subprocess.run(
                    [compiler, *compile_flags, "-c", str(SOURCE), "-o", str(objects)], check=True, capture_output=True
                )
                command = [compiler, "-shared", str(objects), str(openmp), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True)
            os.replace(built, target)
    return target


def _openmp_of_torch() -> Path | None:
    """The OpenMP runtime that torch has loaded: one pool of threads, not two that spin against each other."""
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    found += sorted(Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*"))
    return found[0] if found else None


def _cpu_flags() -> bytes:
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return platform.processor().encode()


def supports(cache: LayerCache) -> bool:
    return (
        cache.keys.device.type == "cpu"
        and cache.keys.dtype in (torch.float32, torch.bfloat16)
        and cache.keys.shape[2] in HEAD_DIMS
    )


def store(
    library: ctypes.CDLL, cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
) -> None:
    """As `kernels.reference.store`; a token's heads must be contiguous, tokens may be strided."""
    tokens, kv_heads, dim = keys.shape
    library.refdesk_store(
        cache.keys.dtype == torch.bfloat16,
        keys.data_ptr(),
        values.data_ptr(),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        plan.slot_mapping.data_ptr(),
        tokens,
        kv_heads,
        dim,
        keys.stride(0),
        values.stride(0),
    )


def attend(
    library: ctypes.CDLL, query: torch.Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None
) -> torch.Tensor:
    """As `kernels.reference.attend`, with float32 sums."""
    query = query.contiguous()
    out = torch.empty_like(query)
    _, heads, dim = query.shape
    failed = library.refdesk_attend(
        query.dtype == torch.bfloat16,
        dim,
        query.data_ptr(),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        out.data_ptr(),
        plan.query_start.data_ptr(),
        plan.context_lens.data_ptr(),
        plan.block_tables.data_ptr(),
        len(plan.context_lens),
        plan.block_tables.shape[1],
        heads,
        cache.keys.shape[1],
        window or 0,
        scale,
    )
    assert not failed, f"head dimension {dim} was not compiled in"
    return out
