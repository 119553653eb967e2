"""However a request was scheduled, it gets the same logits: cache on or off, batch 1 or N, chunked or whole,
preempted or not, guessed or not.

In float64 the only differences are of rounding, 4e-15 here, and a bug in the engine exceeds that by far.
"""

from __future__ import annotations

import random

import pytest
import torch

from inference import Sampling
from inference.engine import EngineCore, EngineOptions, Policy
from inference.models import Llama, open_checkpoint
from kernels import FEW_TOKENS
from tests.inference.engine_machine import Guesser
from tests.inference.integer_model import TokensAsText
from tests.inference.mutants import MUTANTS, planted
from tests.inference.tiny import save_model

TOLERANCE = 1e-11
ANSWER = 12
Logits = dict[tuple[str, int], torch.Tensor]  # by request and position


@pytest.fixture(scope="module", params=["llama", "qwen3 with qk norm", "mistral with a window"])
def model(request, tmp_path_factory):
    return Llama(open_checkpoint(str(save_model(tmp_path_factory.mktemp("model"), request.param))), torch.float64)


def prompts() -> dict[str, list[int]]:
    """Documents in several orders behind one system prompt, as retrieval sends them."""
    rng = random.Random(5)
    system, *documents = ([rng.randrange(3, 512) for _ in range(40)] for _ in range(5))
    asked = {}
    for i, order in enumerate([(0, 1), (0, 2), (1, 0), (0, 1), (3, 2)]):
        question = [rng.randrange(3, 512) for _ in range(5 + 7 * i)]
        asked[f"r{i}"] = system + documents[order[0]] + documents[order[1]] + question
    return asked


def run(
    model: Llama,
    together: bool = True,
    blocks: int = 200,
    guess: dict[str, list[int]] | None = None,
    forced: dict[str, list[int]] | None = None,
    **policy,
) -> tuple[dict, Logits]:
    """(tokens by request, the logits each was chosen from).  `guess`: the answers, two thirds of which are guessed;
    `forced`: the answers that are taken whatever the logits say (teacher forcing)."""
    core = EngineCore(
        model,
        EngineOptions(
            identity="tiny",
            blocks=blocks,
            max_context_tokens=1024,
            eos_token_ids=frozenset(),
            policy=Policy(**{"draft_rows": 8 if guess else 0} | policy),
        ),
        text_stream=TokensAsText,
        clock=lambda: 0.0,
    )
    logits: Logits = {}
    said: dict[str, list[int]] = {}
    schedule, forward = core.scheduler.schedule, model.forward
    planned = []

    def noted_schedule(now):
        planned[:] = sorted(schedule(now), key=lambda s: s.tokens > FEW_TOKENS)  # in the order of a batch
        return list(planned)

    def noted_forward(*args):
        out = forward(*args).clone()
        row = 0
        for s in planned:
            known = s.start + s.tokens - len(s.drafts)
            for i in range(1 + len(s.drafts) if known == len(s.sequence.tokens) else 0):
                key = (s.sequence.request_id, s.start + s.tokens - len(s.drafts) + i)
                logits[key] = out[row].clone()  # of a guess that was wrong it is overwritten by the right one
                if forced is not None:
                    rest = forced[key[0]][key[1] - len(prompts()[key[0]]) :]
                    out[row, rest[0] if rest else 0] = 1e6
                row += 1
        return out

    core.scheduler.schedule = noted_schedule
    core._model = type("Noted", (), {"forward": staticmethod(noted_forward)})()
    for name, prompt in prompts().items():
        sampling = Sampling(max_tokens=ANSWER, ignore_eos=True)
        core.add(name, prompt, sampling, "public", 0, drafter=Guesser(prompt + guess[name]) if guess else None)
        while core.has_work and not together:
            collect(core, said)
    while core.has_work:
        collect(core, said)
    kept = {key: row for key, row in logits.items() if key[1] < len(prompts()[key[0]]) + ANSWER}
    return said, kept


