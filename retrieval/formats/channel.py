"""What the process that reads files is asked and answers: msgpack behind its length, over a socket."""

from __future__ import annotations

import socket

import msgspec
from msgspec import Struct

from retrieval.formats.parsed import Parsed

MAX_MESSAGE = 256 * 1024 * 1024  # bytes


class Job(Struct, array_like=True):
    """A file's bytes, or (with `media_type` not None) a text in UTF-8."""

    name: str
    data: bytes
    media_type: str | None = None
    title: str = ""


class Reading(Struct, tag="reading", array_like=True):
    """It goes on: so many parts of the file are done."""

    done: int
    parts: int


class Done(Struct, tag="done", array_like=True):
    parsed: Parsed


class Refused(Struct, tag="refused", array_like=True):
    name: str
    reason: str
    code: str


Reply = Reading | Done | Refused


def send(channel: socket.socket, message: Job | Reply) -> None:
    data = msgspec.msgpack.encode(message)
    channel.sendall(len(data).to_bytes(8, "little"))
    channel.sendall(data)


def receive(channel: socket.socket) -> bytearray:
    """Raises EOFError when the other end is closed, or says more than anything has to say."""
    count = int.from_bytes(_exactly(channel, 8), "little")
    if count > MAX_MESSAGE:
        raise EOFError
    return _exactly(channel, count)


def _exactly(channel: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    at = 0
    while at < count:
        got = channel.recv_into(memoryview(data)[at:])
        if not got:
            raise EOFError
        at += got
    return data
