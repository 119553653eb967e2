"""One RAG workload for every server that speaks OpenAI's protocol, and what its users would have felt.

    python -m loadtests.rag --url http://127.0.0.1:8080 --model smollm2 --spiky

A request is a system prompt, four passages of about 180 tokens and a question: 795 prompt tokens, 32 answered,
greedy.  The passages are the Python manual's, 400 of them, drawn by Zipf's law, so requests share documents as real
ones do, in a new order each time (`ranked`, as a retriever ranks them), by id (`canonical`) or the most popular
first (`hot`).  Users are eight who ask again as soon as they are answered (`closed`), or sixteen at once every
20 s (`spiky`).  The same seed gives the same requests; another salt shares no prefix with them, which makes a cold
cache without a restart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pydoc_data.topics import topics

PASSAGES = 400
PASSAGE_CHARACTERS = 770
PER_REQUEST = 4
USERS, REQUESTS = 8, 96
BURST, BURSTS, PERIOD_SECONDS = 16, 4, 20.0
MAX_TOKENS = 32
ORDERS = ("ranked", "canonical", "hot")
SYSTEM = (
    "[tenant {:04d}] You answer questions about a software manual. Use only the numbered passages "
    "that the user gives, be brief, and say so when the passages do not hold the answer."
)
QUESTIONS = (
    "Question: According to the passages, how does {a} relate to {b}?",
    "Question: What do these passages say about {a} and about {b}?",
    "Question: In one sentence, when would I use {a} instead of {b}?",
    "Question: Which rule in the passages above concerns {a} or {b}?",
)


@dataclass(frozen=True)
class Request:
    """`passages` by id, in the order sent; `texts` with them, and the `question` that follows."""

    passages: tuple[int, ...]
    system: str
    texts: tuple[str, ...]
    question: str

    @property
    def user(self) -> str:
        return "\n\n".join((*self.texts, self.question))

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    def in_documents(self, document_order: str) -> dict:
        """The same for a server that puts the documents of a chat in order itself."""
        system, user = self.messages
        return {
            "messages": [system, {**user, "content": self.question}],
            "documents": [{"text": text} for text in self.texts],
            "document_order": document_order,
        }

    @property
    def chatml(self) -> str:
        """The same in SmolLM2's chat template, for servers that are given the whole text."""
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in self.messages)
        return turns + "<|im_start|>assistant\n"


def corpus() -> list[str]:
    """Passages cut from the whole manual, evenly spread."""
    pieces, words, length = [], [], 0
    for word in "\n".join(topics[name] for name in sorted(topics)).split():
        words.append(word)
        length += len(word) + 1
        if length >= PASSAGE_CHARACTERS:
            pieces.append(" ".join(words))
            words, length = [], 0
    step = len(pieces) / PASSAGES
    return [pieces[int(i * step)] for i in range(PASSAGES)]


def marked(passage: int, text: str) -> str:
    """A passage as it stands in prompts."""
    return f"[doc {passage:03d}] {text}"


def workload(texts: Sequence[str], count: int, order: str = "ranked", salt: int = 0, seed: int = 1) -> list[Request]:
    """`count` requests.  Raises ValueError for an order that is none of ORDERS."""
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is none of {', '.join(ORDERS)}")
    draw, shuffle = random.Random(f"rag-load/{seed}"), random.Random(f"rag-order/{seed}")
    by_popularity = list(range(len(texts)))
    draw.shuffle(by_popularity)
    rank = {passage: place for place, passage in enumerate(by_popularity)}
    weights = [1 / (place + 1) for place in range(len(texts))]
    requests = []
    for _ in range(count):
        chosen: list[int] = []
        while len(chosen) < PER_REQUEST:
            passage = draw.choices(by_popularity, weights)[0]
            if passage not in chosen:
                chosen.append(passage)
        ranked = list(chosen)
        shuffle.shuffle(ranked)
        sent = {"ranked": ranked, "canonical": sorted(chosen), "hot": sorted(chosen, key=rank.__getitem__)}[order]
        words = sorted(set(re.findall(r"[A-Za-z]{4,9}", " ".join(texts[passage] for passage in sorted(chosen)))))
        a, b = draw.sample(words, 2)
        question = draw.choice(QUESTIONS).format(a=a, b=b)
        passages = tuple(marked(passage, texts[passage]) for passage in sent)
        requests.append(Request(tuple(sent), SYSTEM.format(salt), passages, question))
    return requests


@dataclass
class Seen:
    """One request as its user saw it; times in seconds of one clock."""

    sent: float = 0.0
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    error: str = ""
    gaps: list[float] = field(default_factory=list)

    def piece(self, now: float, tokens: int = 1) -> None:
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.tokens += tokens


