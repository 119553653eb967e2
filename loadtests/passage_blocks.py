"""How well passages fill the blocks of the engine's KV cache.

    python -m loadtests.passage_blocks         writes passage_blocks.md and .json

A document that is computed for all who ask for it takes whole blocks (`inference.engine.segments`), so the last one is
half empty on average where passages are cut without knowing the model that will read them.  Counted over the handbook's
passages, each as a prompt has it: with its title and headings, in tokens of the default model.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path

from gateway.composing import document_segment
from inference.engine.blocks import BLOCK_SIZE
from inference.models.checkpoint import open_checkpoint
from inference.models.tokenizer import load_tokenizer
from loadtests import report
from loadtests.question_sets import HANDBOOK
from loadtests.run import RESULTS
from retrieval import Passage, RetrievalSettings, SentenceTransformerEmbedder, UnreadableFile, sentences
from retrieval.formats.reading import read_file
from retrieval.splitting import split


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.passage_blocks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not HANDBOOK.is_dir():
        print(f"no {HANDBOOK}: there is nothing to measure with", file=sys.stderr)
        return 2
    settings = RetrievalSettings()
    count_tokens = SentenceTransformerEmbedder().count_tokens
    tokenizer = load_tokenizer(open_checkpoint("smollm2").path)

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    lengths: list[int] = []
    of_sentences: list[int] = []
    for path in sorted(HANDBOOK.rglob("*.md")):
        try:
            parsed = read_file(path.name, path.read_bytes())
        except UnreadableFile:
            continue
        for each in split(parsed, count_tokens, settings.passage_tokens, settings.max_passage_tokens):
            passage = Passage("", "", parsed.title, "", each.heading, each.page, each.start, each.end, each.text, 0.0)
            lengths.append(length(document_segment(passage).text))
            of_sentences += [length(each.text[start:end]) for start, end in sentences(each.text)]
    command = shlex.join(["python", "-m", "loadtests.passage_blocks", *sys.argv[1:]])
    lines = [
        "# Passages and blocks of the KV cache",
        "",
        f"`{command}`: the handbook's passages, {settings.passage_tokens} to {settings.max_passage_tokens} tokens of "
        f"the embedder at most, in tokens of SmolLM2; blocks of {BLOCK_SIZE}.  A sentence has "
        f"{statistics.mean(of_sentences):.0f} tokens on average.",
        "",
        "| passages | number | tokens of one | empty slots of its last block | share of all slots |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = []
    for name, least in (("all", 0), ("of 150 tokens and more", 150)):
        some = [tokens for tokens in lengths if tokens >= least]
        empty = [-tokens % BLOCK_SIZE for tokens in some]
        share = sum(empty) / (sum(some) + sum(empty))
        rows.append({"passages": name, "count": len(some), "tokens": sum(some), "empty": sum(empty), "share": share})
        mean = statistics.mean(some)
        lines.append(f"| {name} | {len(some)} | {mean:.0f} | {statistics.mean(empty):.1f} | {share:.1%} |")
    print("\n".join(lines))
    report.write(options.out, "passage_blocks", lines, {"command": command, "block_size": BLOCK_SIZE, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
