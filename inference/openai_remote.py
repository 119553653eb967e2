"""Any server with OpenAI's API as a backend, over httpx.

    generate() ── reads ──►  _Stream.events  ◄── fills ── pump task ── owns ──►  the HTTP stream

The HTTP stream belongs to a task of its own, the pump, so that leaving `generate` needs no await:
`abort` cancels the pump from any thread, and the pump, which nobody else has cancelled, closes the
connection in peace.  A server sees that as the client going away, and stops generating.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import re
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit

import httpx
import msgspec

from inference.backend import (
    Capabilities,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Health,
    TextDelta,
    Usage,
)
from inference.config import OpenAIConfig
from inference.errors import BackendError, BadUpstream, TimedOut, Unavailable
from inference.openai_wire import error_for, read_chunk, read_error, request_body
from inference.prompt import Prompt
from inference.running import Run, Running
from inference.sse import EventReader, EventTooLarge

log = logging.getLogger(__name__)

_EVENTS_AHEAD = 1024  # a reader slower than this holds the server back
_ERROR_BODY_BYTES = 64 << 10
_GRACE_SECONDS = 2.0  # for usage and [DONE] once the answer is whole, and for closing
_IDLE_CONNECTION_SECONDS = 4.0  # some servers drop idle connections after 5 s
_TRIES = 2


class OpenAIBackend:
    """Streams from `config.base_url`, given with or without `/v1`.  Raises Unavailable if it is no http(s) URL."""

    def __init__(self, config: OpenAIConfig):
        self._config = config
        self._base_url = normalise_base_url(config.base_url)
        if config.api_key and not (config.api_key.isascii() and config.api_key.isprintable()):
            raise Unavailable("api_key holds characters that no HTTP header may: was it copied whole?")
        headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity"}
        if config.api_key:
            headers["Authorization"] = f"Bearer {config.api_key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=config.connect_timeout),  # the pump watches the rest
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE_CONNECTION_SECONDS
            ),
        )
        self._running = Running()
        self._streams: set[_Stream] = set()
        self._closed = False
        names = ("requests", "requests_failed", "requests_aborted", "prompt_tokens", "cached_tokens")
        self._metrics = dict.fromkeys((f"{name}_total" for name in (*names, "completion_tokens", "retries")), 0.0)
        self.capabilities = Capabilities(
            model=config.model, max_context_tokens=config.max_context_tokens, continues_reply=config.continues_reply
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        return self._deliver(request, self._running.open(request.request_id))

    def abort(self, request_id: str) -> None:
        self._running.abort(request_id)

    async def count_tokens(self, prompt: Prompt) -> int | None:
        """None: the API has no route that counts."""
        return None

    async def health(self) -> Health:
        """Asks `GET /models`; ready means that the server answers and has the model."""
        if self._closed:
            return Health(False, "closed")
        try:
            response = await self._client.get(self._base_url + "/models", timeout=self._config.connect_timeout)
        except Exception as error:  # httpx lets errors of others through
            return Health(False, f"{self._base_url} does not answer: {type(error).__name__} {error}".rstrip())
        if response.status_code == 404:
            return Health(True, f"{self._base_url} answers, but lists no models")
        if response.status_code != 200:
            return Health(False, f"{self._base_url}/models answers with status {response.status_code}")
        try:
            names = [model.id for model in msgspec.json.decode(response.content, type=_ModelList).data]
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return Health(False, f"{self._base_url}/models does not list models: is base_url an OpenAI API?")
        if names and self._config.model not in names:
            return Health(False, f"{self._base_url} has no model {self._config.model!r}; it has {', '.join(names[:8])}")
        return Health(True)

    def metrics(self) -> dict[str, float]:
        return {"requests_running": float(len(self._streams)), **self._metrics}

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

    async def _deliver(self, request: GenerationRequest, run: Run) -> AsyncGenerator[GenerationEvent, None]:
        """The consumer's side: events in order, and no await on the way out."""
        if self._closed:
            raise Unavailable("the backend is closed: the server is shutting down")
        self._metrics["requests_total"] += 1
        stream = _Stream()
        if not run.aborted:
            stream.pump = asyncio.create_task(self._pump(request, stream), name=f"openai {request.request_id}")
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

    def _leave(self, stream: _Stream) -> None:
        self._streams.discard(stream)
        if stream.pump is not None and stream.pump.cancelled():
            stream.stop()  # whoever cancelled it, the reader must not wait on

    def _count_end(self, outcome: FinishReason | BackendError, stream: _Stream) -> None:
        if isinstance(outcome, BackendError):
            self._metrics["requests_failed_total"] += 1
        elif outcome == "abort":
            self._metrics["requests_aborted_total"] += 1
        self._metrics["prompt_tokens_total"] += stream.usage.prompt_tokens or 0
        self._metrics["completion_tokens_total"] += stream.usage.completion_tokens
        self._metrics["cached_tokens_total"] += stream.usage.cached_tokens or 0

    async def _pump(self, request: GenerationRequest, stream: _Stream) -> None:
        """The server's side.  Puts deltas, then one Finished or BackendError, into `stream`."""
        config = self._config
        path, body = request_body(config, request)
        content = msgspec.json.encode(body)
        try:
            async with asyncio.timeout(config.first_token_timeout) as deadline:
                stream.deadline = deadline
                for tries_left in reversed(range(_TRIES)):
                    try:
                        await self._exchange(path, content, request.sampling.max_tokens, stream)
                        break
                    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                        # Only what failed before the server said a word is tried again: no second answer, ever.
                        if stream.answering or not tries_left or _is_garbage(error):
                            raise
                        self._metrics["retries_total"] += 1
                        log.info("trying %s again after %r", self._base_url, error)
        except BackendError as error:
            stream.put(error)
        except TimeoutError:
            if not stream.end(request.sampling.max_tokens):
                stream.put(_timed_out(config, stream.tokens))
        except httpx.ConnectTimeout as error:
            log.warning("inference server %s: %r", self._base_url, error)
            stream.put(Unavailable("the inference server can't be reached in time: is it running?"))
        except (httpx.HTTPError, OSError) as error:
            log.warning("inference server %s: %r", self._base_url, error)
            if stream.answering:
                if not stream.end(request.sampling.max_tokens):
                    stream.put(_cut(stream.tokens))
            elif _is_garbage(error):
                stream.put(BadUpstream("the inference server does not speak HTTP: correct the backend's base_url"))
            else:
                stream.put(Unavailable("the inference server can't be reached: start it, or correct its base_url"))
        except Exception as error:  # a fault of ours must not leave the reader waiting
            log.exception("reading from the inference server failed")
            stream.put(BadUpstream(f"reading the inference server's answer failed: {type(error).__name__}"))

    async def _exchange(self, path: str, content: bytes, max_tokens: int, stream: _Stream) -> None:
        """One POST, read to its end."""
        headers = {"Content-Type": "application/json"}
        async with self._client.stream("POST", self._base_url + path, content=content, headers=headers) as response:
            stream.answering = True
            kind = response.headers.get("Content-Type", "text/event-stream").partition(";")[0].strip().lower()
            if response.status_code != 200 or kind != "text/event-stream":
                raise await self._refusal(response, kind, max_tokens)
            reader = EventReader()
            chunks = response.aiter_raw()
            async for chunk in chunks:
                try:
                    events = reader.feed(chunk)
                except EventTooLarge as error:
                    raise BadUpstream(f"the inference server's answer can't be read: {error}") from None
                for event in events:
                    if not event.data.strip():  # a sign of life
                        continue
                    if event.data == b"[DONE]":
                        if not stream.end(max_tokens, done=True):
                            raise BadUpstream("the inference server said it was done without an answer")
                        stream.allow(None)
                        await _finish_body(chunks)
                        return
                    self._read(event.data, stream, max_tokens)
                    if stream.full:
                        await self._wait_for_reader(stream)
        if (last := reader.flush()) is not None and last.data != b"[DONE]":
            with contextlib.suppress(_NotAChunk):  # half an event: what follows tells whether it mattered
                self._read(last.data, stream, max_tokens)
        if not stream.end(max_tokens, done=last is not None and last.data == b"[DONE]"):
            raise _cut(stream.tokens)

    def _read(self, data: bytes, stream: _Stream, max_tokens: int) -> None:
        """Take one event into `stream`.  Raises BackendError for an error event and for what is no chunk."""
        try:
            chunk = read_chunk(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            if stream.reason is not None:  # the answer is whole, and only its usage can't be read
                return
            raise _NotAChunk(f"the inference server sent an event that is no completion chunk: {error}") from None
        if chunk.error is not None:
            if stream.tokens:
                raise BadUpstream(f"the inference server broke off after {stream.tokens} tokens: {chunk.error.message}")
            raise error_for(chunk.error, self._config, max_tokens, None)
        stream.take(chunk.text, chunk.is_token, chunk.finish_reason, chunk.usage, self._config.token_timeout)

    async def _refusal(self, response: httpx.Response, kind: str, max_tokens: int) -> BackendError:
        body = b""
        with contextlib.suppress(TimeoutError, httpx.HTTPError):  # the status says enough
            async with asyncio.timeout(_GRACE_SECONDS):
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) > _ERROR_BODY_BYTES:
                        break
        error = read_error(response.status_code, body[:_ERROR_BODY_BYTES])
        log.warning("inference server %s: status %s: %s", self._base_url, response.status_code, error.message)
        if response.status_code == 200 and error.status == 200 and b'"error"' not in body:
            return BadUpstream(f"the inference server answered with {kind or 'nothing'} instead of a stream of events")
        return error_for(error, self._config, max_tokens, response.headers.get("Retry-After"))

    async def _wait_for_reader(self, stream: _Stream) -> None:
        """A slow reader is no fault of the server's: its clock stands still meanwhile."""
        stream.allow(None)
        while stream.full:
            stream.drained.clear()
            await stream.drained.wait()
        stream.allow(self._config.token_timeout)


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model] = []


