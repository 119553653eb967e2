"""The whole engine over the Triton kernels gives the same tokens as over torch and C++: on a GPU where there is one,
else in Triton's interpreter, in a process of its own, since how the kernels run is chosen once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from inference import Sampling
from inference.engine import EngineCore, EngineOptions, Policy
from inference.engine.device import DeviceModel
from inference.models import Llama, open_checkpoint
from tests.inference.engine_machine import Guesser
from tests.inference.integer_model import TokensAsText
from tests.inference.tiny import save_model

BLOCKS, ANSWER = 40, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prompts() -> dict[str, list[int]]:
    """Two share a document of three blocks; one is longer than a step, one a single token."""
    document = [(7 * i) % 500 + 3 for i in range(48)]
    return {"first": document + [9, 8, 7], "second": document + [4, 5], "long": list(range(3, 95)), "short": [5]}


def answers(folder: str, quantization: str = "none", on_device: bool = False, guess: bool = False) -> dict:
    """The greedy tokens of each prompt, how many came from the cache, and how many steps were launched with tokens that
    the host did not know."""
    model = Llama(open_checkpoint(folder), torch.float32, quantization, DEVICE if on_device else "cpu")
    cache = model.new_cache(BLOCKS)
    if on_device:
        model = DeviceModel(model, cache, torch.device(DEVICE), max_context_tokens=256, max_decodes=4)
    core = EngineCore(
        model,
        EngineOptions(
            identity="tiny",
            blocks=BLOCKS,
            max_context_tokens=256,
            eos_token_ids=frozenset(),
            policy=Policy(max_tokens=64, draft_rows=2 if guess else 0, max_draft=2),
            overlap=on_device,
        ),
        text_stream=TokensAsText,
        clock=lambda: 0.0,
        cache=cache,
    )
    ahead, forward = [], model.forward

    def counted(tokens: torch.Tensor, *more) -> torch.Tensor:
        ahead.append(bool((tokens < 0).any()))
        return forward(tokens, *more)

    model.forward = counted
    said: dict[str, list[int]] = {}
    for name, tokens in prompts().items():
        sampling = Sampling(max_tokens=ANSWER, ignore_eos=True, temperature=0)
        guesser = Guesser([*tokens, *tokens]) if guess and name in ("first", "second") else None
        core.add(name, tokens, sampling, "public", 0, drafter=guesser)
        for _ in range(2):  # the next one arrives while this one answers
            collect(core, said)
    while core.has_work:
        collect(core, said)
    core.pool.check()
    assert core.pool.free_blocks == core.pool.capacity
    return {"said": said, "cached": core.counters.cached_tokens, "ahead": sum(ahead)}


def collect(core: EngineCore, said: dict[str, list[int]]) -> None:
    for output in core.step():
        assert output.error is None
        said.setdefault(output.request_id, []).extend(int(token) for token in output.text.split())


def over_triton(**how) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.inference.test_on_gpu", json.dumps(how)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | ({} if DEVICE == "cuda" else {"KERNELS_TRITON": "interpret"}),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model"), "qwen3 with qk norm"))


@pytest.mark.slow
def test_the_same_tokens_as_over_torch(folder: str):
    expected = answers(folder)
    assert expected["cached"] == 48
    found = over_triton(folder=folder, on_device=True, guess=True)
    assert found["ahead"] > 1
    assert found | {"ahead": 0} == expected


if __name__ == "__main__":
    print(json.dumps(answers(**json.loads(sys.argv[1]))))
