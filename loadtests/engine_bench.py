"""What the engine makes of this processor, in its own process: shares of what matrices and memory alone would take.

    python -m loadtests.engine_bench [--quantization w8a8]

ceiling    all linear layers over 1,024 tokens and nothing else           prefill   1,024 tokens through the engine
read       one pass over the bf16 weights, summed                         decode    a step at 800 tokens of context
schedule   a step of 256 streams with a model that costs nothing          index     naming and finding a prompt's blocks
Each is repeated, alternated with what it is compared with; writes engine.md and engine.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from inference import Sampling
from inference.engine import EngineCore
from inference.engine.blocks import BlockPool, extend_names, root_name
from inference.models import Llama, open_checkpoint, quantized
from inference.models.linear import Linear
from inference.placement import choose_dtype, cores
from kernels import BLOCK_SIZE
from loadtests import report
from loadtests.free import Free, core_over
from loadtests.run import RESULTS

PREFILL = 1024
CONTEXT = 800
BATCHES = (1, 8, 16)
STREAMS = 256
REPEATS = 5
CEILINGS = {"bf16": torch.bfloat16, "float32": torch.float32}  # some processors are slower in bf16


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def linear_layers(checkpoint, dtype: torch.dtype) -> list[Linear]:
    """The projections of every layer, fused as the engine fuses them."""
    layers = []
    for i in range(checkpoint.config.layers):
        at = f"model.layers.{i}"
        for group in (
            [f"{at}.self_attn.{name}_proj" for name in "qkv"],
            [f"{at}.self_attn.o_proj"],
            [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"],
            [f"{at}.mlp.down_proj"],
        ):
            weight = torch.cat([checkpoint.tensor(f"{name}.weight") for name in group]).to(dtype)
            layers.append(Linear(weight))
    return layers


def prefill(core: EngineCore, salt: int) -> float:
    tokens = [(salt * 7919 + i * 31) % 40_000 + 5 for i in range(PREFILL)]
    core.add(f"p{salt}", tokens, Sampling(max_tokens=1, ignore_eos=True), "bench", 0)
    return seconds(lambda: _drain(core))


def _drain(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def decode(core: EngineCore, batch: int, salt: int, steps: int = 12) -> float:
    """Median seconds of a step of `batch` streams at about CONTEXT tokens."""
    for i in range(batch):
        tokens = [(salt * 104_729 + i * 6151 + j * 37) % 40_000 + 5 for j in range(CONTEXT)]
        core.add(f"d{salt}.{i}", tokens, Sampling(max_tokens=steps + 40, ignore_eos=True), "bench", 0)
    while any(not s.decoding for s in [*core.scheduler.running.values(), *core.scheduler.waiting]):
        core.step()
    taken = [seconds(core.step) for _ in range(steps)]
    for request_id in list(core._sequences):
        core.abort(request_id)
    return statistics.median(taken)


def scheduling() -> list[float]:
    """Seconds of each step at STREAMS running, a free model, 100 steps."""
    core = core_over(Free(), STREAMS * 60, max_tokens=4096, max_running=STREAMS)
    for i in range(STREAMS):
        core.add(f"s{i}", [(i * 17 + j) % 250 for j in range(400)], Sampling(max_tokens=200, ignore_eos=True), "b", 0)
    while any(not s.decoding for s in [*core.scheduler.running.values(), *core.scheduler.waiting]):
        core.step()
    return [seconds(core.step) for _ in range(100)]


def index_seconds() -> float:
    """Naming, looking for and publishing the blocks of one prompt of CONTEXT tokens, when nothing hits."""
    pool, taken = BlockPool(4096), []
    for n in range(50):
        tokens, names = [(n * 131 + j) % 40_000 for j in range(CONTEXT)], []
        blocks = pool.allocate(CONTEXT // BLOCK_SIZE)
        started = time.perf_counter()
        extend_names(names, root_name("bench", str(n)), tokens, len(tokens), BLOCK_SIZE)
        pool.match(names)
        for block, name in zip(blocks, names, strict=True):
            pool.publish(block, name)
        taken.append(time.perf_counter() - started)
        pool.release(blocks)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.engine_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quantization", choices=quantized.CPU_KINDS, default="none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(cores())
    checkpoint = open_checkpoint("smollm2")
    weights = [tensor.contiguous().view(-1).view(torch.int64) for tensor in _bf16_weights(checkpoint)]
    kinds = {name: linear_layers(checkpoint, dtype) for name, dtype in CEILINGS.items()}
    model = Llama(checkpoint, choose_dtype("auto"), options.quantization)
    core = core_over(model, 4000, max_tokens=512, max_running=64)
    widths = {layer.in_features for layer in kinds["bf16"]}
    hidden = {(w, kind): torch.randn(PREFILL, w).to(dtype) for w in widths for kind, dtype in CEILINGS.items()}
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    with torch.inference_mode():
        for repeat in range(REPEATS + 1):
            ceilings = {
                kind: seconds(lambda kind=kind: [layer(hidden[layer.in_features, kind]) for layer in kinds[kind]])
                for kind in kinds
            }
            whole = prefill(core, repeat)
            read = min(seconds(lambda: [weight.sum() for weight in weights]) for _ in range(3))
            steps = {batch: decode(core, batch, repeat * 100 + batch) for batch in BATCHES}
            if repeat == 0:
                continue  # warm-up
            note("prefill, tokens/s", PREFILL / whole)
            for kind, ceiling in ceilings.items():
                note(f"prefill, share of the {kind} matmul ceiling", ceiling / whole)
            note("one read of the bf16 weights, ms", 1000 * read)
            for batch, taken in steps.items():
                note(f"decode step, batch {batch}, ms", 1000 * taken)
                note(f"decode step, batch {batch}, over one read", taken / read)
            naming = index_seconds()
            note("naming and finding blocks, share of a prompt's prefill", naming / (whole * CONTEXT / PREFILL))
            note(f"a step of {STREAMS} streams without a model, ms", 1000 * statistics.median(scheduling()))
    write(options, figures)


def _bf16_weights(checkpoint) -> list[torch.Tensor]:
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{i}.{part}" for i in range(checkpoint.config.layers) for part in parts]
    return [checkpoint.tensor(f"{name}.weight").to(torch.bfloat16) for name in ["model.embed_tokens", *names]]


def write(options: argparse.Namespace, figures: dict[str, list[float]]) -> None:
    where, command = report.environment(), shlex.join(["python", "-m", "loadtests.engine_bench", *sys.argv[1:]])
    computer = where["machine"]
    lines = [
        "# The engine on this processor",
        "",
        f"`{command}`: SmolLM2-135M, quantization {options.quantization}; {REPEATS} repeats.",
        "",
        "| what | median | least – most |",
        "|---|---|---|",
        *(f"| {n} | {statistics.median(v):.4g} | {min(v):.4g} – {max(v):.4g} |" for n, v in figures.items()),
        "",
        f"{computer['cores']} cores ({computer['cpu']}); torch {where['versions'].get('torch')}; "
        f"commit {where['commit']}.",
        "",
    ]
    name = "engine" if options.quantization == "none" else f"engine_{options.quantization}"
    record = {"command": command, "figures": figures, "environment": where}
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
