"""Files are read in a process of their own, so that a bomb, a crash or a hang costs that file and nothing else."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

import msgspec

from retrieval.errors import UnreadableFile
from retrieval.formats import progress
from retrieval.formats.channel import Done, Job, Reading, Reply, receive, send
from retrieval.formats.parsed import Parsed

log = logging.getLogger(__name__)

# What it gets of ours: no keys, no secrets.
_ENVIRONMENT = frozenset(("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"))
_ROOT = Path(__file__).parents[1]
_PATIENCE = 10


class Reader(Protocol):
    """What makes text of files.  Both raise UnreadableFile."""

    def read_file(self, name: str, data: bytes) -> Parsed: ...

    def read_source(self, name: str, text: str, media_type: str, title: str = "") -> Parsed: ...


class Sandbox:
    """A `Reader` in a process with limits (`retrieval.formats.worker`), started at first use and after each death.

    `seconds` of a processor and `megabytes` of memory are for one file, and the same seconds on the clock for each of
    the parts that it tells of (`retrieval.formats.progress`), ten times as many for all.  One file at a time: others
    wait.
    """

    def __init__(self, seconds: float, megabytes: int):
        self._seconds = seconds
        self._megabytes = megabytes
        self._turn = threading.Lock()
        self._interrupted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def read_file(self, name: str, data: bytes) -> Parsed:
        return self._ask(Job(name, data))

    def read_source(self, name: str, text: str, media_type: str, title: str = "") -> Parsed:
        return self._ask(Job(name, text.encode("utf-8", "replace"), media_type, title))

    def close(self) -> None:
        """End the process.  The next file would start another."""
        with self._turn:
            self._end()

    def interrupt(self) -> None:
        """End what is being read as if it had crashed; from now on nothing is read."""
        self._interrupted = True
        process = self._process
        if process is not None:
            process.kill()

    def _ask(self, job: Job) -> Parsed:
        with self._turn:
            fresh = self._channel is None
            try:
                return self._answered(job)
            except UnreadableFile as error:
                # What files before it left in the process must not be held against this one.
                if fresh or error.code not in ("parse_memory", "parser_crashed") or self._channel is not None:
                    raise
            return self._answered(job)

    def _answered(self, job: Job) -> Parsed:
        channel = self._started()
        if self._interrupted:
            self._end()
            raise UnreadableFile(job.name, "the library was closed while it was read", "parser_crashed")
        try:
            send(channel, job)
            until = time.monotonic() + _PATIENCE * self._seconds
            while isinstance(reply := msgspec.msgpack.decode(receive(channel), type=Reply), Reading):
                progress.tell(reply.done, reply.parts)
                if time.monotonic() > until:
                    raise TimeoutError
        except TimeoutError:
            self._end()
            raise self._too_slow(job.name) from None
        except (EOFError, ConnectionError):
            raise self._died(job.name) from None
        except BaseException:  # its answer to this would be taken for that to the next one
            self._end()
            raise
        if isinstance(reply, Done):
            return reply.parsed
        if reply.code == "parse_memory":
            self._end()
        raise UnreadableFile(reply.name, reply.reason, reply.code)

    def _started(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._channel is None:
            ours, theirs = socket.socketpair()
            # -P: what lies in the current folder is not imported.
            command = [sys.executable, "-P", "-m", "retrieval.formats.worker", str(theirs.fileno())]
            command += [str(self._megabytes), str(self._seconds)]
            path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
            environment = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
            with theirs:
                try:
                    self._process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        pass_fds=(theirs.fileno(),),
                        env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                        start_new_session=True,  # Ctrl-C is meant for us
                    )
                except BaseException:
                    ours.close()
                    raise
            # Its start counts as well, so that one that doesn't come up is noticed.
            ours.settimeout(self._seconds)
            self._channel = ours
        return self._channel

    def _died(self, name: str) -> UnreadableFile:
        process = self._process
        assert process is not None
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = 0
        self._end()
        if status == -signal.SIGXCPU:
            return self._too_slow(name)
        log.warning("the process that was reading %s ended with status %s", name, status)
        return UnreadableFile(
            name, "its reader crashed: the file is damaged, or needs more memory than is allowed", "parser_crashed"
        )

    def _too_slow(self, name: str) -> UnreadableFile:
        return UnreadableFile(name, f"reading it took longer than {self._seconds:g} s", "parse_timeout")

    def _end(self) -> None:
        process, channel, self._process, self._channel = self._process, self._channel, None, None
        if channel is not None:
            channel.close()
        if process is not None:
            process.kill()
            process.wait()
