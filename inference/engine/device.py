"""A model on a GPU, behind the same `forward`: a step's inputs go over in one copy, and steps of decodes are replayed
as CUDA graphs.

A graph is captured for each of a few numbers of tokens, the largest first, so that the others fit into its memory, and
a step takes the least that holds it.  Where the tokens belong is data, not shape: a graph of T tokens serves any
sequences that have T query tokens in all, with guesses or without.  What is left over is padding that belongs to no
sequence and is stored nowhere (slot -1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels import BLOCK_SIZE, AttentionPlan

log = logging.getLogger(__name__)

ALIGNED = 16  # bytes
GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens


class Shape(NamedTuple):
    """How much of each input a buffer holds; `width` in blocks of a block table."""

    tokens: int
    sequences: int
    width: int
    wanted: int


class Inputs(NamedTuple):
    """Views into one buffer: what a step reads."""

    tokens: torch.Tensor
    wanted: torch.Tensor
    plan: AttentionPlan


class Graph(NamedTuple):
    """`replay` computes the logits of what the buffer of decodes holds by then."""

    shape: Shape
    replay: Callable[[], object]


class DeviceModel:
    """`model`, a `Llama` on `device`, and the `cache` that its graphs read and write.

    `max_context_tokens`: the longest sequence.  `max_decodes`: the most tokens of a step that is replayed; 0 for none.
    Where there is no CUDA, as in the interpreter, a replay computes anew.
    """

    def __init__(self, model, cache: object, device: torch.device, max_context_tokens: int, max_decodes: int):
        self._model = model
        self._cache = cache
        self._device = device
        self._eager = Buffer(0, device)
        sizes = sorted({size for size in GRAPHS if size < max_decodes} | {max_decodes} - {0})
        shapes = [Shape(size, size, -(-max_context_tokens // BLOCK_SIZE), 0) for size in sizes]
        self._replayed = Buffer(size_of(shapes[-1]) if shapes else 0, device)
        # What graphs read and write has to stay where it was when they were captured.
        self._logits = torch.empty(sizes[-1] if sizes else 0, model.config.vocab_size, device=device)
        self._rows = torch.arange(len(self._logits), device=device)
        self._sampled = torch.zeros(len(self._logits), dtype=torch.int64, device=device)
        self._side = torch.cuda.Stream() if device.type == "cuda" else None  # one: each keeps a workspace for good
        pool = torch.cuda.graph_pool_handle() if shapes and device.type == "cuda" else None
        with torch.inference_mode():
            self._graphs = [self._capture(shape, pool) for shape in reversed(shapes)][::-1]

    def new_cache(self, blocks: int) -> object:
        return self._model.new_cache(blocks)

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        plan: AttentionPlan,
        cache: object,
        wanted: torch.Tensor,
        sampled: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Llama.forward`, for inputs on the host; logits on the device, overwritten by the next step.  Nothing is
        waited for.  A token -1 - i stands for sampled[i], int64 on the device, which the host does not know yet."""
        graph = self._graph_for(tokens, plan, cache)
        if graph is None or (sampled is not None and len(sampled) > len(self._sampled)):
            width = plan.block_tables.shape[1]
            inputs = self._eager.send(
                tokens, plan, wanted, Shape(len(tokens), len(plan.context_lens), width, len(wanted))
            )
            tokens = inputs.tokens if sampled is None else told(inputs.tokens, sampled)
            return self._model.forward(tokens, inputs.plan, cache, inputs.wanted)
        if sampled is not None:
            self._sampled[: len(sampled)] = sampled
        self._replayed.send(tokens, plan, wanted[:0], graph.shape)
        graph.replay()
        if len(wanted) == len(tokens):
            return self._logits[: len(wanted)]
        rows = wanted.pin_memory() if self._device.type == "cuda" else wanted  # or the copy would wait for the replay
        return self._logits[rows.to(self._device, non_blocking=True)]

    def splice(self, cache: object, source: torch.Tensor, target: torch.Tensor, by: torch.Tensor) -> None:
        """As `Llama.splice`."""
        self._model.splice(cache, source, target, by)

    def look(self, tokens: torch.Tensor, plan: AttentionPlan, cache: object, layers: range) -> torch.Tensor:
        """As `Llama.look`, for inputs on the host."""
        return self._model.look(tokens.to(self._device), plan.to(self._device), cache, layers)

    def _graph_for(self, tokens: torch.Tensor, plan: AttentionPlan, cache: object) -> Graph | None:
        if cache is not self._cache or plan.few_sequences < len(plan.context_lens):
            return None
        return next((graph for graph in self._graphs if graph.shape.tokens >= len(tokens)), None)

    def _capture(self, shape: Shape, pool: object) -> Graph:
        inputs, rows = self._replayed.empty(shape), self._rows[: shape.tokens]

        def compute() -> None:
            logits = self._model.forward(told(inputs.tokens, self._sampled), inputs.plan, self._cache, rows)
            self._logits[: shape.tokens].copy_(logits)  # one buffer for all, or each graph would keep its own

        if self._device.type != "cuda":
            return Graph(shape, compute)
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled, and libraries set up, before anything is captured
            compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
            compute()
        log.debug("captured a step of %d tokens", shape.tokens)
        return Graph(shape, graph.replay)


