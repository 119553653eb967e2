"""The C++ kernels: compiled on first use into the user's cache, called through ctypes.

Where no compiler is found, or the build fails, `load` returns None with a warning and the torch reference
serves instead.  KERNELS_NATIVE=0 switches them off.
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

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
)
LANES = 16  # rows are handled so many elements at a time
HEAD_DIMS = frozenset({16, 32, 64, 80, 96, 128, 256})


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refdesk"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, built if it isn't in the cache yet (a few seconds)."""
    if os.environ.get("KERNELS_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or platform.system() != "Linux":
        log.warning("no C++ compiler found: the kernels run in plain torch, several times slower (install g++)")
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (
            error.stderr.decode(errors="replace")[-800:] if isinstance(error, subprocess.CalledProcessError) else error
        )
        log.warning("the C++ kernels could not be built, plain torch serves instead: %s", detail)
        return None
    pointer, integer, number, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
    signatures = {
        "attend": [integer, integer, *[pointer] * 7, *[integer] * 5, number],
        "store": [integer, *[pointer] * 5, *[integer] * 3, stride, stride],
        "add_rms_norm": [integer, *[pointer] * 4, integer, integer, number],
        "silu_mul": [integer, pointer, pointer, integer, integer],
        "rotate_and_store": [integer, *[pointer] * 10, *[integer] * 4, stride, stride, stride],
        "quantize_rows": [integer, *[pointer] * 3, integer, integer],
        "scale_rows": [integer, *[pointer] * 4, integer, integer],
        "multiply_few_rows": [*[pointer] * 3, *[integer] * 3],
        "multiplies_few_rows": [],
    }
    for name, arguments in signatures.items():
        function = getattr(library, f"refdesk_{name}")
        function.argtypes, function.restype = arguments, None
    library.refdesk_attend.restype = library.refdesk_multiplies_few_rows.restype = integer
    return library


def _build(compiler: str) -> Path:
    openmp = _openmp_of_torch()
    identity = b"\0".join(
        [
            *(path.read_bytes() for path in [*HEADERS, *SOURCES]),
            " ".join(FLAGS).encode(),
            str(openmp).encode(),
            compiler.encode(),
            _cpu_flags(),
        ]
    )
    target = cache_dir() / f"kernels-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # -fopenmp compiles, but must not link a second runtime beside torch's
            compiling = [[compiler, *FLAGS, "-c", str(path), "-o", f"{folder}/{path.stem}.o"] for path in SOURCES]
            built = f"{folder}/kernels.so"
            runtime = ["-fopenmp"] if openmp is None else [str(openmp)]
            linking = [compiler, "-shared", *(f"{folder}/{path.stem}.o" for path in SOURCES), *runtime, "-o", built]
            for command in [*compiling, linking]:
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
        and cache.keys.shape[3] in HEAD_DIMS
        and cache.keys.transpose(2, 3).is_contiguous()
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


def takes_rows(*rows: torch.Tensor) -> bool:
    """Whether the elementwise kernels take these rows: contiguous, float32 or bf16, a multiple of LANES wide."""
    return all(
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dtype == rows[0].dtype
        and x.is_contiguous()
        and x.shape[-1] % LANES == 0
        for x in rows
    )


def add_rms_norm(
    library: ctypes.CDLL, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    out = torch.empty_like(hidden)
    width = hidden.shape[-1]
    library.refdesk_add_rms_norm(
        hidden.dtype == torch.bfloat16,
        hidden.data_ptr(),
        None if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        hidden.numel() // width,
        width,
        eps,
    )
    return out


def silu_mul(library: ctypes.CDLL, gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape
    out = gate_up.new_empty(rows, width // 2)
    library.refdesk_silu_mul(gate_up.dtype == torch.bfloat16, gate_up.data_ptr(), out.data_ptr(), rows, width // 2)
    return out


def rotates(cache: LayerCache, tables: tuple[torch.Tensor, ...], *heads: torch.Tensor) -> bool:
    """Whether `rotate_and_store` takes these heads: halves of LANES, each token's heads side by side."""
    dim = cache.keys.shape[3]
    return (
        supports(cache)
        and dim % (2 * LANES) == 0
        and all(t.dtype == cache.keys.dtype and t.shape[1] == dim and t.is_contiguous() for t in tables)
        and all(x.dtype == cache.keys.dtype and x.stride(2) == 1 and x.stride(1) == dim for x in heads)
    )


def rotate_and_store(
    library: ctypes.CDLL,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
) -> torch.Tensor:
    tokens, heads, dim = query.shape
    out = query.new_empty(tokens, heads, dim)
    library.refdesk_rotate_and_store(
        cache.keys.dtype == torch.bfloat16,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        plan.positions.data_ptr(),
        plan.slot_mapping.data_ptr(),
        tokens,
        heads,
        keys.shape[1],
        dim,
        query.stride(0),
        keys.stride(0),
        values.stride(0),
    )
    return out


def quantize_rows(library: ctypes.CDLL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    out, scales = torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows)
    library.refdesk_quantize_rows(
        x.dtype == torch.bfloat16, x.data_ptr(), out.data_ptr(), scales.data_ptr(), rows, width
    )
    return out, scales


def scale_rows(
    library: ctypes.CDLL, x: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=dtype)
    library.refdesk_scale_rows(
        dtype == torch.bfloat16,
        x.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        width,
    )
    return out


def pack_for_few_rows(library: ctypes.CDLL, weight: torch.Tensor) -> torch.Tensor | None:
    outputs, inputs = weight.shape
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not (outputs % LANES or inputs % 2)
    if not fits or not library.refdesk_multiplies_few_rows():
        return None
    return weight.view(outputs // LANES, LANES, inputs // 2, 2).transpose(1, 2).contiguous()


def multiply_few_rows(library: ctypes.CDLL, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    groups, pairs, lanes, _ = packed.shape
    x = x.contiguous()
    out = x.new_empty(len(x), groups * lanes)
    library.refdesk_multiply_few_rows(
        packed.data_ptr(), x.data_ptr(), out.data_ptr(), len(x), pairs * 2, groups * lanes
    )
    return out
