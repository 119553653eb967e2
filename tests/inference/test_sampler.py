"""Draws: from the right distribution, the same in any company."""

from __future__ import annotations

import pytest
import torch

from inference import Sampling
from inference.engine.sampler import Choices
from inference.engine.sequence import Sequence


def sample(logits, rows):
    choices = Choices(logits)
    return [choices.token(row, sequence) for row, sequence in enumerate(rows)]


def test_a_seed_gives_the_same_draws_in_any_company():
    def sequence(seed, length=5, **sampling):
        return Sequence("x", [1] * length, 5, Sampling(temperature=1.0, **sampling), b"", None, seed)

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    alone = sample(logits[1:2], [sequence(7)])
    assert sample(logits, [sequence(1), sequence(7), sequence(3)])[1] == alone[0]
    best = set(logits[0].topk(3).indices.tolist())
    assert {sample(logits[:1], [sequence(s, top_k=3)])[0] for s in range(200)} == best
    draws = [sample(logits[:1], [sequence(s)])[0] for s in range(4000)]
    frequencies = torch.bincount(torch.tensor(draws), minlength=50) / len(draws)
    assert (frequencies - logits[0].softmax(-1)).abs().max() < 0.03
    nucleus = {sample(logits[:1], [sequence(s, top_p=0.3)])[0] for s in range(300)}
    probabilities, order = logits[0].softmax(-1).sort(descending=True)
    assert nucleus == set(order[: int((probabilities.cumsum(-1) < 0.3).sum()) + 1].tolist())


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324])
def test_the_coldest_draw_is_the_best_token(temperature):
    logits = torch.tensor([[0.0, 3.0, 9.0, 1.0]])
    sampling = Sampling(temperature=temperature)
    assert sample(logits, [Sequence("x", [1], 1, sampling, b"", None, 5)]) == [2]
