"""Each Triton kernel's time against the least it could take: its bytes at the measured copy bandwidth, or its
operations at the measured rate of matrix products, whichever is longer.  Part of `python -m loadtests.gpu_check`."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
from kernels import BLOCK_SIZE, AttentionPlan, LayerCache, SamplingRows, SharedPlan, rounding

APART = 256 * 2**20  # bytes of inputs that a kernel is led over in turn, so that no cache holds them


class Sizes(NamedTuple):
    """The shapes that are timed: those of Llama-3.1-8B, or tiny ones to rehearse with."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336
    vocab: int = 128256
    decodes: int = 64
    context: int = 4096
    chunk: int = 2048
    square: int = 8192  # of the matrix product that gives the rate
    copied: int = 2**30  # elements of the copy that gives the bandwidth


TINY = Sizes(64, 4, 2, 16, 96, 300, 3, 80, 20, 64, 2**10)


class Row(NamedTuple):
    what: str
    milliseconds: float
    floor: float | None = None  # milliseconds
    beside: dict[str, float] | None = None  # others' milliseconds for the same


def milliseconds(action: Callable[[], object]) -> float:
    """The median of replays on a GPU, without the time to launch; one run elsewhere."""
    if torch.cuda.is_available():
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(action, rep=50, return_mode="median"))
    started = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - started)


