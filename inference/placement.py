"""Where the engine runs, and what fits there: device, dtypes, the memory of the cache."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

import numpy as np
import torch

from inference.config import EngineConfig
from inference.engine.calibrate import FARTHEST, MANY
from inference.engine.device import DeviceModel
from inference.models import ModelError
from kernels import BLOCK_SIZE, AttentionPlan, bytes_per_block

log = logging.getLogger(__name__)

CPU_CACHE_MB = 1024
GPU_SHARE = 0.92  # of a GPU's memory that the engine takes: graphs, libraries and others need the rest


class Place(NamedTuple):
    """`step_seconds` and `max_batch_tokens` are what suits the device, where nothing else was said; `timed_chunk` and
    `timed_context` tokens are enough to see what they cost there."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    step_seconds: float
    max_batch_tokens: int
    timed_chunk: int
    timed_context: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def choose_place(config: EngineConfig) -> Place:
    """Raises ModelError for a device that is not there."""
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        why = (
            "no GPU is visible" if torch.version.cuda or torch.version.hip else f"torch {torch.__version__} has no CUDA"
        )
        raise ModelError(f'device = "cuda", but {why}: use device = "cpu", or install a CUDA build of torch')
    on_gpu = there and config.device != "cpu"
    if config.kv_cache_dtype == "fp8" and not on_gpu:
        raise ModelError('kv_cache_dtype = "fp8" needs a GPU: leave it at "auto" here')
    dtype = choose_dtype(config.dtype, on_gpu)
    return Place(
        device=torch.device("cuda" if on_gpu else "cpu"),
        dtype=dtype,
        kv_dtype=torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype,
        step_seconds=(config.step_ms or (20.0 if on_gpu else 170.0)) / 1000,
        max_batch_tokens=config.max_batch_tokens or (4096 if on_gpu else 512),
        timed_chunk=2048 if on_gpu else MANY,
        timed_context=8192 if on_gpu else FARTHEST,
    )


def choose_dtype(wanted: str, on_gpu: bool = False) -> torch.dtype:
    """bf16 where the processor multiplies it natively, else fp32, unless told."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if on_gpu:
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast and torch.cpu._is_avx512_bf16_supported() else torch.float32


def cache_blocks(config: EngineConfig, model, place: Place, context: int) -> int:
    """Blocks of the paged cache.  Raises ModelError where they are too few to be of use, or more than there is."""
    shape = model.config
    each = bytes_per_block(shape.layers, shape.kv_heads, shape.head_dim, place.kv_dtype)
    memory = free_after_a_step(model, place, context) if place.on_gpu else memory_bytes()
    told = config.kv_cache_mb is not None
    wanted = config.kv_cache_mb * 2**20 if told else memory if place.on_gpu else CPU_CACHE_MB * 2**20
    if told and wanted > memory:
        where = "the model leaves" if place.on_gpu else "this machine has"
        raise ModelError(f"kv_cache_mb = {config.kv_cache_mb}, but {where} {max(memory, 0) >> 20} MB of memory")
    blocks = max(wanted, 0) // each
    least = min(context, 2048)
    if blocks * BLOCK_SIZE < least:
        said = f"kv_cache_mb = {config.kv_cache_mb}" if told else f"the memory that is left ({max(wanted, 0) >> 20} MB)"
        raise ModelError(
            f"{said} holds only {blocks * BLOCK_SIZE} tokens of this model: "
            f"give it at least {-(-least * each // BLOCK_SIZE // 2**20)}"
        )
    return blocks


def free_after_a_step(model, place: Place, context: int) -> int:
    """Bytes of the GPU that the largest step leaves, found by trying it."""
    tokens = min(place.max_batch_tokens, context)
    blocks = -(-tokens // BLOCK_SIZE) + 1
    cache = model.new_cache(blocks)
    plan = AttentionPlan.of([tokens], [tokens], np.arange(1, blocks, dtype=np.int32)[None])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tried = DeviceModel(model, cache, place.device, context, max_decodes=0)
    tried.forward(torch.zeros(tokens, dtype=torch.int64), plan, cache, torch.tensor([tokens - 1])).sum().item()
    step = torch.cuda.max_memory_allocated() - before
    del tried, cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    log.info("a step of %d tokens takes %d MB, %d of %d MB are free", tokens, step >> 20, free >> 20, total >> 20)
    return free - step - int(total * (1 - GPU_SHARE))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
