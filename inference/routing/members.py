"""Who is in a fleet: replicas are opened, found, looked at when they fail, closed once their last request has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

from msgspec import structs

from inference.backend import Backend
from inference.config import OpenAIConfig, ReplicaConfig, SingleConfig, TritonConfig
from inference.errors import Unavailable
from inference.routing.router import Replica, Router
from inference.routing.standing import Limit

log = logging.getLogger(__name__)

FIND_SECONDS = 5.0
Open = Callable[[SingleConfig], Backend]


class Members:
    """The replicas of `configs` and their backends, kept in `router.replicas`.  Its tasks live in the loop that calls
    `begin`.  `find(host, port)`: the addresses of a host; blocks."""

    def __init__(
        self,
        configs: Iterable[ReplicaConfig],
        router: Router,
        open_one: Open,
        clock: Callable[[], float],
        find: Callable[[str, int], list[str]] | None = None,
    ):
        self._configs = list(configs)
        self._router = router
        self._open_one = open_one
        self._clock = clock
        self._find = find or addresses
        self._backends: dict[Replica, Backend] = {}
        self._set_up: dict[Replica, ReplicaConfig] = {}
        self._leaving: dict[Replica, asyncio.Event] = {}
        self._watched: set[Replica] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._finding = False
        self._found: dict[tuple[str, int], list[str]] = {}
        self._closed = False
        self.past: Counter[str] = Counter()  # what those counted that are closed: a counter never goes back
        self._join(self._opened(self._expanded(self._configs)))

    def backend(self, replica: Replica) -> Backend:
        return self._backends[replica]

    @property
    def all(self) -> dict[Replica, Backend]:
        """Those that end what they have begun included."""
        return dict(self._backends)

    def begin(self) -> None:
        """Look for new addresses of hosts from now on, where that is wanted."""
        if not self._finding and any(config.resolve for config in self._configs):
            self._finding = True
            self._task(self._keep_finding(), "finding replicas")

    async def close(self) -> None:
        """Close every backend; their requests should have been aborted."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(backend.close() for backend in self._backends.values()))

    async def update(self, configs: Iterable[ReplicaConfig]) -> list[str]:
        """Become these: what is new or set up differently is opened, and must be ready; what is gone ends what it has
        begun, and is closed.  What changed, in words.  Raises Unavailable, and then nothing has."""
        configs = list(configs)
        async with self._changing:
            wanted = await asyncio.to_thread(self._expanded, configs)
            news = await self._become(wanted, must_be_ready=True)
            self._configs = configs
        return news

    def let_go(self, replica: Replica) -> None:
        """A request has left `replica`."""
        if replica in self._leaving and not replica.running:
            self._leaving[replica].set()

    def failed(self, replica: Replica) -> None:
        """A request failed at `replica`: if that has opened its circuit, look at it until it is ready."""
        if replica.circuit.state == "open" and replica not in self._watched:
            log.warning("replica %s: its circuit is open", replica.name)
            self._watched.add(replica)
            self._task(self._watch(replica), f"watching {replica.name}")

    # ---- coming and going --------------------------------------------------------------------

    async def _become(self, wanted: list[ReplicaConfig], must_be_ready: bool) -> list[str]:
        present = {replica.name: replica for replica in self._router.replicas}
        by_name = {config.own_name: config for config in wanted}
        fresh = [
            config
            for name, config in by_name.items()
            if name not in present or self._set_up[present[name]].backend != config.backend
        ]
        opened = await asyncio.to_thread(self._opened, fresh)
        try:
            for replica, (_, backend) in opened.items() if must_be_ready else ():
                if not (health := await backend.health()).ready:
                    raise Unavailable(f"replica {replica.name} is not ready: {health.detail}; nothing was changed")
            if self._closed:
                raise Unavailable("the backend is closed: the server is shutting down")
        except BaseException:
            await asyncio.gather(*(backend.close() for _, backend in opened.values()))
            raise
        news, replaced = [], {replica.name for replica in opened}
        self._join(opened)  # first, so that there is always somebody to ask
        for name, replica in present.items():
            if name not in by_name or name in replaced:
                self._retire(replica)
                news.append(f"replica {name} ends what it has begun, then it is closed")
            elif self._set_up[replica] != by_name[name]:
                self._set(replica, by_name[name])
                news.append(f"replica {name} is set up anew")
        places = {name: place for place, name in enumerate(by_name)}
        self._router.replicas.sort(key=lambda replica: places[replica.name])
        return news + [f"replica {name} has joined" for name in replaced]

    def _opened(self, configs: Iterable[ReplicaConfig]) -> dict[Replica, tuple[ReplicaConfig, Backend]]:
        """All of them, or none stays open.  Takes as long as loading their models does."""
        opened: dict[Replica, tuple[ReplicaConfig, Backend]] = {}
        try:
            for config in configs:
                opened[Replica(config.own_name)] = config, self._open_one(config.backend)
        except BaseException:
            _close_unused([backend for _, backend in opened.values()])
            raise
        return opened

    def _join(self, opened: dict[Replica, tuple[ReplicaConfig, Backend]]) -> None:
        for replica, (config, backend) in opened.items():
            self._backends[replica] = backend
            self._set(replica, config)
            self._router.replicas.append(replica)

    def _set(self, replica: Replica, config: ReplicaConfig) -> None:
        self._set_up[replica] = config
        replica.weight, replica.tier, replica.share = config.weight, config.tier, config.share
        replica.draining = config.drain
        replica.record.capacity = config.cache_tokens or self._backends[replica].capabilities.cache_tokens
        if replica.limit.most != config.max_concurrency:
            replica.limit = Limit(config.max_concurrency)

    def _retire(self, replica: Replica) -> None:
        replica.draining = True
        self._router.replicas.remove(replica)
        idle = self._leaving[replica] = asyncio.Event()
        self.let_go(replica)

        async def close_when_idle() -> None:
            await idle.wait()
            backend = self._backends[replica]
            await backend.close()
            self.past.update({name: value for name, value in backend.metrics().items() if name.endswith("_total")})
            del self._backends[replica], self._leaving[replica], self._set_up[replica]
            log.info("replica %s is closed", replica.name)

        self._task(close_when_idle(), f"draining {replica.name}")

    # ---- looking ---------------------------------------------------------------------------

    async def _watch(self, replica: Replica) -> None:
        circuit = replica.circuit
        try:
            while circuit.state == "open":
                await asyncio.sleep(max(0.0, circuit.until - self._clock()))
                if replica not in self._router.replicas:
                    return
                health = await self._backends[replica].health()
                circuit.looked(health.ready, self._clock())
            log.info("replica %s: its circuit is %s", replica.name, circuit.state.replace("_", " "))
        finally:
            self._watched.discard(replica)

    async def _keep_finding(self) -> None:
        while any(config.resolve for config in self._configs):
            await asyncio.sleep(FIND_SECONDS)
            try:
                async with self._changing:
                    wanted = await asyncio.to_thread(self._expanded, self._configs)
                    for news in await self._become(wanted, must_be_ready=False):
                        log.info("%s", news)
            except Exception:
                log.exception("what was found can't be opened; it is tried again")
        self._finding = False

    def _expanded(self, configs: Iterable[ReplicaConfig]) -> list[ReplicaConfig]:
        """With one for each address of those whose host's name is to be resolved, or itself where there is none yet.
        A name that has no address any more keeps those that it had: their health tells whether they are gone."""
        expanded = []
        for config in configs:
            if not config.resolve or not isinstance(config.backend, OpenAIConfig | TritonConfig):
                expanded.append(config)
                continue
            parts = urlsplit(config.backend.base_url)
            place = parts.hostname or "", parts.port or 80
            found = []
            with contextlib.suppress(OSError, UnicodeError):
                found = self._find(*place)
            found = self._found[place] = found or self._found.get(place, [])
            user, at, _ = parts.netloc.rpartition("@")
            share = config.share and config.share / max(1, len(found))
            for address in found:
                url = parts._replace(netloc=f"{user}{at}{address}:{place[1]}").geturl()
                backend = structs.replace(config.backend, base_url=url)
                name = f"{config.own_name} at {address}"
                expanded.append(structs.replace(config, backend=backend, name=name, share=share))
            expanded += [] if found else [config]
        return expanded

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def addresses(host: str, port: int) -> list[str]:
    """All of a host's, in order, as they stand in a URL.  Raises OSError where it has none."""
    found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    return sorted(f"[{address}]" if ":" in str(address) else str(address) for address in found)


def _close_unused(backends: list[Backend]) -> None:
    """Close what no event loop has used yet, from any thread."""

    async def close_all() -> None:
        await asyncio.gather(*(backend.close() for backend in backends))

    thread = threading.Thread(target=lambda: asyncio.run(close_all()), name="closing replicas")
    thread.start()
    thread.join()
