"""SGLang: unknown fields are ignored, any model's name will do; `top_k` 0 is refused; the reason comes by itself, after
the text; errors are flat, in a stream as `{"error": ...}`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.inference.fake_servers.openai import Faithful, Refusal, flat
from tests.inference.fake_upstream import Request, Wire


@dataclass(slots=True, kw_only=True)
class SGLang(Faithful):
    salts: list[str | None] = field(default_factory=list)

    async def other(self, wire: Wire, request: Request) -> None:
        if request.path == "/health":
            return await wire.reply(200, b"")
        if request.path == "/tokenize":
            count = self.tokens_of(request.json())
            body = {"tokens": list(range(count)), "count": count, "max_model_len": self.max_context}
            return await wire.reply(200, body)
        await Faithful.other(self, wire, request)

    def card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "owned_by": "sglang", "max_model_len": self.max_context}

    def error(self, status: int, message: str, kind: str) -> dict[str, Any]:
        return flat(status, message, kind)

    def late_error(self) -> dict[str, Any]:
        return {"error": flat(500, "engine died", "InternalServerError")}

    def refuse(self, body: dict[str, Any], chat: bool, prompt_tokens: int) -> Refusal | None:
        top_k = body.get("top_k", -1)
        if top_k < 1 and top_k != -1:
            message = f"top_k must be -1 (disable) or at least 1, got {top_k}."
            return 400, self.error(400, message, "BadRequestError")
        if prompt_tokens >= self.max_context:
            message = (
                f"The input ({prompt_tokens} tokens) is longer than the model's context length "
                f"({self.max_context} tokens)."
            )
            return 400, self.error(400, message, "BadRequestError")
        self.salts.append(body.get("cache_salt"))
        return Faithful.refuse(self, body | {"model": self.model}, chat, prompt_tokens)

    async def say(self, wire: Wire, chat: bool, text: str, reason: str | None) -> None:
        await wire.event(self.chunk(chat, {"content": text}))
        if reason is not None:
            await wire.event(self.chunk(chat, {"content": ""}, reason))
