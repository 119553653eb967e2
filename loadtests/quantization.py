"""What rounding the weights costs: perplexity of real text, and how far the next token's distribution moves.

    python -m loadtests.quantization [--text FOLDER] [--model smollm2]

The text is Markdown read as retrieval reads it, in windows of 512 tokens.  KL is of each kind from float32, the mean
over all positions, in nats; "same" is the share of positions whose best token is the same.  Writes quantization.md
and .json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from inference.models import Llama, open_checkpoint
from inference.models.tokenizer import load_tokenizer
from inference.parity import logits_of
from loadtests import report
from loadtests.question_sets import HANDBOOK
from loadtests.run import RESULTS
from retrieval import UnreadableFile
from retrieval.formats.reading import read_file

WINDOW = 512
KINDS = {
    "float32": (torch.float32, "none"),
    "bf16": (torch.bfloat16, "none"),
    "w8a16 over bf16": (torch.bfloat16, "w8a16"),
    "w8a8 over bf16": (torch.bfloat16, "w8a8"),
    "w4a16 over bf16": (torch.bfloat16, "w4a16"),
}


def windows(folder: Path, tokenizer, count: int) -> list[torch.Tensor]:
    """`count` windows of WINDOW token ids, evenly spread over all pages."""
    ids: list[int] = []
    for page in sorted(folder.rglob("*.md")):
        try:
            ids += tokenizer(read_file(page.name, page.read_bytes()).text).input_ids
        except UnreadableFile:
            continue
    whole = len(ids) // WINDOW
    starts = [i * whole // count * WINDOW for i in range(min(count, whole))]
    return [torch.tensor(ids[start : start + WINDOW]) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.quantization", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=HANDBOOK, help="folder of Markdown")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.text.is_dir():
        sys.exit(f"quantization: no folder {options.text}: give one with --text")
    checkpoint = open_checkpoint(options.model)
    texts = windows(options.text, load_tokenizer(checkpoint.path), options.windows)
    rows, truth = [], []
    for name, (dtype, quantization) in KINDS.items():
        model = Llama(checkpoint, dtype, quantization)
        losses, divergence, same = [], [], []
        for i, ids in enumerate(texts):
            logprobs = logits_of(model, ids, 128)[:-1].log_softmax(-1)
            losses.append(-logprobs.gather(1, ids[1:, None]).mean())
            if name == "float32":
                truth.append(logprobs)
            divergence.append((truth[i].exp() * (truth[i] - logprobs)).sum(-1).mean())
            same.append((truth[i].argmax(-1) == logprobs.argmax(-1)).float().mean())
        row = {
            "weights": name,
            "perplexity": float(torch.stack(losses).mean().exp()),
            "kl": float(torch.stack(divergence).mean()),
            "same": float(torch.stack(same).mean()),
        }
        rows.append(row)
        print(row, flush=True)
    where = report.environment()
    command = shlex.join(["python", "-m", "loadtests.quantization", *sys.argv[1:]])
    lines = [
        "# What rounding the weights costs",
        "",
        f"`{command}`: {len(texts)} windows of {WINDOW} tokens; commit {where['commit']}.",
        "",
        "| weights | perplexity | KL from float32, nats | same best token |",
        "|---|---|---|---|",
        *(f"| {r['weights']} | {r['perplexity']:.3f} | {r['kl']:.5f} | {100 * r['same']:.1f} % |" for r in rows),
        "",
    ]
    record = {"command": command, "rows": rows, "environment": where}
    (options.out / "quantization.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "quantization.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
