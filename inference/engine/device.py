"""A model on a GPU, behind the same `forward`: a step's inputs go over in one copy, and steps of up to a thousand
tokens are replayed as CUDA graphs, with chunks of prompts among them or without.

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

from inference.engine.inputs import Buffer, Shape, size_of
from kernels import BLOCK_SIZE, AttentionPlan

log = logging.getLogger(__name__)

DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens
# Tokens of steps with chunks of prompts among them.  A launch takes the host some 40 us and a layer has ten: larger
# steps take the GPU longer than that.
MIXED = (64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 896, 1024)
CHUNKS = 16  # in one step


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
        shapes = shapes_of(-(-max_context_tokens // BLOCK_SIZE), max_decodes) if max_decodes else []
        self._replayed = Buffer(max(map(size_of, shapes), default=0), device)
        # What graphs read and write has to stay where it was when they were captured.
        most = max((shape.wanted for shape in shapes), default=0)
        self._logits = torch.empty(most, model.config.vocab_size, device=device)
        self._sampled = torch.zeros(most, dtype=torch.int64, device=device)
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
        graph = self._graph_for(tokens, plan, cache, wanted)
        if graph is None or (sampled is not None and len(sampled) > len(self._sampled)):
            inputs = self._eager.send(tokens, plan, wanted, Shape.of(tokens, plan, wanted))
            tokens = inputs.tokens if sampled is None else told(inputs.tokens, sampled)
            return self._model.forward(tokens, inputs.plan, cache, inputs.wanted)
        if sampled is not None:
            self._sampled[: len(sampled)] = sampled
        self._replayed.send(tokens, plan, wanted, graph.shape)
        graph.replay()
        return self._logits[: len(wanted)]

    def splice(self, cache: object, source: torch.Tensor, target: torch.Tensor, by: torch.Tensor) -> None:
        """As `Llama.splice`."""
        self._model.splice(cache, source, target, by)

    def look(self, tokens: torch.Tensor, plan: AttentionPlan, cache: object, layers: range) -> torch.Tensor:
        """As `Llama.look`, for inputs on the host."""
        return self._model.look(tokens.to(self._device), plan.to(self._device), cache, layers)

    def _graph_for(self, tokens, plan: AttentionPlan, cache: object, wanted: torch.Tensor) -> Graph | None:
        if cache is not self._cache:
            return None
        return next((graph for graph in self._graphs if graph.shape.holds(tokens, plan, wanted)), None)

    def _capture(self, shape: Shape, pool: object) -> Graph:
        inputs = self._replayed.empty(shape)

        def compute() -> None:
            tokens = told(inputs.tokens, self._sampled)
            logits = self._model.forward(tokens, inputs.plan, self._cache, inputs.wanted)
            self._logits[: shape.wanted].copy_(logits)  # one buffer for all, or each graph would keep its own

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


def shapes_of(width: int, max_decodes: int) -> list[Shape]:
    """What is captured for block tables of `width`, the quickest first: steps of decodes, then mixed ones."""
    decodes = sorted({size for size in DECODES if size < max_decodes} | {max_decodes})
    shapes = [Shape(size, size, width, size, size, size) for size in decodes]
    for size in MIXED:
        few = min(max_decodes, size)
        shapes.append(Shape(size, few + CHUNKS, width, few + CHUNKS, few, few))
    return shapes


def told(tokens: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """`tokens` [n] with sampled[i] for each -1 - i; 0 for one that could not be drawn, whose request will fail."""
    return torch.where(tokens < 0, sampled[(-1 - tokens).clamp(min=0)], tokens).clamp(min=0)