def told(tokens: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """`tokens` [n] with sampled[i] for each -1 - i; 0 for one that could not be drawn, whose request will fail."""
    return torch.where(tokens < 0, sampled[(-1 - tokens).clamp(min=0)], tokens).clamp(min=0)


class Buffer:
    """Pinned memory and its twin on the device, of at least `size` bytes."""

    def __init__(self, size: int, device: torch.device):
        self._here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = torch.empty(size, dtype=torch.uint8, device=device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def empty(self, shape: Shape) -> Inputs:
        """The views on the device of a step without sequences: all of it is padding."""
        nothing = torch.zeros(0, dtype=torch.int64)
        none = nothing.to(torch.int32)
        plan = AttentionPlan(torch.zeros(1, dtype=torch.int32), none, none[:, None], nothing, nothing, 0, 0)
        return self.send(nothing, plan, nothing, shape)

    def send(self, tokens: torch.Tensor, plan: AttentionPlan, wanted: torch.Tensor, shape: Shape) -> Inputs:
        """The inputs on the device, in one copy, filled up to `shape`; the next call's are copied over them after the
        work that was launched meanwhile."""
        size = size_of(shape)
        if self._sent is not None:  # a step without a token to sample is not waited for, and may not have begun
            self._sent.synchronize()
        if len(self._here) < size:
            self.__init__(2 * size, self._there.device)
        padded = shape.tokens > len(plan.positions) or shape.sequences > len(plan.context_lens)
        few = (shape.sequences, shape.tokens) if padded else (plan.few_sequences, plan.few_tokens)  # padded are decodes
        here = carve(self._here, shape, *few)
        _fill(here.tokens, tokens, 0)
        _fill(here.wanted, wanted, 0)
        _fill(here.plan.positions, plan.positions, 0)
        _fill(here.plan.slot_mapping, plan.slot_mapping, -1)
        _fill(here.plan.query_start, plan.query_start, len(tokens))
        _fill(here.plan.context_lens, plan.context_lens, 0)
        here.plan.block_tables[: len(plan.context_lens), : plan.block_tables.shape[1]] = plan.block_tables
        self._there[:size].copy_(self._here[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return carve(self._there, shape, *few)

    def bytes(self, shape: Shape) -> torch.Tensor:
        """What `send` put here last, as it lies in memory."""
        return self._here[: size_of(shape)]


def _fill(into: torch.Tensor, values: torch.Tensor, rest: int) -> None:
    into[: len(values)] = values
    into[len(values) :] = rest


def _parts(shape: Shape) -> list[tuple[int, torch.dtype, int]]:
    """(numbers, their dtype, bytes) of each part of a buffer, in the order of `carve`; kernels are compiled for
    addresses in multiples of ALIGNED."""
    tokens, sequences, width, wanted = shape
    counts = [(count, torch.int64) for count in (tokens, wanted, tokens, tokens)]
    counts += [(count, torch.int32) for count in (sequences + 1, sequences, sequences * width)]
    return [(count, dtype, -(-count * dtype.itemsize // ALIGNED) * ALIGNED) for count, dtype in counts]


def size_of(shape: Shape) -> int:
    return sum(size for _, _, size in _parts(shape))


def carve(buffer: torch.Tensor, shape: Shape, few_sequences: int, few_tokens: int) -> Inputs:
    """The parts of `buffer` for a step of `shape`, which begins with so many decodes."""
    views, at = [], 0
    for count, dtype, size in _parts(shape):
        views.append(buffer[at : at + count * dtype.itemsize].view(dtype))
        at += size
    tokens, wanted, positions, slots, query_start, context_lens, tables = views
    return Inputs(
        tokens=tokens,
        wanted=wanted,
        plan=AttentionPlan(
            query_start=query_start,
            context_lens=context_lens,
            block_tables=tables.view(shape.sequences, shape.width),
            slot_mapping=slots,
            positions=positions,
            few_sequences=few_sequences,
            few_tokens=few_tokens,
        ),
    )
