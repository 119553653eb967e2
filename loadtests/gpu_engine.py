"""The engine on a GPU with a model of random weights in a real model's shape: time between tokens at several batch
sizes, reading prompts, a spiky trace with and without shared documents.  Part of `python -m loadtests.gpu_check`."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from typing import Any, NamedTuple

import msgspec
import torch

from inference import Sampling
from inference.engine import EngineCore, EngineOptions, Policy
from inference.engine.calibrate import measure_step_cost
from inference.engine.device import DeviceModel
from inference.engine.sampler import choose
from inference.models import Llama
from inference.models.checkpoint import Checkpoint
from inference.models.config import ModelConfig
from kernels import BLOCK_SIZE, bytes_per_block
from loadtests.free import NoText

# Azure's code-completion service of 2023 (CC BY 4.0): quantiles of its hour, between which the trace here is drawn.  A
# second has no arrivals three times in four, or else ten on average.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
PROMPT_TOKENS = (3, 75, 578, 1469, 2745, 5194, 7315, 7437)
ANSWER_TOKENS = (1, 6, 9, 13, 24, 55, 90, 252)
QUIET_SECONDS, BURST = 0.73, 9.6
STEP_SECONDS = 0.016  # planned, so that 99 of 100 tokens come within 20 ms


class Setup(NamedTuple):
    """What is run, or rehearsed."""

    batches: tuple[int, ...] = (1, 8, 32, 64, 128)
    context: int = 1024  # tokens before the steps that are timed
    steps: int = 40
    longest: int = 8192
    chunk: int = 2048
    trace_seconds: float = 40.0
    lengths: float = 1.0  # of the trace's prompts and answers
    cache_bytes: int = 40 * 2**30


TINY = Setup((1, 2), 20, 2, 128, 32, 0.5, 0.02, 2**22)


def llama(size: str) -> ModelConfig:
    """The shape of Llama-3.1-8B, of Llama-3.2-1B, or a tiny one."""
    hidden, mlp, layers, heads, kv_heads, dim, vocab, tied = {
        "8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
        "1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
        "tiny": (64, 128, 1, 4, 2, 16, 300, False),
    }[size]
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        rms_norm_eps=1e-5,
        rope={"rope_type": "default", "rope_theta": 500000.0},
        max_context_tokens=8192,
        tied_embeddings=tied,
    )


class RandomWeights(Checkpoint):
    """Weights that nobody trained, made where they are needed."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype):
        self.path, self.config, self._device, self._dtype = f"random {config.hidden_size}", config, device, dtype

    def tensor(self, name: str) -> torch.Tensor | None:
        c = self.config
        wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
        shapes = {
            "q_proj": (wide, c.hidden_size), "k_proj": (narrow, c.hidden_size), "v_proj": (narrow, c.hidden_size),
            "o_proj": (c.hidden_size, wide), "gate_proj": (c.intermediate_size, c.hidden_size),
            "up_proj": (c.intermediate_size, c.hidden_size), "down_proj": (c.hidden_size, c.intermediate_size),
            "embed_tokens": (c.vocab_size, c.hidden_size), "lm_head": (c.vocab_size, c.hidden_size),
        }  # fmt: skip
        stem, kind = name.split(".")[-2:]
        if kind == "bias":
            return None
        if stem not in shapes:  # a norm
            return torch.ones(c.hidden_size, device=self._device, dtype=self._dtype)
        return torch.randn(shapes[stem], device=self._device, dtype=self._dtype) * 0.02


