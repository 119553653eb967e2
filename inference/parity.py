"""Does the engine compute what `transformers` computes?  Largest difference of the logits on the same weights.

python -m inference.parity [MODEL]     a folder, a .gguf file or a built-in name
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from inference.models import Checkpoint, Llama, open_checkpoint
from kernels import BLOCK_SIZE, AttentionPlan


def logits_of(model: Llama, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits [tokens, vocab] float32 of one sequence ids [tokens] int64, in chunks over the paged cache."""
    cache = model.new_cache(-(-len(ids) // BLOCK_SIZE) + 1)
    out = []
    for start in range(0, len(ids), chunk):
        tokens = ids[start : start + chunk]
        end = start + len(tokens)
        blocks = np.arange(1, -(-end // BLOCK_SIZE) + 1, dtype=np.int32)
        plan = AttentionPlan.of([len(tokens)], [end], blocks[None])
        out.append(model.forward(tokens, plan, cache, torch.arange(len(tokens))))
    return torch.cat(out)


def transformers_model(checkpoint: Checkpoint):
    """The same weights in `transformers`, float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if checkpoint.path.suffix == ".gguf":
        where = {
            "pretrained_model_name_or_path": checkpoint.path.parent,
            "gguf_file": checkpoint.path.name,
            "quantization_config": GgufConfig(dequantize=True),
        }
    else:
        where = {"pretrained_model_name_or_path": checkpoint.path}
    return AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where).eval()


@torch.inference_mode()
def largest_difference(name: str, tokens: int = 512, chunk: int = 200) -> float:
    """max |engine - transformers| over the logits of `tokens` random tokens, both in float32."""
    checkpoint = open_checkpoint(name)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, checkpoint.config.vocab_size, (tokens,), generator=generator)
    wanted = transformers_model(checkpoint)(ids[None]).logits[0]
    return (logits_of(Llama(checkpoint, torch.float32), ids, chunk) - wanted).abs().max().item()


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    print(f"{model}: largest difference of the logits over 512 tokens: {largest_difference(model):.2e}")
