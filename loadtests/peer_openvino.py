"""OpenVINO GenAI on the RAG workload, in its own process and without HTTP between: the best that it can do.

    PYTHON -m loadtests.peer_openvino MODEL.gguf --salt 3 [--spiky]

PYTHON has `openvino-genai`; nothing else of this project's needs is needed.  Prints one JSON line, as
`loadtests.rag` does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from loadtests.rag import BURST, MAX_TOKENS, ORDERS, PERIOD_SECONDS, USERS, Request, Seen, plan, summarise


class Pipeline:
    """Its continuous batching with prefix caching, set up as its documentation advises for chunked prefill."""

    def __init__(self, model: str, batch_tokens: int, cache_gb: int = 4):
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = cache_gb
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_seqs = 32
        scheduler.max_num_batched_tokens = batch_tokens
        self._running = genai.GenerationStatus.RUNNING
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {})
        self._tokenizer = self._pipeline.get_tokenizer()
        self._generation = genai.GenerationConfig()
        self._generation.max_new_tokens = MAX_TOKENS
        self._generation.ignore_eos = True
        self._generation.do_sample = False
        self._generation.apply_chat_template = False
        self._handles: dict[int, tuple[object, Seen]] = {}
        self._asked = 0

    @property
    def running(self) -> int:
        return len(self._handles)

    def add(self, request: Request, seen: Seen, sent: float) -> None:
        ids = self._tokenizer.encode(request.chatml, add_special_tokens=False).input_ids
        seen.sent, seen.prompt_tokens = sent, ids.shape[1]
        self._asked += 1
        self._handles[self._asked] = (self._pipeline.add_request(self._asked, ids, self._generation), seen)

    def step(self) -> None:
        self._pipeline.step()
        now = time.perf_counter()
        for key, (handle, seen) in list(self._handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    for _ in output.generated_ids:
                        seen.piece(now)
            if handle.get_status() != self._running and not handle.can_read():
                del self._handles[key]


def drive(pipeline: Pipeline, requests: Sequence[Request], spiky: bool) -> list[Seen]:
    seen = [Seen() for _ in requests]
    start, sent = time.perf_counter(), 0
    while sent < len(requests) or pipeline.running:
        now = time.perf_counter()
        while sent < len(requests):
            due = start + sent // BURST * PERIOD_SECONDS
            if (now < due) if spiky else (pipeline.running >= USERS):
                break
            pipeline.add(requests[sent], seen[sent], due if spiky else time.perf_counter())
            sent += 1
        if pipeline.running:
            pipeline.step()
        else:
            time.sleep(0.002)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peer_openvino", description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--spiky", action="store_true")
    parser.add_argument("--order", choices=ORDERS, default="ranked")
    parser.add_argument("--salt", type=int, default=1)
    options = parser.parse_args()
    pipeline = Pipeline(options.model, options.batch_tokens)
    warm, requests = plan(options.spiky, options.order, options.salt)
    drive(pipeline, warm, spiky=False)
    print(json.dumps(summarise(drive(pipeline, requests, options.spiky))))


if __name__ == "__main__":
    main()