class _NotAChunk(BadUpstream):
    pass


class _Stream:
    """What has arrived for one request and where it stands."""

    def __init__(self) -> None:
        self.events: collections.deque[TextDelta | Finished | BackendError] = collections.deque()
        self.wake = asyncio.Event()
        self.drained = asyncio.Event()
        self.pump: asyncio.Task[None] | None = None
        self.deadline: asyncio.Timeout | None = None
        self.answering = False  # the response's head has arrived
        self.stopped = False
        self.ended = False
        self.tokens = 0
        self.choices = 0
        self.reason: FinishReason | None = None
        self.told: Usage | None = None

    @property
    def usage(self) -> Usage:
        """As the server tells it; else our count of chunks, and nothing known of the prompt."""
        return self.told or Usage(None, self.tokens)

    @property
    def full(self) -> bool:
        return len(self.events) >= _EVENTS_AHEAD

    def put(self, event: TextDelta | Finished | BackendError) -> None:
        self.events.append(event)
        self.wake.set()

    def stop(self) -> None:
        """Cancel the pump, once: a second cancellation would hit it while it closes the connection."""
        if self.stopped:
            return
        self.stopped = True
        self.wake.set()
        if self.pump is not None:
            self.pump.cancel()

    def allow(self, seconds: float | None) -> None:
        """The pump may take this long from now; None: as long as it likes."""
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def take(
        self, text: str, is_token: bool, reason: FinishReason | None, usage: Usage | None, token_timeout: float
    ) -> None:
        if usage is not None:
            self.told = usage
        if text:
            self.put(TextDelta(text))
        if is_token:
            self.tokens += 1
        if reason is not None:
            self.reason = reason
        if is_token or reason is not None:
            self.allow(token_timeout if self.reason is None else min(token_timeout, _GRACE_SECONDS))

    def end(self, max_tokens: int, *, done: bool = False) -> bool:
        """Put the Finished, if the answer is whole: it gave a reason, or said `[DONE]` after some tokens."""
        if self.reason is None and done and self.tokens:
            self.reason = "length" if self.usage.completion_tokens >= max_tokens else "stop"
        if self.reason is not None and not self.ended:
            self.ended = True
            self.put(Finished(self.reason, self.usage))
        return self.ended


