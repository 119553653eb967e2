"""Who is in a fleet: replicas are opened, found, looked at when they fail, closed once their last request has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

from msgspec import structs

from inference.backend import Backend
from inference.config import OpenAIConfig, ReplicaConfig, SingleConfig, TritonConfig
from inference.errors import Unavailable
from inference.routing.record import Record
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
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
        return news + [f"replica {name} has joined" for name in replaced]

    def _opened(self, configs: Iterable[ReplicaConfig]) -> dict[Replica, tuple[ReplicaConfig, Backend]]:
        """Takes as long as loading their models does."""
        opened = {}
        for config in configs:
            backend = self._open_one(config.backend)
            held = config.cache_tokens or backend.capabilities.cache_tokens
            replica = Replica(config.own_name, record=Record(held), limit=Limit(config.max_concurrency))
            opened[replica] = config, backend
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
        replica.limit.most = config.max_concurrency

    def _retire(self, replica: Replica) -> None:
        replica.draining = True
        self._router.replicas.remove(replica)
        idle = self._leaving[replica] = asyncio.Event()
        self.let_go(replica)

        async def close_when_idle() -> None:
            await idle.wait()
            del self._leaving[replica], self._set_up[replica]
            await self._backends.pop(replica).close()
            log.info("replica %s is closed", replica.name)

        self._task(close_when_idle(), f"draining {replica.name}")

    # ---- looking ---------------------------------------------------------------------------

    async def _watch(self, replica: Replica) -> None:
        circuit = replica.circuit
        try:
            while circuit.state == "open" and replica not in self._leaving:
                await asyncio.sleep(max(0.0, circuit.until - self._clock()))
                health = await self._backends[replica].health()
                circuit.looked(health.ready, self._clock())
            log.info("replica %s: its circuit is %s", replica.name, circuit.state.replace("_", " "))
        finally:
            self._watched.discard(replica)

    async def _keep_finding(self) -> None:
        while any(config.resolve for config in self._configs):
            await asyncio.sleep(FIND_SECONDS)
            async with self._changing:
                wanted = await asyncio.to_thread(self._expanded, self._configs)
                for news in await self._become(wanted, must_be_ready=False):
                    log.info("%s", news)
        self._finding = False

    def _expanded(self, configs: Iterable[ReplicaConfig]) -> list[ReplicaConfig]:
        """With one for each address of those whose host's name is to be resolved, or itself where there is none yet."""
        expanded = []
        for config in configs:
            if not config.resolve or not isinstance(config.backend, OpenAIConfig | TritonConfig):
                expanded.append(config)
                continue
            parts = urlsplit(config.backend.base_url)
            found = []
            with contextlib.suppress(OSError):
                found = self._find(parts.hostname or "", parts.port or 80)
            for address in found:
                url = parts._replace(netloc=f"{address}:{parts.port or 80}").geturl()
                backend = structs.replace(config.backend, base_url=url)
                expanded.append(structs.replace(config, backend=backend, name=f"{config.own_name} at {address}"))
            expanded += [] if found else [config]
        return expanded

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def addresses(host: str, port: int) -> list[str]:
    """All of a host's, in order, as they stand in a URL.  Raises OSError where it has none."""
    found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    return sorted(f"[{address}]" if ":" in str(address) else str(address) for address in found)
