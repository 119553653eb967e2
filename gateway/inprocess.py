"""One question without a server: the same way through search, model and grounding, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec

from gateway.answering import answer
from gateway.config import Config
from gateway.desk import Desk, in_daemon_thread, open_model
from gateway.identity import request_id
from gateway.wire import AnswerRequest, decode
from retrieval import OPERATOR, Library


def answer_here(config: Config, request: dict[str, Any], deliver: Callable[[str, dict[str, Any]], None]) -> None:
    """Answer `request` (a body of POST /v1/answers, read as strictly) and deliver its events as they come."""
    from gateway.desk import open_library
    from gateway.routes.answers import EVENT_NAMES, asked

    data = decode(msgspec.json.encode(request), AnswerRequest)
    with open_library(config) as library:
        asyncio.run(_answer(config, library, data, deliver, asked, EVENT_NAMES))


async def _answer(
    config: Config,
    library: Library,
    data: AnswerRequest,
    deliver: Callable[[str, dict[str, Any]], None],
    asked: Any,
    names: dict[type, str],
) -> None:
    backend = await in_daemon_thread(lambda: open_model(config))
    desk = Desk(config, library=library, backend=backend)
    try:
        async with aclosing(answer(desk, asked(data, desk, request_id({}), OPERATOR))) as events:
            async for event in events:
                deliver(names[type(event)], msgspec.to_builtins(event))
    finally:
        await desk.close()
        await backend.close()
