"""Pre-warming: after a start, and until somebody asks, the cache is filled with the passages that are read most.

    answer ──note──▶ Popularity ◀──load, save──▶ popularity.json in the data directory: ids and counts, no text
    ready  ──run───▶ [system][document] of the most popular, one at a time        first arrival ──stop──▶ the end

Such a prompt is what an answer over the passage begins with, token for token, so the answer finds its blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from gateway.composing import SHAPES, compose
from gateway.config import Config
from gateway.metering import Metrics
from inference import Backend, Capabilities, ChatPrompt, Finished, GenerationRequest, Sampling
from retrieval import Passage, UnknownPassage, write_atomically

logger = logging.getLogger(__name__)

FILE_NAME = "popularity.json"
SCOPE = "public"  # what other scopes read is not remembered: the file would tell who asks for what
HALF_LIFE, MOST = 1000, 1000  # answers, passages
LEAST = 0.01  # a count that is as good as none
SAVE_SECONDS = 60.0
CACHE_SHARE = 0.5  # of the backend's cache: warmed beyond it, the first passages would go for the last


class Remembered(msgspec.Struct, frozen=True):
    """What the file holds: how often each passage was read, by its id."""

    passages: dict[str, Annotated[float, msgspec.Meta(gt=0, le=1e9)]]


class Popularity:
    """How often passages were read, each answer weighing half as much when `half_life` others have come since.

    The `most` popular passages are kept, and for a while as many newcomers."""

    def __init__(self, most: int = MOST, half_life: int = HALF_LIFE):
        self._most = most
        self._growth = 2 ** (1 / half_life)
        self._unit = 1.0  # what an answer counts now: it grows, so that no older count has to shrink
        self._counts: dict[str, float] = {}

    def note(self, passage_ids: Iterable[str]) -> None:
        """An answer reads these passages."""
        self._unit *= self._growth
        for passage_id in passage_ids:
            self._counts[passage_id] = self._counts.get(passage_id, 0.0) + self._unit
        if len(self._counts) > 2 * self._most or self._unit > 1e9:
            self._counts, self._unit = self.counts(), 1.0

    def add(self, counts: Mapping[str, float]) -> None:
        """What was counted before, as of now."""
        for passage_id, count in counts.items():
            self._counts[passage_id] = self._counts.get(passage_id, 0.0) + count * self._unit

    def forget(self, passage_id: str) -> None:
        self._counts.pop(passage_id, None)

    def counts(self) -> dict[str, float]:
        """Passages by id, most popular first: 1 for one that the last answer read, and none before it."""
        ranked = sorted(self._counts.items(), key=lambda item: -item[1])[: self._most]
        return {passage_id: count / self._unit for passage_id, count in ranked if count >= LEAST * self._unit}


class Warming:
    """Remembers what is popular, and warms it once after a start.  All methods are called in the event loop."""

    def __init__(self, config: Config, metrics: Metrics, clock: Callable[[], float] = time.monotonic):
        self.popularity = Popularity()
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._budget_seconds = config.answers.warm_seconds
        self._stopped = False
        self._abort: Callable[[], None] | None = None  # of the request that runs
        self._file = asyncio.Lock()
        self._loaded = False
        self._timer: asyncio.TimerHandle | None = None  # set while something isn't saved
        self._saving: asyncio.Task[None] | None = None

    def note(self, passages: Sequence[Passage], scope: str, capabilities: Capabilities) -> None:
        """An answer in `scope` gives the model these passages whole."""
        if not self._budget_seconds or scope != SCOPE or not capabilities.shares_documents:
            return
        self.popularity.note(passage.passage_id for passage in passages)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SAVE_SECONDS, self._save_now)

    def stop(self) -> None:
        """Somebody asks: end at once, and for good.  Never waits."""
        self._stopped = True
        if self._abort is not None:
            self._abort()

    async def run(self, backend: Backend, fetch: Callable[[str], Awaitable[Passage]]) -> None:
        """Warm what is popular until the budget or its share of the cache is spent, or `stop`.  Whatever fails ends it
        with a line in the log.  `fetch` raises UnknownPassage for what has been removed."""
        capabilities = backend.capabilities
        if self._stopped or not self._budget_seconds or not capabilities.shares_documents:
            return
        room = CACHE_SHARE * (capabilities.cache_tokens or float("inf"))
        began, passages, tokens = self._clock(), 0, 0
        try:
            with self._metrics.warming.track_inprogress():
                async with self._file:
                    await self._load()
                for passage_id in self.popularity.counts():
                    if self._stopped or self._clock() - began >= self._budget_seconds or tokens >= room:
                        break
                    try:
                        passage = await fetch(passage_id)
                    except UnknownPassage:
                        self.popularity.forget(passage_id)
                        continue
                    if not self._stopped:  # somebody may have come meanwhile
                        tokens += await self._warm(backend, passage)
                        passages += not self._stopped
        except Exception as error:
            logger.warning("warming ended early: %s: %s", type(error).__name__, error)
        logger.info("warmed %d passages in %.1f s, %d tokens", passages, self._clock() - began, tokens)

    async def close(self) -> None:
        """Save what isn't saved yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._save_now()
        if self._saving is not None:
            await self._saving

    async def _warm(self, backend: Backend, passage: Passage) -> int:
        """How many tokens were computed for it."""
        request = GenerationRequest(
            request_id=f"warming-{passage.passage_id}",
            prompt=beginning(self._config.answers.prompt, passage, backend.capabilities),
            sampling=Sampling(max_tokens=1),
            scope=SCOPE,
            priority="batch",
        )
        computed = 0
        self._abort = partial(backend.abort, request.request_id)
        try:
            async with aclosing(backend.generate(request)) as stream:
                async for event in stream:
                    if isinstance(event, Finished) and event.reason != "abort":
                        computed = (event.usage.prompt_tokens or 0) - (event.usage.cached_tokens or 0)
        finally:
            # Synchronous on purpose, see answering.
            self._abort()
            self._abort = None
        self._metrics.warmed_tokens.inc(computed)
        return computed

    def _save_now(self) -> None:
        self._timer = None
        self._saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        async with self._file:
            try:
                await self._load()
                data = msgspec.json.encode(Remembered(self.popularity.counts()))
                await asyncio.to_thread(write_atomically, self._config.data_dir / FILE_NAME, data)
            except Exception as error:  # an OSError, or no home directory
                logger.warning("the popularity of passages is not saved: %s", error)

    async def _load(self) -> None:
        """Add what earlier runs have counted, once.  Hold the file's lock."""
        if not self._loaded:
            self.popularity.add(await asyncio.to_thread(remembered, self._config.data_dir / FILE_NAME))
            self._loaded = True


def beginning(shape: str, passage: Passage, capabilities: Capabilities) -> ChatPrompt:
    """What the prompts of all answers begin with that read this passage first."""
    nothing_asked = msgspec.structs.replace(SHAPES[shape], question="", reply_prefix="")
    return compose(nothing_asked, "", [passage], capabilities=capabilities)


def remembered(path: Path) -> dict[str, float]:
    """The counts in the file, none where it is missing; where it is damaged, none and a line in the log."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Remembered).passages
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return {}
