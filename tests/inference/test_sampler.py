"""Draws: from the right distribution, the same in any company."""

from __future__ import annotations

import pytest
import torch

from inference import Sampling
from inference.engine.sampler import Choices, DeviceChoices
from inference.engine.scheduler import Scheduled
from inference.engine.sequence import Sequence


def on_host(logits, rows):
    choices = Choices(logits)
    return [choices.token(row, sequence) for row, sequence in enumerate(rows)]


def on_device(logits, rows):
    choices = DeviceChoices(logits, [Scheduled(sequence, 0, 1) for sequence in rows])
    choices.wait()
    return [choices.token(row, sequence) for row, sequence in enumerate(rows)]


@pytest.fixture(params=[on_host, on_device])
def sample(request):
    return request.param


def test_a_seed_gives_the_same_draws_in_any_company(sample):
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
def test_the_coldest_draw_is_the_best_token(sample, temperature):
    logits = torch.tensor([[0.0, 3.0, 9.0, 1.0]])
    sampling = Sampling(temperature=temperature)
    assert sample(logits, [Sequence("x", [1], 1, sampling, b"", None, 5)]) == [2]


def test_what_only_the_host_can_do_is_done_there():
    """Penalties and biases give the same on a device, and a broken row has no token."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    logits[3, 7] = float("nan")
    best = int(logits[0].argmax())
    kinds = [
        {"logit_bias": {11: 100.0}},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0, "temperature": 0.8},
        {},
    ]
    rows = [Sequence("x", [best, 3, 4], 1, Sampling(**({"temperature": 0.0} | kind)), b"", None, 5) for kind in kinds]
    assert on_device(logits, rows) == on_host(logits, rows)
    assert on_device(logits, rows)[0] == 11
    assert on_device(logits, rows)[3] is None