def collect(core: EngineCore, said: dict[str, list[int]]) -> None:
    before = core.counters.computed_tokens
    for output in core.step():
        assert output.error is None
        said.setdefault(output.request_id, []).extend(int(token) for token in output.text.split())
    assert core.counters.computed_tokens > before, "a step with work advanced nobody"


def difference(one: Logits, other: Logits) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.fixture(scope="module")
def alone(model):
    """The truth: each by itself in a cache of its own, whole."""
    return run(model, together=False, max_tokens=4096)


SCHEDULES = {
    "together": {},
    "one after the other, from the cache": {"together": False},
    "in chunks of 16": {"max_tokens": 16},
    "in chunks of 37": {"max_tokens": 37, "min_chunk": 5},
    "two at a time": {"max_running": 2, "max_tokens": 64},
    "short of blocks, preempted": {"blocks": 25, "max_tokens": 48},
    "with guesses": {},
    "with guesses, short of blocks": {"blocks": 25, "max_tokens": 48},
}


def with_answers(schedule: str, answers: dict[str, list[int]]) -> dict:
    return SCHEDULES[schedule] | {"guess": answers if "guesses" in schedule else None}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_same_logits(model, alone, schedule):
    said, logits = run(model, **with_answers(schedule, alone[0]))
    assert said == alone[0]
    assert difference(logits, alone[1]) <= TOLERANCE


@pytest.mark.parametrize(
    ("what", "schedule"),
    [
        ("two blocks of a table are swapped", "together"),
        ("a chunk begins one token late", "in chunks of 37"),
        ("a slot too far", "two at a time"),
        ("logits of the token before", "in chunks of 16"),
        ("guesses are kept unseen", "with guesses"),
    ],
)
def test_the_tolerance_notices_a_bug(model, alone, what, schedule):
    """By a factor of a hundred at least, or by breaking."""
    mutant = next(mutant for mutant in MUTANTS if mutant.what == what)
    with planted(mutant):
        try:
            _, logits = run(model, **with_answers(schedule, alone[0]))
        except Exception:
            return
    shared = logits.keys() & alone[1].keys()
    assert max(float((logits[key] - alone[1][key]).abs().max()) for key in shared) > 100 * TOLERANCE


NOISE = 4  # times the noise: a lead that rounding can't turn
TIES = 0.02  # the most answers that may be too close to say


@pytest.fixture(scope="module")
def real():
    return Llama(open_checkpoint("smollm2"), torch.float32)


@pytest.fixture(scope="module")
def real_alone(real):
    """(answers, logits, noise): each by itself and whole; the noise is what two tokens at a time change."""
    answers, logits = run(real, together=False, max_tokens=4096)
    _, again = run(real, together=False, forced=answers, max_tokens=2, min_chunk=1)
    return answers, logits, difference(again, logits)


def turned(one: Logits, other: Logits, noise: float) -> tuple[int, float]:
    """(best tokens that differ though they led by more than the noise can turn, share of leads too small to say)."""
    wrong = ties = 0
    for key, row in other.items():
        best, second = row.topk(2).values.tolist()
        if best - second <= NOISE * noise:
            ties += 1
        elif one[key].argmax() != row.argmax():
            wrong += 1
    return wrong, ties / len(other)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["together", "in chunks of 37", "short of blocks, preempted", "with guesses"])
def test_a_real_model_chooses_the_same_tokens_wherever_it_leads_by_more_than_noise(real, real_alone, schedule):
    """Teacher-forced, in float32, where rounding depends on the batch, so that equal texts can't be asked for."""
    answers, logits, noise = real_alone
    assert 0 < noise < 1e-2
    _, ours = run(real, forced=answers, **with_answers(schedule, answers))
    wrong, ties = turned(ours, logits, noise)
    assert wrong == 0
    assert ties < TIES


@pytest.mark.slow
def test_the_margin_notices_a_bug(real, real_alone):
    """Or breaks: what this bug reads was never written, and may happen not to be a number."""
    answers, logits, noise = real_alone
    with planted(next(mutant for mutant in MUTANTS if mutant.what == "two blocks of a table are swapped")):
        try:
            _, ours = run(real, forced=answers)
        except AssertionError:
            return
    assert turned(ours, logits, noise)[0] > 0
