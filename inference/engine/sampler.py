"""Logits to tokens: greedy, or temperature with top-k, top-p and min-p, by the exponential race.

A draw depends on (seed, position) and the tokens before it alone, so batching, chunking, preemption and speculation
never change it.  Penalties and biases follow OpenAI's and Hugging Face's definitions.
"""

from __future__ import annotations

import torch

import kernels
from inference.backend import Sampling, TokenLogprob
from inference.engine.scheduler import Scheduled
from inference.engine.sequence import Sequence

COLDEST = 1e-5  # below it the division overflows, and the best token is all there is to draw


def choose(logits: torch.Tensor, sampled: list[Scheduled]) -> Choices:
    """What is chosen from logits [rows, vocab], 1 + len(drafts) rows for each of `sampled`, where they are."""
    return DeviceChoices(logits, sampled) if kernels.on_gpu(logits) else Choices(logits)


class Choices:
    """The rows of logits [rows, vocab] float32 of one step, and what is chosen from each."""

    def __init__(self, logits: torch.Tensor):
        self._logits = logits
        best, tokens = logits.max(-1)
        self._finite = best.isfinite().tolist()
        self._best = tokens.tolist()

    def wait(self) -> None:
        """Until the tokens are on the host; raises what went wrong on the device."""

    def token(self, row: int, sequence: Sequence) -> int | None:
        """The next token of `sequence`, whose last token is the one that gave `row`; None where the row holds NaN or
        no finite value."""
        if not self._finite[row]:
            return None
        sampling = sequence.sampling
        if sampling.temperature < COLDEST and not adjusts(sequence):
            return self._best[row]
        return self._choose_here(row, sequence)

    def _choose_here(self, row: int, sequence: Sequence) -> int:
        logits = _adjusted(self._row(row), sequence)
        if sequence.sampling.temperature < COLDEST:
            return int(logits.argmax())
        return _draw(logits, sequence)

    def _row(self, row: int) -> torch.Tensor:
        return self._logits[row]

    def logprob(self, row: int, token: int, top: int) -> TokenLogprob:
        """Of `token`, and of the `top` best beside it."""
        logprobs = self._row(row).log_softmax(-1)
        values, ids = logprobs.topk(top) if top else (torch.empty(0), torch.empty(0))
        best = tuple(TokenLogprob(int(i), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs[token]), top=best)


class DeviceChoices(Choices):
    """The same for logits on a GPU, which stay there: all rows are drawn at once, and only tokens come over.  Rows with
    penalties, biases or a constraint come over whole.  Draws follow the same probabilities, from other random numbers
    than on a CPU.

    `tokens` [rows] int64 are there, or will be, for the next step to read; on the host only after `wait`.
    """

    def __init__(self, logits: torch.Tensor, sampled: list[Scheduled]):
        self._logits = logits
        rows = [(s.sequence, i) for s in sampled for i in range(1 + len(s.drafts))]
        settings = [sequence.sampling for sequence, _ in rows]
        columns = (
            torch.tensor([s.temperature if s.temperature >= COLDEST else 0.0 for s in settings], dtype=torch.float32),
            torch.tensor([max(s.top_k, 0) for s in settings], dtype=torch.int32),
            torch.tensor([s.top_p for s in settings], dtype=torch.float32),
            torch.tensor([s.min_p for s in settings], dtype=torch.float32),
            torch.tensor([sequence.seed % 2**63 for sequence, _ in rows], dtype=torch.int64),
            torch.tensor([len(sequence.tokens) + i for sequence, i in rows], dtype=torch.int64),
        )
        bits = torch.cat([column.view(torch.uint8) for column in columns])
        if logits.is_cuda:  # one copy, that waits for nothing
            bits = bits.pin_memory().to(logits.device, non_blocking=True)
        sent = bits.split([column.nbytes for column in columns])
        there = (part.view(column.dtype) for part, column in zip(sent, columns, strict=True))
        self.tokens = kernels.sample(logits, kernels.SamplingRows(*there))
        self._here, self._came = self.tokens, None
        if logits.is_cuda:
            self._here = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
            self._here.copy_(self.tokens, non_blocking=True)
            self._came = torch.cuda.Event()
            self._came.record()
        self._drawn: list[int] = []

    def wait(self) -> None:
        if self._came is not None:
            self._came.synchronize()
        self._drawn = self._here.tolist()

    def token(self, row: int, sequence: Sequence) -> int | None:
        if self._drawn[row] < 0:
            return None
        return self._choose_here(row, sequence) if adjusts(sequence) else self._drawn[row]

    def _row(self, row: int) -> torch.Tensor:
        return self._logits[row].cpu()


def adjusts(sequence: Sequence) -> bool:
    """Whether its logits depend on the tokens before, by more than the model."""
    s = sequence.sampling
    plain = s.repetition_penalty == 1 and s.presence_penalty == 0 and s.frequency_penalty == 0 and not s.logit_bias
    return not plain or sequence.grammar is not None


def _adjusted(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """logits [vocab] with bias and penalties, and without what the constraint forbids."""
    sampling = sequence.sampling
    if not adjusts(sequence):
        return logits
    logits = logits.clone()
    if sampling.logit_bias:
        ids = [token for token in sampling.logit_bias if 0 <= token < len(logits)]
        logits[ids] += torch.tensor([sampling.logit_bias[token] for token in ids])
    if sampling.repetition_penalty != 1:
        ids = list(set(sequence.tokens))
        seen = logits[ids]
        penalty = sampling.repetition_penalty
        logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts: dict[int, int] = {}
        for token in sequence.tokens[sequence.prompt_tokens :]:
            counts[token] = counts.get(token, 0) + 1
        taken = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
        logits[list(counts)] -= torch.tensor(taken)
    if sequence.grammar is not None:
        sequence.grammar.forbid(logits)
    return logits


def _draw(logits: torch.Tensor, sequence: Sequence) -> int:
    """argmax(p / Exponential(1)) draws from p without a cumulative sum (the Gumbel-max trick, as an exponential
    race)."""
    values, ids = _filter(logits / sequence.sampling.temperature, sequence.sampling)
    generator = torch.Generator().manual_seed((sequence.seed * 1_000_003 + len(sequence.tokens)) % 2**63)
    race = torch.empty_like(values).exponential_(generator=generator)
    winner = int((values.softmax(-1) / race).argmax())
    return int(ids[winner]) if ids is not None else winner


def _filter(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits that may be drawn, best first, and their ids; (logits, None) where nothing is filtered.

    top_p keeps the smallest set of best tokens whose probability reaches it, always at least one; min_p those whose
    probability is at least that share of the best one's.
    """
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    if top_k <= 0 and top_p >= 1 and min_p <= 0:
        return logits, None
    values, ids = logits.topk(min(top_k, len(logits))) if top_k > 0 else logits.sort(descending=True)
    kept = len(values)
    if top_p < 1:
        probabilities = values.softmax(-1)
        kept = int(((probabilities.cumsum(-1) - probabilities) < top_p).sum())
    if min_p > 0:
        kept = min(kept, int((values >= values[0] + torch.tensor(min_p).log()).sum()))
    return values[: max(kept, 1)], ids[: max(kept, 1)]
