"""A backend that plays a script: what the gateway and the load tests need of a model, without one.

Its answers are made of sentences of the prompt's own documents, so retrieval, grounding and
citations have something real to hold; the same prompt and seed always give the same answer.
Tokens are words.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import re
from collections.abc import AsyncGenerator, Iterator

from inference.backend import Capabilities, Finished, GenerationEvent, GenerationRequest, Health, TextDelta, Usage
from inference.config import ScriptedConfig
from inference.errors import GenerationFailed, PromptTooLong, RequestRefused, Unavailable
from inference.prompt import ChatPrompt, Prompt
from inference.running import Run, Running

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\s*\S+")
_SENTENCE_WORDS = range(4, 41)


class ScriptedBackend:
    """Plays `config`: its times, its length, its faults.  Deterministic by prompt text and seed."""

    def __init__(self, config: ScriptedConfig):
        self._config = config
        self._running = Running()
        self._closed = False
        self._metrics = dict.fromkeys(
            ("requests_running", "requests_total", "requests_failed_total", "requests_aborted_total"), 0.0
        ) | {"prompt_tokens_total": 0.0, "completion_tokens_total": 0.0}
        self.capabilities = Capabilities(
            model=config.model,
            max_context_tokens=config.max_context_tokens,
            continues_reply=True,
            counts_tokens=True,
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        return self._play(request, self._running.open(request.request_id))

    def abort(self, request_id: str) -> None:
        self._running.abort(request_id)

    async def count_tokens(self, prompt: Prompt) -> int:
        return _count_words(prompt)

    async def health(self) -> Health:
        return Health(ready=not self._closed, detail="closed" if self._closed else "")

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    async def close(self) -> None:
        """Abort what runs; streams started later raise Unavailable."""
        self._closed = True
        self._running.abort_all()

    async def _play(self, request: GenerationRequest, run: Run) -> AsyncGenerator[GenerationEvent, None]:
        if self._closed:
            raise Unavailable("the scripted backend is closed: the server is shutting down")
        if request.sampling.constraint is not None or request.sampling.logprobs is not None:
            raise RequestRefused("a script follows no format and has no logprobs: use another backend")
        config, metrics = self._config, self._metrics
        fail_after = 0 if config.fail_before_first else config.fail_after_tokens
        prompt_tokens = _count_words(request.prompt)
        needed = prompt_tokens + request.sampling.max_tokens
        if config.max_context_tokens is not None and needed > config.max_context_tokens:
            raise PromptTooLong(needed, config.max_context_tokens)
        deltas, reason, total_tokens = plan(request, config.length)
        metrics["requests_total"] += 1
        metrics["requests_running"] += 1
        metrics["prompt_tokens_total"] += prompt_tokens
        aborted = asyncio.Event()
        run.attach(aborted.set)
        if run.aborted:
            aborted.set()
        due = asyncio.get_running_loop().time() + config.time_to_first_token
        said = 0
        try:
            for delta in deltas:
                await _wait_until(due, aborted)
                if run.aborted:
                    break
                if said == fail_after:
                    raise GenerationFailed(f"the script fails after {said} tokens, as the configuration asks")
                due += config.token_interval
                said += delta.tokens
                metrics["completion_tokens_total"] += delta.tokens
                yield delta
            else:
                if said == fail_after:
                    raise GenerationFailed(f"the script fails after {said} tokens, as the configuration asks")
                said = total_tokens
            if run.aborted:
                metrics["requests_aborted_total"] += 1
                reason = "abort"
            yield Finished(reason, Usage(prompt_tokens, said, cached_tokens=0), queued_seconds=0.0)
        except GenerationFailed:
            metrics["requests_failed_total"] += 1
            raise
        finally:
            metrics["requests_running"] -= 1


async def _wait_until(due: float, aborted: asyncio.Event) -> None:
    """Until the loop's clock says `due`, or an abort.  Always lets others run."""
    if due <= asyncio.get_running_loop().time():
        await asyncio.sleep(0)
        return
    try:
        async with asyncio.timeout_at(due):
            await aborted.wait()
    except TimeoutError:
        pass


def plan(request: GenerationRequest, length: int) -> tuple[list[TextDelta], str, int]:
    """The deltas of an answer, why it ends, and how many tokens it took (a stop string's own included)."""
    sampling = request.sampling
    asked = sampling.max_tokens if sampling.ignore_eos else min(length, sampling.max_tokens)
    words = list(itertools.islice(_words(request), asked))
    reason = "length" if asked == sampling.max_tokens else "stop"
    if words and reason == "stop":
        words[-1] = words[-1].rstrip(".,;:") + "."
    text = "".join(words)
    # A stop string acts at the token that completes it, so the one that ends first wins.
    hits = [(at + len(stop), at) for stop in sampling.stop if stop and (at := text.find(stop)) >= 0]
    if not hits:
        return [TextDelta(word) for word in words], reason, len(words)
    ends, cut = min(hits)
    deltas: list[TextDelta] = []
    position = taken = 0
    for word in words:
        if position >= ends:
            break
        taken += 1
        if kept := word[: max(0, cut - position)]:
            deltas.append(TextDelta(kept))
        position += len(word)
    return deltas, "stop", taken


def _words(request: GenerationRequest) -> Iterator[str]:
    """Endless words of an answer, each with the white space before it."""
    text = _text(request.prompt)
    seed = hashlib.sha256(f"{request.sampling.seed}\0{text}".encode("utf-8", "replace")).digest()
    chooser = random.Random(int.from_bytes(seed[:8]))
    sentences = _sentences(request.prompt)
    prefixed = isinstance(request.prompt, ChatPrompt) and bool(request.prompt.reply_prefix)
    space = " " if prefixed and not request.prompt.reply_prefix[-1:].isspace() else ""
    while True:
        chooser.shuffle(sentences)
        for sentence in sentences:
            for word in _WORD.findall(sentence):
                yield space + word.strip()
                space = " "


def _sentences(prompt: Prompt) -> list[str]:
    """What the script may say: sentences of the documents, else of the whole prompt, else a stock one."""
    texts = [_text(prompt)]
    if isinstance(prompt, ChatPrompt):
        documents = [s.text for m in prompt.messages for s in m.segments if s.kind == "document"]
        texts = documents or texts
    pieces = [piece.strip() for text in texts for piece in _SENTENCE_END.split(text)]
    sentences = [p for p in pieces if len(p.split()) in _SENTENCE_WORDS] or [p for p in pieces if p]
    return [p if p[-1] in ".!?" else p + "." for p in sentences] or ["There is nothing in the prompt to speak of."]


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return "\n".join(m.text for m in prompt.messages) + "\n" + prompt.reply_prefix
    return prompt.text


def _count_words(prompt: Prompt) -> int:
    return len(_text(prompt).split())
