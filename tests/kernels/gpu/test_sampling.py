"""Sampling in Triton against torch in float64: the same draws, so the same tokens; and the draws against their
probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import reference
from kernels.gpu import sampling
from kernels.sampling import SamplingRows
from tests.kernels.gpu.conftest import DEVICE, normal

VOCAB = 5003  # more than a tile, and a part of one
SETTINGS = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "hot": (3.0, 0, 1.0, 0.0),
    "the five best": (1.0, 5, 1.0, 0.0),
    "one": (2.0, 1, 1.0, 0.0),
    "more than there are": (1.0, 2 * VOCAB, 1.0, 0.0),
    "nucleus": (0.7, 0, 0.8, 0.0),
    "a tiny nucleus": (0.7, 0, 1e-6, 0.0),
    "min-p": (1.0, 0, 1.0, 0.2),
    "all": (1.3, 40, 0.9, 0.05),
}


def rows_of(settings: list[tuple], seed: int = 7, position: int = 0, allowed: torch.Tensor | None = None):
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    count = len(settings)

    def column(values, dtype) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=DEVICE)

    return SamplingRows(
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column([seed + (i << 33) for i in range(count)], torch.int64),
        column([position + i for i in range(count)], torch.int64),
        allowed,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_tokens_as_the_reference(dtype: torch.dtype):
    logits = (normal(len(SETTINGS), VOCAB) * 3).to(dtype)
    rows = rows_of(list(SETTINGS.values()))
    assert sampling.sample(logits, rows).tolist() == reference.sample(logits, rows).tolist()


@pytest.mark.parametrize("setting", ["greedy", "nucleus", "all"])
def test_only_what_the_mask_allows(setting: str):
    logits = normal(2, VOCAB) * 3
    words = torch.zeros(2, -(-VOCAB // 32), dtype=torch.int32, device=DEVICE)
    few = [5, 31, 32, 4095, 4096, VOCAB - 1]
    for token in few:
        words[0, token // 32] |= torch.tensor(1 << token % 32, dtype=torch.int64).to(torch.int32).item()
    words[1] = -1
    rows = rows_of([SETTINGS[setting]] * 2, allowed=words)
    tokens = sampling.sample(logits, rows).tolist()
    assert tokens == reference.sample(logits, rows).tolist()
    assert tokens[0] in few


def test_a_broken_row_gives_no_token():
    logits = normal(4, VOCAB)
    logits[0, 4500] = float("nan")
    logits[1] = float("-inf")
    logits[2, :] = float("-inf")
    logits[2, 4999] = -3.0
    rows = rows_of([SETTINGS["all"]] * 4)
    assert sampling.sample(logits, rows).tolist()[:3] == [-1, -1, 4999]


def test_a_draw_depends_on_its_seed_and_position_alone():
    logits = normal(1, VOCAB).expand(3, -1).contiguous()
    rows = rows_of([SETTINGS["plain"]] * 3)
    tokens = sampling.sample(logits, rows)
    alone = SamplingRows(*(None if column is None else column[2:] for column in rows))
    assert sampling.sample(logits[2:], alone).tolist() == tokens[2:].tolist()
    assert len(set(tokens.tolist())) > 1


def test_draws_follow_the_probabilities():
    """Of the reference, which the kernel equals: a chi-squared test over 4,000 draws of ten tokens."""
    probabilities = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.04, 0.03, 0.02, 0.01])
    draws = 4000
    uniform = torch.stack([reference.philox_uniform(11, 10, position) for position in range(draws)])
    tokens = (probabilities.log() - (-uniform.log()).log()).argmax(1)
    counts = torch.bincount(tokens, minlength=10)
    statistic = ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum()
    assert statistic < 27.9  # 9 degrees of freedom, one in a thousand
    skewed = probabilities.roll(1)
    assert ((counts - draws * skewed) ** 2 / (draws * skewed)).sum() > 1000
    assert math.isclose(uniform.mean(), 0.5, abs_tol=0.01)
