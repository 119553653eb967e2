"""A server with OpenAI's API and nothing of its own; the others differ from it in what is overridden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.inference.fake_servers.script import Script
from tests.inference.fake_upstream import Request, Wire

Refusal = tuple[int, Any]


@dataclass(slots=True, kw_only=True)
class Faithful(Script):
    """Call it with a connection and a request."""

    async def __call__(self, wire: Wire, request: Request) -> None:
        if request.path == "/v1/models":
            return await wire.reply(200, {"object": "list", "data": [self.card()]})
        if request.path not in ("/v1/chat/completions", "/v1/completions"):
            return await self.other(wire, request)
        body = request.json()
        chat = request.path.endswith("chat/completions")
        prompt_tokens = self.tokens_of(body)
        refusal = self.refuse(body, chat, prompt_tokens)
        if refusal is None and self.fail_before:
            refusal = 500, self.error(500, "engine died", "InternalServerError")
        if refusal is not None:
            return await wire.reply(*refusal)
        await wire.stream_head()
        await self.begin(wire, body, chat)
        await self.hold_first.wait()
        said = 0
        for text, reason in self.spoken(body["max_tokens"], body.get("stop") or (), bool(body.get("ignore_eos"))):
            if said == self.fail_after:
                await wire.event(self.late_error())
                return await wire.done()
            said += 1
            await self.say(wire, chat, text, reason)
            await self.held(said)
        await self.finish(wire, chat, prompt_tokens, said)
        await wire.done()

    async def other(self, wire: Wire, request: Request) -> None:
        await wire.reply(404, {"detail": "Not Found"})

    def card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model"}

    def tokens_of(self, body: dict[str, Any]) -> int:
        return len((body.get("prompt") or " ".join(m["content"] for m in body["messages"])).split())

    def refuse(self, body: dict[str, Any], chat: bool, prompt_tokens: int) -> Refusal | None:
        if body["model"] != self.model:
            return 404, self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        total = prompt_tokens + body["max_tokens"]
        if total > self.max_context:
            return 400, self.error(
                400,
                f"This model's maximum context length is {self.max_context} tokens. However, you requested "
                f"{total} tokens ({prompt_tokens} in the messages, {body['max_tokens']} in the completion).",
                "BadRequestError",
            )
        return None

    def error(self, status: int, message: str, kind: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": kind, "param": None, "code": status}}

    def late_error(self) -> dict[str, Any]:
        return self.error(500, "engine died", "InternalServerError")

    async def begin(self, wire: Wire, body: dict[str, Any], chat: bool) -> None:
        if chat:
            await wire.event(self.chunk(chat, {"role": "assistant", "content": ""}))

    async def say(self, wire: Wire, chat: bool, text: str, reason: str | None) -> None:
        await wire.event(self.chunk(chat, {"content": text}, reason))

    async def finish(self, wire: Wire, chat: bool, prompt_tokens: int, said: int) -> None:
        await wire.event({"choices": [], "usage": self.usage(prompt_tokens, said)})

    def usage(self, prompt_tokens: int, said: int) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": said}
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return usage

    def chunk(self, chat: bool, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        choice |= {"delta": delta} if chat else {"text": delta.get("content", "")}
        kind = "chat.completion.chunk" if chat else "text_completion"
        return {"id": "cmpl-1", "object": kind, "created": 1, "model": self.model, "choices": [choice]}


def flat(status: int, message: str, kind: str) -> dict[str, Any]:
    """The shape of errors of SGLang and trtllm-serve, and of older vLLM."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}
