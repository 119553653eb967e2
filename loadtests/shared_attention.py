"""Whether one pass over what many streams share pays on this processor: decode attention in SmolLM2's shape, bf16.

    python -m loadtests.shared_attention      a minute; writes loadtests/results/shared_attention.md and .json

    apart      each stream reads blocks of its own
    same       each stream reads the same blocks, by itself: what the engine does
    at once    the blocks are read once, as matrix products of all streams' queries, in torch; the softmax's parts are
               kept for a merge.  Only this part is timed, without the merge and what each stream has for itself

Milliseconds of all 30 layers; the arms alternate, medians.  On a GPU `make gpu-check` measures it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

import kernels
from inference.placement import cores
from kernels import BLOCK_SIZE, AttentionPlan, LayerCache
from loadtests import report

LAYERS, HEADS, KV_HEADS, WIDTH = 30, 9, 3, 64
STREAMS = (4, 8, 16, 32)
SHARED = (256, 800, 2048)  # tokens
REPEATS = 9


def at_once(query: torch.Tensor, cache: LayerCache, blocks: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """(output [kv_heads, streams * group, width], log-sum-exp) of query [streams, heads, width] over `blocks`."""
    keys, values = (x[blocks].float().transpose(0, 1).reshape(KV_HEADS, -1, WIDTH) for x in (cache.keys, cache.values))
    packed = query.float().view(len(query), KV_HEADS, -1, WIDTH).transpose(0, 1).reshape(KV_HEADS, -1, WIDTH)
    scores = torch.bmm(packed * scale, keys.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), values), scores.logsumexp(-1)


def milliseconds(actions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Of all layers, each repeat; the arms alternate."""
    took: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(REPEATS + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            for _ in range(LAYERS):
                action()
            if repeat:  # the first one warms up
                took[name].append(1e3 * (time.perf_counter() - began))
    return took


def measured(shared: int, streams: int) -> dict:
    each, scale = shared // BLOCK_SIZE, WIDTH**-0.5
    caches = [LayerCache.empty(1 + streams * each, KV_HEADS, WIDTH, torch.bfloat16) for _ in range(4)]
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()
    query = torch.randn(streams, HEADS, WIDTH).bfloat16()
    own = np.arange(1, 1 + streams * each, dtype=np.int32).reshape(streams, each)
    tables = {"apart": own, "same": np.repeat(own[:1], streams, 0)}
    plans = {name: AttentionPlan.of([1] * streams, [shared] * streams, table) for name, table in tables.items()}
    blocks = torch.from_numpy(own[0]).long()
    exact = kernels.attend(query, caches[0], plans["same"], scale).float()
    once = at_once(query, caches[0], blocks, scale)[0].view(KV_HEADS, streams, -1, WIDTH).transpose(0, 1)
    assert torch.allclose(once.reshape(exact.shape), exact, atol=2e-2), "the arms compute different things"
    turns = cycle(caches)  # as layers are
    took = milliseconds(
        {
            "apart": lambda: kernels.attend(query, next(turns), plans["apart"], scale),
            "same": lambda: kernels.attend(query, next(turns), plans["same"], scale),
            "at once": lambda: at_once(query, next(turns), blocks, scale),
        }
    )
    return {"shared": shared, "streams": streams, "ms": took}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.shared_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(cores())
    rows = []
    for shared in SHARED:
        for streams in STREAMS:
            rows.append(measured(shared, streams))
            print(line(rows[-1]), flush=True)
    where = report.environment()
    command = shlex.join(["python", "-m", "loadtests.shared_attention", *sys.argv[1:]])
    lines = [
        "# One pass over what many streams share, on a CPU",
        "",
        f"`{command}`: decode attention in SmolLM2's shape, bf16, milliseconds of {LAYERS} layers, medians of "
        f"{REPEATS} (least – most); {where['machine']['cores']} cores of {where['machine']['cpu']}; "
        f"commit {where['commit']}.",
        "",
        "| tokens shared | streams | blocks of their own | the same blocks | read once, that part alone "
        "| over the same blocks |",
        "|" + "---|" * 6,
        *(line(row) for row in rows),
        "",
    ]
    record = {"command": command, "rows": rows, "environment": where}
    (options.out / "shared_attention.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "shared_attention.md").write_text("\n".join(lines), encoding="utf-8")


def line(row: dict) -> str:
    cells = [f"{statistics.median(ms):.1f} ({min(ms):.1f} – {max(ms):.1f})" for ms in row["ms"].values()]
    ratio = statistics.median(row["ms"]["at once"]) / statistics.median(row["ms"]["same"])
    return f"| {row['shared']} | {row['streams']} | {' | '.join(cells)} | {ratio:.2f}× |"


if __name__ == "__main__":
    main()