def ceilings(sizes: Sizes, device: str) -> tuple[float, float]:
    """(bytes, operations) of bf16 in a millisecond: a large copy, read and written, and a large matrix product."""
    source = torch.randn(sizes.copied // 2, device=device)
    target = torch.empty_like(source)
    # a kernel's copy: the driver's own is slower in a graph
    copied = 2 * source.nbytes / milliseconds(functools.partial(torch.mul, source, 2.0, out=target))
    del source, target
    a, b = (torch.randn(sizes.square, sizes.square, device=device, dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * sizes.square**3 / milliseconds(lambda: a @ b)


def measure(sizes: Sizes, device: str) -> Iterator[Row]:
    bandwidth, rate = ceilings(sizes, device)
    yield Row(f"copy: {bandwidth / 1e9:.2f} TB/s; bf16 product: {rate / 1e9:.0f} TFLOP/s", 0.0)

    def floor(read: float, operations: float = 0.0) -> float:
        return max(read / bandwidth, operations / rate)

    yield from _attention(sizes, device, floor)
    yield from _sharing(sizes, device, floor)
    yield from _elementwise(sizes, device, floor)
    yield from _products(sizes, device, floor)
    yield from _sampling(sizes, device, floor)


def plan_of(sequences: list[tuple[int, int]], device: str) -> tuple[AttentionPlan, int]:
    """(the plan of (query tokens, context) each, over blocks in a shuffled order; how many blocks there are)"""
    counts = [-(-context // BLOCK_SIZE) for _, context in sequences]
    free = iter((np.random.default_rng(0).permutation(sum(counts)) + 1).tolist())
    tables = np.zeros((len(sequences), max(counts)), dtype=np.int32)
    for table, count in zip(tables, counts, strict=True):
        table[:count] = list(itertools.islice(free, count))
    plan = AttentionPlan.of([q for q, _ in sequences], [c for _, c in sequences], tables)
    return plan.to(device), sum(counts) + 1


def _attention(sizes: Sizes, device: str, floor) -> Iterator[Row]:
    shape = (sizes.kv_heads, sizes.head_dim)
    scale = sizes.head_dim**-0.5

    def queries(count: int) -> torch.Tensor:
        return torch.randn(count, sizes.heads, sizes.head_dim, device=device, dtype=torch.bfloat16)

    for dtype, name in ((torch.bfloat16, "bf16"), (rounding.FP8, "FP8 cache")):
        plan, blocks = plan_of([(1, sizes.context)] * sizes.decodes, device)
        cache = _random_cache(blocks, *shape, dtype, device)
        query = queries(sizes.decodes)
        read = kernels.bytes_per_block(1, *shape, dtype) / BLOCK_SIZE * sizes.decodes * sizes.context
        beside = {}
        if dtype == torch.bfloat16:
            dense = torch.randn(2, sizes.decodes, sizes.kv_heads, sizes.context, sizes.head_dim, device=device)
            k, v = dense.bfloat16()
            q = query[:, :, None]
            beside = dense_attention(q, k, v, causal=False)
            del dense, k, v
        took = milliseconds(lambda query=query, cache=cache, plan=plan: kernels.attend(query, cache, plan, scale))
        yield Row(f"decode attention, {sizes.decodes} x {sizes.context}, {name}", took, floor(read), beside)
        del cache
    for before in (0, sizes.context):
        plan, blocks = plan_of([(sizes.chunk, before + sizes.chunk)], device)
        cache, query = _random_cache(blocks, *shape, torch.bfloat16, device), queries(sizes.chunk)
        pairs = sizes.chunk * (before + (sizes.chunk + 1) / 2)
        beside = {}
        if before == 0:
            q = query.transpose(0, 1)[None]
            k, v = torch.randn(2, 1, sizes.kv_heads, sizes.chunk, sizes.head_dim, device=device).bfloat16()
            beside = dense_attention(q, k, v, causal=True)
        took = milliseconds(lambda query=query, cache=cache, plan=plan: kernels.attend(query, cache, plan, scale))
        least = floor(0, 4 * pairs * sizes.heads * sizes.head_dim)
        yield Row(f"prefill attention, {sizes.chunk} after {before}", took, least, beside)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, float]:
    """Milliseconds of torch's own attention over keys and values that lie in one piece, [sequences, heads, tokens, dim]
    each."""
    sdpa = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=True)
    took = {"SDPA, dense": milliseconds(sdpa)}
    flex = torch.compile(flex_attention) if q.is_cuda else flex_attention
    mask = None
    try:
        if causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device)
        flexible = functools.partial(flex, q, k, v, block_mask=mask, enable_gqa=True)
        torch.testing.assert_close(flexible(), sdpa(), atol=2e-2, rtol=2e-2)
        took["FlexAttention, dense"] = milliseconds(flexible)
    except Exception as error:  # it is compiled on the spot, by what that machine may lack
        print(f"FlexAttention is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    return took


def _sharing(sizes: Sizes, device: str, floor) -> Iterator[Row]:
    """Decodes that hold the same segment, read once for all of them, beside the plain kernel over the same blocks."""
    own, scale = 64, sizes.head_dim**-0.5
    for context in (sizes.context // 8, sizes.context):
        for members in (sizes.decodes // 8, sizes.decodes):
            if members < 2:
                continue
            common = -(-context // BLOCK_SIZE)
            each = own // BLOCK_SIZE
            tables = np.arange(1 + common, 1 + common + members * each, dtype=np.int32).reshape(members, each)
            blocks = 1 + common + members * each
            cache = _random_cache(blocks, sizes.kv_heads, sizes.head_dim, torch.bfloat16, device)
            private = AttentionPlan.of([1] * members, [own] * members, tables).to(device)
            private.positions += context
            segment = (list(range(1, 1 + common)), context, [(token, 0) for token in range(members)])
            shared = SharedPlan.of([segment]).to(device)
            whole = np.concatenate([np.tile(np.arange(1, 1 + common, dtype=np.int32), (members, 1)), tables], 1)
            plan = AttentionPlan.of([1] * members, [common * BLOCK_SIZE + own] * members, whole).to(device)
            shape = (members, sizes.heads, sizes.head_dim)
            query = torch.randn(shape, device=device, dtype=torch.bfloat16)
            table = torch.randn(context + own, sizes.head_dim, device=device, dtype=torch.bfloat16)
            plain = milliseconds(functools.partial(kernels.attend, query, cache, plan, scale))
            took = milliseconds(
                functools.partial(kernels.attend_shared, query, table, table, cache, private, shared, scale)
            )
            read = kernels.bytes_per_block(1, sizes.kv_heads, sizes.head_dim, torch.bfloat16) * (blocks - 1)
            yield Row(f"{members} decodes on the same {context} tokens", took, floor(read), {"each by itself": plain})


def _random_cache(blocks: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> LayerCache:
    cache = LayerCache.empty(blocks, kv_heads, dim, dtype, device)
    for tensor in cache[:2]:
        tensor.copy_(torch.randn(tensor.shape, device=device, dtype=torch.bfloat16))
    for scales in cache[2:]:
        if scales is not None:
            scales.fill_(0.01)
    return cache


def _elementwise(sizes: Sizes, device: str, floor) -> Iterator[Row]:
    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    for rows in (sizes.decodes, sizes.chunk):
        hidden, delta, weight = new(rows, sizes.hidden), new(rows, sizes.hidden), new(sizes.hidden)
        took = milliseconds(lambda h=hidden, d=delta, w=weight: kernels.add_rms_norm(h, d, w, 1e-5))
        yield Row(f"residual and RMSNorm, {rows} rows", took, floor(4 * hidden.nbytes))
        gate_up = new(rows, 2 * sizes.mlp)
        took = milliseconds(lambda x=gate_up: kernels.silu_mul(x))
        yield Row(f"SiLU * mul, {rows} rows", took, floor(1.5 * gate_up.nbytes))
        plan, blocks = plan_of([(1, 80)] * rows if rows == sizes.decodes else [(rows, rows)], device)
        cache = _random_cache(blocks, sizes.kv_heads, sizes.head_dim, torch.bfloat16, device)
        qkv = new(rows, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
        query, keys, values = qkv.split((sizes.heads, sizes.kv_heads, sizes.kv_heads), dim=1)
        table = new(max(rows, 80), sizes.head_dim)
        took = milliseconds(
            lambda q=query, k=keys, v=values, t=table, c=cache, p=plan: kernels.rotate_and_store(q, k, v, t, t, c, p)
        )
        yield Row(f"rotary and cache write, {rows} rows", took, floor(2 * qkv.nbytes))


def _products(sizes: Sizes, device: str, floor) -> Iterator[Row]:
    shape = (sizes.mlp, sizes.hidden)
    count = max(1, min(8, APART // (shape[0] * shape[1] // 2)))
    whole = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(count)]
    rounded = {
        "FP8": [rounding.round_weight(w, rounding.FP8) for w in whole],
        "int8": [rounding.round_weight(w, torch.int8) for w in whole],
        "int4": [rounding.round_int4(w, 32) for w in whole],
        "MXFP4": [rounding.round_mxfp4(w) for w in whole],
    }
    for rows in (1, sizes.decodes, sizes.chunk):
        x = torch.randn(rows, sizes.hidden, device=device, dtype=torch.bfloat16)
        operations = 2.0 * rows * shape[0] * shape[1]
        plain = _over(whole, lambda w, x=x: F.linear(x, w))
        yield Row(f"product in bf16 (torch), {rows} rows", plain, floor(whole[0].nbytes, operations))
        for name, weights in rounded.items():
            multiply = kernels.multiply_packed if isinstance(weights[0], rounding.Packed) else kernels.multiply_rounded
            faster = 2 if name in ("FP8", "int8") else 1  # products of 8 bits are twice as fast
            read = sum(part.nbytes for part in weights[0] if isinstance(part, torch.Tensor))
            took = _over(weights, lambda w, x=x, multiply=multiply: multiply(x, w))
            yield Row(f"product with {name}, {rows} rows", took, floor(read, operations / faster), {"bf16": plain})


def _over(weights: list, multiply: Callable[[object], object]) -> float:
    """Milliseconds of one product, led over all `weights` in turn."""

    def all_of_them() -> None:
        for weight in weights:
            multiply(weight)

    return milliseconds(all_of_them) / len(weights)


def _sampling(sizes: Sizes, device: str, floor) -> Iterator[Row]:
    logits = torch.randn(sizes.decodes, sizes.vocab, device=device) * 3
    for name, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("temperature", 0.7, 0, 1.0),
        ("top-p", 0.7, 0, 0.9),
        ("top-k and top-p", 0.7, 50, 0.9),
    ):

        def column(value, dtype) -> torch.Tensor:
            return torch.full((sizes.decodes,), value, dtype=dtype, device=device)

        rows = SamplingRows(
            column(temperature, torch.float32), column(top_k, torch.int32), column(top_p, torch.float32),
            column(0.0, torch.float32), column(1, torch.int64), column(5, torch.int64),
        )  # fmt: skip
        took = milliseconds(lambda rows=rows: kernels.sample(logits, rows))
        yield Row(f"sampling, {sizes.decodes} rows of {sizes.vocab}: {name}", took, floor(logits.nbytes))