async def _finish_body(chunks: AsyncGenerator[bytes, None]) -> None:
    """Read the end of the body, so that the connection can serve the next request."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(_GRACE_SECONDS):
            async for _ in chunks:
                pass


def _timed_out(config: OpenAIConfig, tokens: int) -> TimedOut:
    if tokens == 0:
        return TimedOut(f"the inference server gave no first token within {config.first_token_timeout:g} s")
    return TimedOut(f"the inference server gave no token for {config.token_timeout:g} s, after {tokens} tokens")


def _is_garbage(error: Exception) -> bool:
    """Whether the server answered with something that is no HTTP, rather than not at all."""
    return isinstance(error, httpx.RemoteProtocolError) and "disconnected" not in str(error)


def _cut(tokens: int) -> BadUpstream:
    return BadUpstream(f"the inference server's stream was cut after {tokens} tokens, before the answer's end")


def normalise_base_url(base_url: str) -> str:
    """The URL that routes are appended to; `/v1` is added unless the path names a version already."""
    try:
        parts = urlsplit(base_url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        valid = False
    if not valid:
        raise Unavailable(f"base_url {base_url!r} is no http(s) URL: write it like http://127.0.0.1:8000/v1")
    url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return url if re.search(r"/v\d+[a-z0-9]*(/|$)", parts.path.rstrip("/")) else url + "/v1"