def summarise(seen: Sequence[Seen]) -> dict[str, float]:
    """Rates over the time in which any request ran; seconds for the rest."""
    answered = [s for s in seen if not s.error and s.first is not None]
    busy = end = 0.0
    for began, ended in sorted((s.sent, s.last) for s in answered):
        busy += max(0.0, ended - max(began, end))
        end = max(end, ended)
    first = [s.first - s.sent for s in answered if s.first is not None]
    per_token = [(s.last - s.first) / (s.tokens - 1) for s in answered if s.first is not None and s.tokens > 1]
    gaps = [gap for s in answered for gap in s.gaps]
    prompt = sum(s.prompt_tokens for s in answered)
    return {
        "requests": len(seen),
        "failed": len(seen) - len(answered),
        "requests_per_s": round(len(answered) / busy, 4) if busy else 0.0,
        "ttft_p50": quantile(first, 0.50),
        "ttft_p95": quantile(first, 0.95),
        "tpot_p50": quantile(per_token, 0.50),
        "itl_p99": quantile(gaps, 0.99),
        "itl_max": quantile(gaps, 1.0),
        "tokens": sum(s.tokens for s in answered),
        "prompt_tokens": prompt,
        "cached_share": round(sum(s.cached_tokens or 0 for s in answered) / prompt, 4) if prompt else 0.0,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Interpolated between the nearest two; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * share
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (ordered[high] - ordered[low]) * (at - low), 4)


async def ask(client, url: str, model: str, request: Request, seen: Seen, documents: str | None = None) -> None:
    """Stream one chat completion into `seen`; what goes wrong is noted, not raised.  `documents`: the order in which
    the server shall put them, if they are to be sent apart."""
    body = {
        "model": model,
        **(request.in_documents(documents) if documents else {"messages": request.messages}),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    seen.sent = time.perf_counter()
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                now, event = time.perf_counter(), json.loads(line[5:])
                if event.get("error"):
                    raise RuntimeError(str(event["error"])[:200])
                for choice in event.get("choices") or []:
                    if choice.get("delta", {}).get("content"):
                        seen.piece(now)
                if usage := event.get("usage"):
                    seen.prompt_tokens, seen.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    seen.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if seen.first is None:
            raise RuntimeError("no token came")
    except Exception as error:  # a failure is a figure of this run
        seen.error = f"{type(error).__name__}: {error}"[:300]


async def drive(
    url: str, model: str, requests: Sequence[Request], spiky: bool, documents: str | None = None
) -> list[Seen]:
    """All of them, `spiky` or by USERS users; in their order."""
    import httpx

    seen = [Seen() for _ in requests]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=httpx.Timeout(300, connect=10), limits=limits) as client:
        jobs: Iterator = (ask(client, url, model, r, s, documents) for r, s in zip(requests, seen, strict=True))
        if not spiky:

            async def user() -> None:
                for job in jobs:
                    await job

            await asyncio.gather(*(user() for _ in range(USERS)))
            return seen
        start, tasks = time.perf_counter(), []
        for i, job in enumerate(jobs):
            if i % BURST == 0:
                await asyncio.sleep(max(0.0, start + i // BURST * PERIOD_SECONDS - time.perf_counter()))
            tasks.append(asyncio.create_task(job))
        await asyncio.gather(*tasks)
    return seen


def plan(spiky: bool, order: str, salt: int) -> tuple[list[Request], list[Request]]:
    """(eight to warm up on, those to measure)."""
    texts = corpus()
    warm = workload(texts, 8, order, salt=9000 + salt % 1000, seed=999)
    return warm, workload(texts, BURST * BURSTS if spiky else REQUESTS, order, salt)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.rag", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--spiky", action="store_true", help="sixteen at once every 20 s")
    parser.add_argument("--order", choices=ORDERS, default="ranked")
    parser.add_argument("--salt", type=int, default=1, help="0 to 9999")
    parser.add_argument(
        "--documents",
        nargs="?",
        const="planned",
        choices=("relevance", "planned", "canonical"),
        help="send the passages as `documents`, for the server to put in this order (planned)",
    )
    options = parser.parse_args()
    warm, requests = plan(options.spiky, options.order, options.salt)
    url = options.url.rstrip("/").removesuffix("/v1")
    asyncio.run(drive(url, options.model, warm, False, options.documents))
    seen = asyncio.run(drive(url, options.model, requests, options.spiky, options.documents))
    print(json.dumps(summarise(seen)))
    for error in sorted({s.error for s in seen if s.error}):
        print("failed:", error)


if __name__ == "__main__":
    main()
