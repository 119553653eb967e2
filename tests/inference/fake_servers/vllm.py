"""vLLM: unknown fields are ignored; `/health` is empty, `/tokenize` beside the API; `[DONE]` also after an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.inference.fake_servers.openai import Faithful, Refusal
from tests.inference.fake_upstream import Request, Wire


@dataclass(slots=True, kw_only=True)
class VLLM(Faithful):
    """`by_priority`: started with `--scheduling-policy priority`."""

    by_priority: bool = False
    salts: list[str | None] = field(default_factory=list)

    async def other(self, wire: Wire, request: Request) -> None:
        if request.path == "/health":
            return await wire.reply(200, b"")
        if request.path == "/tokenize":
            body = request.json()
            if body.get("continue_final_message") and body.get("add_generation_prompt", True):
                return await wire.reply(400, self.error(400, "Cannot set both", "BadRequestError"))
            count = self.tokens_of(body)
            return await wire.reply(
                200, {"count": count, "max_model_len": self.max_context, "tokens": list(range(count))}
            )
        await Faithful.other(self, wire, request)

    def card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "owned_by": "vllm", "max_model_len": self.max_context}

    def refuse(self, body: dict[str, Any], chat: bool, prompt_tokens: int) -> Refusal | None:
        salt = body.get("cache_salt")
        if salt is not None and not (isinstance(salt, str) and 1 <= len(salt) <= 1024):
            return 400, self.error(400, "Parameter 'cache_salt' must be a non-empty string.", "BadRequestError")
        if body.get("priority") and not self.by_priority:
            return 400, self.error(400, "Got priority but priority scheduling is not enabled.", "BadRequestError")
        if body.get("stream_options") and not body.get("stream"):
            message = "Stream options can only be defined when `stream=True`."
            return 400, self.error(400, message, "BadRequestError")
        self.salts.append(salt)
        return Faithful.refuse(self, body, chat, prompt_tokens)
