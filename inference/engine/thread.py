"""A thread around the core: commands in by a queue, outputs to the event loop once per step.

The event loop never waits for the engine and the engine never waits for a reader: what a reader has not
taken yet is merged in its mailbox.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable

import torch

from inference.backend import Usage
from inference.engine.core import EngineCore, Output
from inference.errors import BackendError, GenerationFailed, RequestRefused, Unavailable

log = logging.getLogger(__name__)

Command = Callable[[EngineCore], None]


class Mailbox:
    """The outputs of one request, merged until they are taken.  Filled and read on the event loop only."""

    def __init__(self) -> None:
        self._news: Output | None = None
        self._arrived = asyncio.Event()

    def put(self, output: Output) -> None:
        if self._news is not None:
            output.text = self._news.text + output.text
            output.tokens += self._news.tokens
            output.logprobs = self._news.logprobs + output.logprobs
        self._news = output
        self._arrived.set()

    async def take(self) -> Output:
        await self._arrived.wait()
        self._arrived.clear()
        news, self._news = self._news, None
        assert news is not None
        return news


class EngineThread:
    """Runs `EngineCore` in a daemon thread; all methods are called from any thread but `submit`.

    `submit` is called on the event loop that will read the mailbox.
    """

    def __init__(self, core: EngineCore, compute_threads: int | None = None):
        """`compute_threads`: cores that a step may use; torch's default where None."""
        self.core = core
        self._compute_threads = compute_threads
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, tuple[asyncio.AbstractEventLoop, Mailbox]] = {}
        self._heartbeat = time.monotonic()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="refdesk-engine", daemon=True)
        self._thread.start()

    def submit(self, request_id: str, command: Command) -> Mailbox:
        """Register a mailbox for `request_id` and run `command` (which adds the request) in the engine.
        Raises Unavailable; RequestRefused for an id that is in use."""
        if self._closed or not self._thread.is_alive():
            raise Unavailable("the engine has stopped: the server is shutting down, or must be restarted")
        if request_id in self._mailboxes:
            raise RequestRefused(f"request id {request_id!r} is already running")
        mailbox = Mailbox()
        self._mailboxes[request_id] = (asyncio.get_running_loop(), mailbox)

        def run(core: EngineCore) -> None:
            if request_id not in self._mailboxes:  # aborted before it was added
                return
            try:
                command(core)
            except BackendError as error:
                self._deliver([Output(request_id, finish="abort", error=error)])
            except Exception as error:
                log.exception("request %s could not be added", request_id)
                self._deliver([Output(request_id, finish="abort", error=GenerationFailed(str(error)))])

        self._inbox.put(run)
        if self._closed:  # it ended meanwhile, and may have answered its mailboxes before this one was there
            self._mailboxes.pop(request_id, None)
            raise Unavailable("the engine has stopped: the server is shutting down, or must be restarted")
        return mailbox

    def abort(self, request_id: str) -> None:
        """Stop a request, in whatever state, by the next step; its mailbox gets the end of it.

        Unknown and finished ids are fine, a second call does nothing.
        """

        def run(core: EngineCore) -> None:
            self._deliver([core.abort(request_id) or _never_added(request_id)])

        if request_id in self._mailboxes:
            self._inbox.put(run)

    def leave(self, request_id: str) -> None:
        """The reader of a mailbox is gone: stop its request, if it still runs, and tell nobody."""
        if self._mailboxes.pop(request_id, None) is not None:
            self._inbox.put(lambda core: core.abort(request_id) and None)

    def busy_seconds(self) -> float:
        """How long the step now running has been running; 0 when the engine waits for work."""
        beat = self._heartbeat
        return 0.0 if beat == 0.0 else time.monotonic() - beat

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Stop after the step in flight; what was running is aborted."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        error = None
        try:
            if self._compute_threads:  # a setting of each thread, so it is made in the one that computes
                torch.set_num_threads(self._compute_threads)
            while self._obey():
                self._heartbeat = time.monotonic()
                self._deliver(self.core.step())
        except BaseException:
            log.exception("the engine thread died")
            error = Unavailable("the engine has died: restart the server")
            raise
        finally:
            self._closed = True
            for request_id in list(self._mailboxes):
                output = self.core.abort(request_id) or _never_added(request_id)
                output.error = error
                self._deliver([output])

    def _obey(self) -> bool:
        """Carry out the commands that wait, or wait for one when there is nothing else to do; False to stop."""
        while True:
            try:
                if self.core.has_work:
                    command = self._inbox.get_nowait()
                else:
                    self._heartbeat = 0.0
                    command = self._inbox.get()
                    self._heartbeat = time.monotonic()
            except queue.Empty:
                return True
            if command is None:
                return False
            command(self.core)

    def _deliver(self, outputs: list[Output]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Output]]] = {}
        for output in outputs:
            ended = output.finish is not None
            found = self._mailboxes.pop(output.request_id, None) if ended else self._mailboxes.get(output.request_id)
            if found is not None and (output.text or ended or output.logprobs):
                by_loop.setdefault(found[0], []).append((found[1], output))
        for loop, mail in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, mail)
            except RuntimeError:  # that loop is closed: nobody reads any more
                for _, output in mail:
                    self._mailboxes.pop(output.request_id, None)
                    self.core.abort(output.request_id)


def _never_added(request_id: str) -> Output:
    return Output(request_id, finish="abort", usage=Usage(0, 0))


def _put_all(mail: list[tuple[Mailbox, Output]]) -> None:
    for mailbox, output in mail:
        mailbox.put(output)
