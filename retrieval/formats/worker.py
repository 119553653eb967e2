"""The process in which files are read: `python -m retrieval.formats.worker FD MEGABYTES SECONDS`.

It gets a job over the socket FD, tells how far it is, answers, and waits for the next one, until the other end is
closed.  For what may be hostile it has little: so much memory more than it starts with, so many seconds of a processor
for each file, a few open files, none that it may write much to, and no network (where the kernel lets it give that up;
no reader in Python opens a connection in any case).  Whoever started it watches the clock (`retrieval.sandbox`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
from typing import NoReturn

import msgspec

from retrieval.errors import UnreadableFile
from retrieval.formats import progress, reading
from retrieval.formats.channel import Done, Job, Reading, Refused, Reply, receive, send

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # of <linux/sched.h>
_OPEN_FILES = 64
_WRITTEN_BYTES = 1024 * 1024
_NICENESS = 10  # people's answers are computed on the same cores


def answer(job: Job) -> Reply:
    try:
        if job.media_type is None:
            parsed = reading.read_file(job.name, job.data)
        else:
            parsed = reading.read_source(job.name, job.data.decode(), job.media_type, job.title)
    except UnreadableFile as error:
        return Refused(error.name, error.reason, error.code)
    except MemoryError:
        return Refused(job.name, "reading it takes more memory than is allowed for one file", "parse_memory")
    except Exception as error:
        return Refused(job.name, f"its reader failed ({type(error).__name__}: {error})", "parser_crashed")
    return Done(parsed)


def serve(channel: socket.socket, seconds: float) -> None:
    while True:
        try:
            job = msgspec.msgpack.decode(receive(channel), type=Job)
        except (EOFError, ConnectionError):
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        with progress.listening(lambda done, parts: send(channel, Reading(done, parts))):
            reply = answer(job)
        try:
            send(channel, reply)
        except UnicodeEncodeError:
            send(channel, Refused(job.name, "its text holds letters that no encoding has", "unreadable_file"))
        if isinstance(reply, Refused) and reply.code == "parse_memory":
            return  # what is left of its memory is in pieces; the next file gets a new process


def shut_in(megabytes: int) -> None:
    """Give up what reading a file doesn't need."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = now + megabytes * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_WRITTEN_BYTES, _WRITTEN_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    socket.socket.connect = socket.socket.connect_ex = _no_network  # type: ignore[method-assign, assignment]
    # And none for what is not Python, where the kernel lets us: a network of its own has nobody in it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)


def _no_network(*address: object) -> NoReturn:
    raise PermissionError("no reader of files may open a connection")


def main() -> None:
    # It ends when its channel does: a service's own end must not cut off the file that is being read.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICENESS)
    channel = socket.socket(fileno=int(sys.argv[1]))
    import trafilatura  # noqa: F401  here, so that its memory and time are no file's

    shut_in(int(sys.argv[2]))
    serve(channel, float(sys.argv[3]))


if __name__ == "__main__":
    main()
