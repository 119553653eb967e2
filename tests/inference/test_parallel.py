"""A model cut into two processes says what the whole one says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from inference import Sampling
from inference.engine import EngineCore, EngineOptions, Policy
from inference.engine.parallel import Leader, follow
from inference.models import Llama, ModelError, open_checkpoint
from inference.models.shard import Shard
from tests.inference.integer_model import TokensAsText
from tests.inference.test_on_gpu import collect, prompts
from tests.inference.tiny import save_model

BLOCKS = 40


def answers(model) -> dict[str, list[int]]:
    core = EngineCore(
        model,
        EngineOptions(
            identity="tiny",
            blocks=BLOCKS,
            max_context_tokens=256,
            eos_token_ids=frozenset(),
            policy=Policy(max_tokens=64),
        ),
        text_stream=TokensAsText,
        clock=lambda: 0.0,
    )
    said: dict[str, list[int]] = {}
    for name, tokens in prompts().items():
        core.add(name, tokens, Sampling(max_tokens=6, ignore_eos=True, temperature=0), "public", 0)
    while core.has_work:
        collect(core, said)
    return said


def run_part(rank: int, meeting: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = Llama(open_checkpoint(folder), torch.float64, shard=Shard(rank, 2))
    if rank:
        follow(model, model.new_cache(BLOCKS))
    else:
        leader = Leader(model)
        print(json.dumps(answers(leader)))
        leader.close()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2 with biases", "qwen3 with qk norm"])
def test_two_processes_say_what_one_says(tmp_path, family: str):
    folder = str(save_model(tmp_path / "model", family))
    parts = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.inference.test_parallel", str(rank), str(tmp_path / "meeting"), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said, errors = zip(*(part.communicate(timeout=120) for part in parts), strict=True)
    finally:
        for part in parts:
            part.kill()
    assert [part.returncode for part in parts] == [0, 0], errors
    assert json.loads(said[0]) == answers(Llama(open_checkpoint(folder), torch.float64))


def test_what_cannot_be_cut_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    with pytest.raises(ModelError, match="KV heads 2 can't be cut into 4 parts"):
        Llama(open_checkpoint(str(folder)), torch.float32, shard=Shard(0, 4))


if __name__ == "__main__":
    run_part(int(sys.argv[1]), *sys.argv[2:])
