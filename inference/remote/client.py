"""A server elsewhere as a backend, over httpx; a `Wire` knows its protocol.

    generate() ── reads ──►  Incoming.events  ◄── fills ── pump task ── owns ──►  the HTTP stream

The HTTP stream belongs to a task of its own, the pump, so that leaving `generate` needs no await:
`abort` cancels the pump from any thread, and the pump, which nobody else has cancelled, closes the
connection in peace.  A server sees that as the client going away, and stops generating.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncGenerator
from functools import cache

import httpx
from msgspec import structs

from inference.backend import Finished, FinishReason, GenerationEvent, GenerationRequest, Health
from inference.config import OpenAIConfig, TritonConfig
from inference.errors import BackendError, BadUpstream, TimedOut, Unavailable
from inference.prompt import Prompt
from inference.remote.breaker import Breaker
from inference.remote.exchange import cut, exchange
from inference.remote.incoming import Incoming
from inference.remote.wire import Facts, Wire
from inference.running import Run, Running

log = logging.getLogger(__name__)

_IDLE_CONNECTION_SECONDS = 4.0  # some servers drop idle connections after 5 s
_TRIES = 2


class RemoteBackend:
    """Streams from `config.base_url` as `wire` says.  One object for one server: several replicas are several of these,
    each with its health, its load (`metrics`) and the cached tokens that it told of."""

    def __init__(self, config: OpenAIConfig | TritonConfig, wire: Wire):
        self._config = config
        self._wire = wire
        if config.api_key and not (config.api_key.isascii() and config.api_key.isprintable()):
            raise Unavailable("api_key holds characters that no HTTP header may: was it copied whole?")
        headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity"}
        if config.api_key:
            headers["Authorization"] = f"Bearer {config.api_key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            follow_redirects=False,
            verify=_certificates(),
            timeout=httpx.Timeout(None, connect=config.connect_timeout),  # the pump watches the rest
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE_CONNECTION_SECONDS
            ),
        )
        self._running = Running()
        self._streams: set[Incoming] = set()
        self._breaker = Breaker(time.monotonic)
        self._looked = not wire.asks_first
        self._closed = False
        names = ("requests", "requests_failed", "requests_aborted", "retries", "usage_corrected")
        names += ("prompt_tokens", "cached_tokens", "completion_tokens")
        self._metrics = dict.fromkeys((f"{name}_total" for name in names), 0.0)
        self.capabilities = wire.capabilities

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        return self._deliver(request, self._running.open(request.request_id))

    def abort(self, request_id: str) -> None:
        self._running.abort(request_id)

    async def count_tokens(self, prompt: Prompt) -> int | None:
        if self._closed or not self.capabilities.counts_tokens:
            return None
        try:
            return await self._wire.count_tokens(self._fetch, prompt)
        except Exception as error:  # a server that lacks the route, or is down: the request itself will say so
            log.info("the inference server does not count tokens: %r", error)
            return None

    async def health(self) -> Health:
        """Ready means that the server answers, says that it is ready, and has the model."""
        if self._closed:
            return Health(False, "closed")
        facts = await self._look()
        return Health(facts.problem is None, str(facts.problem or facts.detail))

    def metrics(self) -> dict[str, float]:
        gauges = {"requests_running": float(len(self._streams)), "unreachable": float(self._breaker.is_open)}
        return gauges | self._metrics

    async def close(self) -> None:
        """Abort what runs and close every connection; streams started later raise Unavailable."""
        self._closed = True
        self._running.abort_all()
        pumps = [stream.pump for stream in self._streams if stream.pump is not None]
        for stream in list(self._streams):
            stream.stop()
        if pumps:
            await asyncio.wait(pumps)
        await self._client.aclose()

    # ---- the server itself -------------------------------------------------------------------

    async def _fetch(self, method: str, url: str, body: bytes | None = None) -> httpx.Response:
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with asyncio.timeout(self._config.connect_timeout):
            return await self._client.request(method, url, content=body, headers=headers)

    async def _look(self) -> Facts:
        try:
            facts = await self._wire.look(self._fetch)
        except Exception as error:  # httpx lets errors of others through
            log.warning("inference server %s: %r", self._config.base_url, error)
            return Facts(Unavailable(f"the inference server does not answer: {type(error).__name__} {error}".rstrip()))
        self._breaker.succeeded()
        if facts.problem is None:
            self._looked = True
            context = self._config.max_context_tokens or facts.max_context_tokens
            self.capabilities = structs.replace(self.capabilities, model=self._wire.model, max_context_tokens=context)
        return facts

    # ---- one request -------------------------------------------------------------------------

    async def _deliver(self, request: GenerationRequest, run: Run) -> AsyncGenerator[GenerationEvent, None]:
        """The consumer's side: events in order, and no await on the way out."""
        if self._closed:
            raise Unavailable("the backend is closed: the server is shutting down")
        self._metrics["requests_total"] += 1
        stream = Incoming(request.sampling.max_tokens)
        if not run.aborted:
            stream.pump = asyncio.create_task(self._pump(request, stream), name=f"remote {request.request_id}")
            stream.pump.add_done_callback(lambda _: self._leave(stream))
            self._streams.add(stream)
            run.attach(stream.stop)
        outcome: FinishReason | BackendError = "abort"
        try:
            while not (run.aborted or stream.stopped):
                if not stream.events:
                    stream.wake.clear()
                    await stream.wake.wait()
                    continue
                event = stream.events.popleft()
                stream.drained.set()
                if isinstance(event, BackendError):
                    outcome = event
                    raise event
                if isinstance(event, Finished):
                    outcome = event.reason
                    yield event
                    return
                yield event
            yield Finished("abort", stream.usage)
        finally:
            self._count_end(outcome, stream)
            if outcome == "abort":
                stream.stop()

    def _leave(self, stream: Incoming) -> None:
        self._streams.discard(stream)
        if stream.pump is not None and stream.pump.cancelled():
            stream.stop()  # whoever cancelled it, the reader must not wait on

    def _count_end(self, outcome: FinishReason | BackendError, stream: Incoming) -> None:
        if isinstance(outcome, BackendError):
            self._metrics["requests_failed_total"] += 1
        elif outcome == "abort":
            self._metrics["requests_aborted_total"] += 1
        self._metrics["usage_corrected_total"] += stream.corrected
        self._metrics["prompt_tokens_total"] += stream.usage.prompt_tokens or 0
        self._metrics["completion_tokens_total"] += stream.usage.completion_tokens
        self._metrics["cached_tokens_total"] += stream.usage.cached_tokens or 0

    async def _pump(self, request: GenerationRequest, stream: Incoming) -> None:
        """The server's side.  Puts deltas, then one Finished or BackendError, into `stream`."""
        try:
            async with asyncio.timeout(self._config.first_token_timeout) as deadline:
                stream.deadline = deadline
                self._breaker.admit()
                if not self._looked and (problem := (await self._look()).problem) is not None:
                    raise problem
                await self._ask(request, stream)
        except BackendError as error:
            stream.put(error)
        except TimeoutError:
            if not stream.end():
                stream.put(self._timed_out(stream.tokens))
        except (httpx.HTTPError, OSError) as error:
            log.warning("inference server %s: %r", self._config.base_url, error)
            if not (stream.answering and stream.end()):
                stream.put(self._broken(error, stream))
        except Exception as error:  # a fault of ours must not leave the reader waiting
            log.exception("reading from the inference server failed")
            stream.put(BadUpstream(f"reading the inference server's answer failed: {type(error).__name__}"))

    async def _ask(self, request: GenerationRequest, stream: Incoming) -> None:
        call = await self._wire.call(request)
        stream.expect(call)
        for tries_left in reversed(range(_TRIES)):
            try:
                await exchange(self._client, self._wire, call, stream, self._config.token_timeout)
                break
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                # Only what failed before the server said a word is tried again: no second answer, ever.
                if stream.answering or not tries_left or _is_garbage(error):
                    raise
                self._metrics["retries_total"] += 1
                log.info("trying %s again after %r", self._config.base_url, error)
            finally:
                if stream.answering:
                    self._breaker.succeeded()

    def _broken(self, error: Exception, stream: Incoming) -> BackendError:
        """What a connection that failed means."""
        if stream.answering:
            return cut(stream.tokens)
        if _is_garbage(error):
            return BadUpstream("the inference server does not speak HTTP: correct the backend's base_url")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            self._breaker.failed()
        if isinstance(error, httpx.ConnectTimeout):
            return Unavailable("the inference server can't be reached in time: is it running?")
        return Unavailable("the inference server can't be reached: start it, or correct its base_url")

    def _timed_out(self, tokens: int) -> TimedOut:
        if tokens == 0:
            return TimedOut(f"the inference server gave no first token within {self._config.first_token_timeout:g} s")
        return TimedOut(
            f"the inference server gave no token for {self._config.token_timeout:g} s, after {tokens} tokens"
        )


@cache
def _certificates() -> ssl.SSLContext:
    """Read once for all replicas of a fleet: it takes 20 ms."""
    return httpx.create_ssl_context()


def _is_garbage(error: Exception) -> bool:
    """Whether the server answered with something that is no HTTP, rather than not at all."""
    return isinstance(error, httpx.RemoteProtocolError) and "disconnected" not in str(error)