def open_core(size: str, quantization: str, kv_dtype: torch.dtype | None, setup: Setup, device: str):
    """(the engine, the model behind it); steps are planned to take STEP_SECONDS while anything is answered."""
    config = llama(size)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Llama(RandomWeights(config, device, dtype), dtype, quantization, device, kv_dtype)
    each = bytes_per_block(config.layers, config.kv_heads, config.head_dim, model.kv_dtype)
    blocks = setup.cache_bytes // each
    cache = model.new_cache(blocks)
    for layer in cache:  # random tokens read what calibration wrote: let it be numbers
        for tensor in layer:
            if tensor is not None:
                tensor.view(torch.uint8).zero_()
    placed = DeviceModel(model, cache, torch.device(device), setup.longest, max(setup.batches))
    chunks = {"many": setup.chunk, "farthest": setup.longest // 2}
    cost = measure_step_cost(placed, cache, blocks, BLOCK_SIZE, setup.longest, **chunks)
    core = EngineCore(
        placed,
        EngineOptions(
            identity=size,
            blocks=blocks,
            max_context_tokens=setup.longest,
            eos_token_ids=frozenset(),
            policy=Policy(max_tokens=setup.chunk, max_running=max(setup.batches), step_seconds=STEP_SECONDS, cost=cost),
            max_queued=10_000,
            overlap=True,
        ),
        text_stream=lambda stop: NoText(),
        clock=time.monotonic,
        cache=cache,
    )
    return core, model


def drop() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(size: str, name: str, quantization: str, kv_dtype, setup: Setup, device: str, traces: bool) -> dict:
    """Everything of one model and one rounding."""
    core, model = open_core(size, quantization, kv_dtype, setup, device)
    found: dict[str, Any] = {"model": size, "kind": name, "cost": dataclasses.asdict(core.scheduler.policy.cost)}
    found["decode"] = {str(batch): decode(core, batch, setup) for batch in setup.batches}
    found["prefill tokens/s"] = prefill(core, setup)
    found["parameters in layers"] = model.config.linear_parameters
    if traces:
        found["spiky"] = spiky(core, setup, shared=False)
        found["spiky, shared documents"] = spiky(core, setup, shared=True)
    core.pool.check()
    assert core.pool.free_blocks == core.pool.capacity, "blocks were lost"
    return found


def _prompt(rng: random.Random, tokens: int, vocab: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(tokens)]


def decode(core: EngineCore, batch: int, setup: Setup) -> dict[str, float]:
    """Milliseconds of a step of `batch` streams: `itl` in all, `host` without the wait for the tokens, and `itl in
    turn` where the host does not work ahead."""
    rng, vocab = random.Random(batch), core._model._model.config.vocab_size
    room = setup.longest - setup.context  # the first ones answer until the last one's prompt is read
    for i in range(batch):
        prompt = _prompt(rng, setup.context, vocab)
        core.add(f"d{i}", prompt, Sampling(max_tokens=room, ignore_eos=True, temperature=0.7), "", i)
    while core.scheduler.waiting or any(not s.decoding for s in core.scheduler.running.values()):
        core.step()
    itl, host = _steps(core, setup.steps)
    overlapping = core.options
    core.options = msgspec.structs.replace(overlapping, overlap=False)
    in_turn, _ = _steps(core, setup.steps)
    core.options = overlapping
    for i in range(batch):
        core.abort(f"d{i}")
    middle = statistics.median(itl)
    return {
        "itl ms": middle,
        "p99 ms": sorted(itl)[int(0.99 * (len(itl) - 1))],
        "host ms": statistics.median(host),
        "itl in turn ms": statistics.median(in_turn),
        "tokens/s": 1e3 * batch / middle,
    }


def _steps(core: EngineCore, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each of `count` steps, and of what the host did in it but wait for tokens."""
    whole, busy, waited = [], [], 0.0

    def noted(logits, sampled):
        choices = choose(logits, sampled)
        wait = choices.wait

        def timed() -> None:
            nonlocal waited
            began = time.perf_counter()
            wait()
            waited += time.perf_counter() - began

        choices.wait = timed
        return choices

    core._choose = noted
    try:
        core.step()  # the one in flight is of before
        for _ in range(count):
            began, waited = time.perf_counter(), 0.0
            for output in core.step():
                assert output.error is None, output.error
            took = time.perf_counter() - began
            whole.append(1e3 * took)
            busy.append(1e3 * (took - waited))
    finally:
        core._choose = choose
    return whole, busy


def prefill(core: EngineCore, setup: Setup) -> float:
    """Tokens a second of prompts that nothing is cached of."""
    rng, vocab = random.Random(1), core._model._model.config.vocab_size
    rates = []
    for i in range(4):
        prompt = _prompt(rng, setup.longest // 2, vocab)
        core.add(f"p{i}", prompt, Sampling(max_tokens=1, ignore_eos=True, temperature=0), "", i)
        started = time.perf_counter()
        while core.has_work:
            core.step()
        rates.append(len(prompt) / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def _between(quantiles: tuple[int, ...], share: float) -> float:
    for low, high, a, b in zip(QUANTILES, QUANTILES[1:], quantiles, quantiles[1:], strict=False):
        if share <= high:
            return a + (b - a) * (share - low) / (high - low)
    return quantiles[-1]


def spiky(core: EngineCore, setup: Setup, shared: bool) -> dict[str, float]:
    """A trace like Azure's in real time.  `shared`: a prompt is documents of 512 tokens, drawn by their popularity from
    forty, and a question; else nothing is like another."""
    rng, vocab = random.Random(7), core._model._model.config.vocab_size
    documents = [_prompt(rng, max(16, int(512 * setup.lengths)), vocab) for _ in range(40)]
    popularity = [1 / (rank + 1) for rank in range(40)]
    arrivals: list[tuple[float, list[int], int]] = []
    second = 0.0
    while second < setup.trace_seconds or not arrivals:
        for _ in range(int(rng.expovariate(1 / BURST)) if rng.random() > QUIET_SECONDS else 0):
            tokens = max(4, int(_between(PROMPT_TOKENS, rng.random()) * setup.lengths))
            answer = max(2, int(_between(ANSWER_TOKENS, rng.random()) * max(setup.lengths, 0.2)))
            prompt: list[int] = []
            while shared and len(prompt) < tokens - 64:
                prompt += rng.choices(documents, popularity)[0]
            prompt = (prompt + _prompt(rng, 64 if shared else tokens, vocab))[: setup.longest - answer]
            arrivals.append((second + rng.random(), prompt, answer))
        second += 1.0
    arrivals.sort(key=lambda each: each[0])
    cached = core.counters.cached_tokens
    last: dict[str, float] = {}
    first: list[float] = []
    gaps: list[float] = []
    began, due = time.monotonic(), 0
    while due < len(arrivals) or core.has_work:
        now = time.monotonic() - began
        while due < len(arrivals) and arrivals[due][0] <= now:
            _, prompt, answer = arrivals[due]
            core.add(f"s{due}", prompt, Sampling(max_tokens=answer, ignore_eos=True, temperature=0.7), f"{shared}", due)
            due += 1
        if not core.has_work:
            time.sleep(max(0.0, arrivals[due][0] - now))
            continue
        outputs = core.step()
        now = time.monotonic() - began
        for output in outputs:
            assert output.error is None, output.error
            arrived = arrivals[int(output.request_id[1:])][0]
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            else:
                first.append(now - arrived)
            last[output.request_id] = now
    prompt_tokens = sum(len(prompt) for _, prompt, _ in arrivals)
    return {
        "requests": len(arrivals),
        "cached share": (core.counters.cached_tokens - cached) / prompt_tokens,
        "ttft p50 ms": 1e3 * _quantile(first, 0.5),
        "ttft p95 ms": 1e3 * _quantile(first, 0.95),
        "itl p50 ms": 1e3 * _quantile(gaps, 0.5),
        "itl p99 ms": 1e3 * _quantile(gaps, 0.99),
        "preemptions": core.scheduler.preempted_total,
    }


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
