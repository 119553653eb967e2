"""What the routes share: the library, the backend, whether they are ready, and whether we are closing.

Opening them takes seconds, so it happens beside the server: it answers health checks from the
first moment and everything else with 503 until what it needs is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import msgspec

from gateway.auth import Scopes
from gateway.config import Config, ConfigError
from gateway.errors import NotReady, ShuttingDown
from gateway.metering import Metrics
from gateway.warming import Warming
from inference import Backend, BackendError, EngineConfig, FleetConfig, open_backend
from inference.routing import FleetBackend
from retrieval import ANYBODY, Library

logger = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_SECONDS = 3.0


class Drain:
    """From the wish to stop until the last stream must end."""

    def __init__(self) -> None:
        self.begun = False
        self.expired = False
        self._listeners: set[Callable[[], None]] = set()

    def begin(self, seconds: float) -> None:
        """Call in the event loop.  Open streams may go on for `seconds`."""
        if not self.begun:
            self.begun = True
            asyncio.get_running_loop().call_later(seconds, self.expire)

    def expire(self) -> None:
        self.begun = self.expired = True
        for listener in list(self._listeners):
            listener()

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` once when time is up (at once if it is); returns how to take it off again."""
        if self.expired:
            listener()
        self._listeners.add(listener)
        return partial(self._listeners.discard, listener)


