"""What a step reads, in one buffer: the views of its parts, and the copy that takes them to a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import AttentionPlan

ALIGNED = 16  # bytes


class Shape(NamedTuple):
    """How much of each input a buffer holds; `width` in blocks of a block table.  The first `few_sequences` of the
    sequences are for decodes, which have at most `few_tokens` tokens: a plan may have fewer of all, the rest belongs
    to no sequence."""

    tokens: int
    sequences: int
    width: int
    wanted: int
    few_sequences: int
    few_tokens: int

    @classmethod
    def of(cls, tokens: torch.Tensor, plan: AttentionPlan, wanted: torch.Tensor) -> Shape:
        """The least that holds a step."""
        counts = len(tokens), *plan.block_tables.shape, len(wanted)
        return cls(*counts, plan.few_sequences, plan.few_tokens)

    def holds(self, tokens: torch.Tensor, plan: AttentionPlan, wanted: torch.Tensor) -> bool:
        chunks = len(plan.context_lens) - plan.few_sequences
        return (
            len(tokens) <= self.tokens
            and plan.few_tokens <= self.few_tokens
            and plan.few_sequences <= self.few_sequences
            and chunks <= self.sequences - self.few_sequences
            and len(wanted) <= self.wanted
        )


class Inputs(NamedTuple):
    """Views into one buffer: what a step reads."""

    tokens: torch.Tensor
    wanted: torch.Tensor
    plan: AttentionPlan


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
        here = carve(self._here, shape)
        _fill(here.tokens, tokens, 0)
        _fill(here.wanted, wanted, 0)
        _fill(here.plan.positions, plan.positions, 0)
        _fill(here.plan.slot_mapping, plan.slot_mapping, -1)
        few, room = plan.few_sequences, shape.few_sequences
        starts, contexts, tables = here.plan.query_start, here.plan.context_lens, here.plan.block_tables
        _fill(starts[:room], plan.query_start[:few], plan.few_tokens)
        _fill(starts[room:], plan.query_start[few:], len(tokens))
        _fill(contexts[:room], plan.context_lens[:few], 0)
        _fill(contexts[room:], plan.context_lens[few:], 0)
        width = plan.block_tables.shape[1]
        tables[:few, :width] = plan.block_tables[:few]
        tables[room : room + len(plan.context_lens) - few, :width] = plan.block_tables[few:]
        self._there[:size].copy_(self._here[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return carve(self._there, shape)

    def bytes(self, shape: Shape) -> torch.Tensor:
        """What `send` put here last, as it lies in memory."""
        return self._here[: size_of(shape)]


def _fill(into: torch.Tensor, values: torch.Tensor, rest: int) -> None:
    into[: len(values)] = values
    into[len(values) :] = rest


def _parts(shape: Shape) -> list[tuple[int, torch.dtype, int]]:
    """(numbers, their dtype, bytes) of each part of a buffer, in the order of `carve`; kernels are compiled for
    addresses in multiples of ALIGNED."""
    tokens, sequences, width, wanted, _, _ = shape
    counts = [(count, torch.int64) for count in (tokens, wanted, tokens, tokens)]
    counts += [(count, torch.int32) for count in (sequences + 1, sequences, sequences * width)]
    return [(count, dtype, -(-count * dtype.itemsize // ALIGNED) * ALIGNED) for count, dtype in counts]


def size_of(shape: Shape) -> int:
    return sum(size for _, _, size in _parts(shape))


def carve(buffer: torch.Tensor, shape: Shape) -> Inputs:
    """The parts of `buffer` for a step of `shape`."""
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
            few_sequences=shape.few_sequences,
            few_tokens=shape.few_tokens,
        ),
    )