class Desk:
    """Owns what it opened itself; what was handed in is left open."""

    def __init__(self, config: Config, *, library: Library | None = None, backend: Backend | None = None):
        self.config = config
        self.drain = Drain()
        self.metrics = Metrics()
        self.scopes = Scopes()
        self.warming = Warming(config, self.metrics)
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self._library = library
        self._backend = backend
        self._owns_library = library is None
        self._owns_backend = backend is None
        # What comes in is only put on the disk; that must not keep searches from a thread either.
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="library-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="library-write")
        self._changer = ThreadPoolExecutor(1, thread_name_prefix="library-change")
        self._opening: list[asyncio.Task[None]] = []

    @property
    def library(self) -> Library:
        """Raises NotReady until it is open."""
        if self._library is None:
            raise self._not_ready()
        return self._library

    @property
    def backend(self) -> Backend:
        """Raises NotReady until its model is loaded."""
        if self._backend is None:
            raise self._not_ready()
        return self._backend

    @property
    def has_backend(self) -> bool:
        return self._backend is not None

    def lacking(self) -> list[str]:
        """What is still being opened."""
        missing = {"document library": self._library, "model": self._backend}
        return [name for name, part in missing.items() if part is None]

    async def unready(self) -> list[str]:
        """Why requests can't be answered now; empty when they can."""
        if self.drain.begun:
            return ["shutting down"]
        reasons = [f"{name}: still loading" for name in self.lacking()]
        # Not among the readers: searches that queue there must not make a busy server look dead.
        if self._library is not None and (trouble := await asyncio.to_thread(self._library.health)):
            reasons.append(f"document library: {trouble}")
        if self._backend is not None:
            health = await self._backend.health()
            if not health.ready:
                reasons.append(f"model: {health.detail or 'not ready'}")
        return reasons

    def serving(self) -> AbstractContextManager[None]:
        """While somebody is answered; what is read for nobody in particular stands back."""
        return self._library.serving() if self._library is not None else contextlib.nullcontext()

    def notices(self) -> list[str]:
        """What whoever runs this should know, though requests are answered."""
        return self._library.notices() if self._library is not None else []

    def open(self) -> None:
        """Begin to open what wasn't handed in; then warm until somebody asks."""
        self._opening.append(asyncio.create_task(self._open_all()))

    async def reload(self, config: Config) -> list[str]:
        """Take on what can change while serving, the replicas of a fleet.  What changed, in words; raises ConfigError,
        and then nothing has."""
        now = self.config
        others = [name for name in config.__struct_fields__ if getattr(config, name) != getattr(now, name)]
        news = []
        if "backend" in others:
            others.remove("backend")
            if not isinstance(self.backend, FleetBackend) or not isinstance(config.backend, FleetConfig):
                raise ConfigError("backend: only a fleet's replicas can change while it serves; this takes a restart")
            try:
                news = await self.backend.update(config.backend)
            except BackendError as error:
                raise ConfigError(f"backend: {error}") from error
            self.config = msgspec.structs.replace(now, backend=config.backend)
        return news + [f"{name}: what changed there takes a restart" for name in others]

    def give_way(self) -> None:
        """Somebody asks the model: what is done for nobody ends.  Before it can answer, nobody has asked."""
        if not self.lacking():
            self.warming.stop()

    async def close(self) -> None:
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.warming.close()
                if self._owns_backend and self._backend is not None:
                    await self._backend.close()
                if self._owns_library and self._library is not None:
                    await in_daemon_thread(self._library.close)
        except TimeoutError:
            logger.warning("closing took longer than %s s; leaving", CLOSE_SECONDS)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=False, cancel_futures=True)
        self._changer.shutdown(wait=False, cancel_futures=True)

    async def read(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run one of the library's reading calls in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(function, *args, **kwargs))

    async def change(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a change that must not wait for files that come in: a removal, or who may read."""
        return await asyncio.get_running_loop().run_in_executor(self._changer, partial(function, *args, **kwargs))

    async def write(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Take in what comes, in a thread, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, partial(function, *args, **kwargs))

    def _not_ready(self) -> NotReady:
        if self.drain.begun:
            return ShuttingDown()
        return NotReady(f"still loading: {', '.join(self.lacking())}; /health/ready says when")

    async def _open_all(self) -> None:
        # One after the other: loading is bound by the interpreter, and two threads that import transformers at
        # once can find it half imported.
        if self._owns_library and self._library is None:
            await self._open("_library", self._open_library)
        if self._owns_backend and self._backend is None and self.failure is None:
            await self._open("_backend", self._open_backend)
        if not self.lacking() and await self._begin_jobs():
            # As anybody sees it: what is no longer public must not be warmed for all.
            await self.warming.run(self.backend, partial(self.read, self.library.seen_by(ANYBODY).passage))

    async def _begin_jobs(self) -> bool:
        """Read what is queued and what lies in watched folders, beside what is answered; whether that can be."""
        try:
            await in_daemon_thread(self.library.jobs.start)
            if self.config.watch:
                self.library.watch(self.config.watches)
        except Exception as error:
            self._fail(error)
            return False
        return True

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self.on_failure()

    async def _open(self, name: str, opener: Callable[[], Any]) -> None:
        try:
            opened = await in_daemon_thread(opener)
        except Exception as error:
            self._fail(error)
            return
        setattr(self, name, opened)
        if not self.lacking():
            self.on_ready()

    def _open_library(self) -> Library:
        # Beside our engine the embedder works alone: a second team of OpenMP threads makes more threads than
        # cores, at which libgomp stops spinning between operations and a decode step takes half as long again.
        backend = self.config.backend
        each = [replica.backend for replica in backend.replicas] if isinstance(backend, FleetConfig) else [backend]
        beside_engine = any(isinstance(config, EngineConfig) for config in each)
        library = open_library(self.config, threads=1 if beside_engine else None)
        try:
            library.warm()
        except BaseException:
            library.close()
            raise
        return library

    def _open_backend(self) -> Backend:
        return open_model(self.config)


def open_library(config: Config, *, threads: int | None = None) -> Library:
    """The library in the data directory, its embedder on `threads` cores unless the configuration says how many.

    Takes seconds; raises `retrieval.RetrievalError`."""
    settings = config.retrieval
    if settings.threads is None:
        settings = msgspec.structs.replace(settings, threads=threads)
    return Library.open(config.data_dir, settings=settings)


def open_model(config: Config) -> Backend:
    """The backend that the configuration chooses.

    Takes seconds; raises what says in its message why it can't be: ConfigError where nothing else does."""
    try:
        return open_backend(config.backend)
    except Exception as error:
        if isinstance(getattr(error, "code", None), str):
            raise
        logger.info("the backend cannot be opened", exc_info=error)
        raise ConfigError(f"backend: cannot be opened as it is set up: {type(error).__name__}: {error}") from error


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """The result of a call that may take long and must not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop is closed
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name=f"refdesk-{getattr(function, '__name__', 'call')}", daemon=True).start()
    return await outcome
