"""llama.cpp's server: whatever is unknown is ignored, the model's name, too; filters are on where they aren't switched
off; a template route and a tokenizer; cached tokens among the timings; comments while the prompt is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.inference.fake_servers.openai import Faithful, Refusal
from tests.inference.fake_upstream import Request, Wire


@dataclass(slots=True, kw_only=True)
class LlamaCpp(Faithful):
    """`filters`: what held for the last request."""

    filters: dict[str, float] = field(default_factory=dict)

    async def other(self, wire: Wire, request: Request) -> None:
        match request.path:
            case "/health":
                await wire.reply(200, {"status": "ok"})
            case "/props":
                settings = {"id": 0, "n_ctx": self.max_context, "params": {}}
                await wire.reply(200, {"default_generation_settings": settings, "total_slots": 1})
            case "/apply-template":
                await wire.reply(200, {"prompt": " ".join(m["content"] for m in request.json()["messages"])})
            case "/tokenize":
                await wire.reply(200, {"tokens": list(range(len(request.json()["content"].split())))})
            case _:
                await Faithful.other(self, wire, request)

    def card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "owned_by": "llamacpp", "meta": {"n_ctx_train": 1 << 17}}

    def refuse(self, body: dict[str, Any], chat: bool, prompt_tokens: int) -> Refusal | None:
        defaults = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.1, "temperature": 0.8}
        self.filters = {name: body.get(name, value) for name, value in defaults.items()}
        if prompt_tokens >= self.max_context:
            error = {
                "code": 400,
                "message": f"request ({prompt_tokens} tokens) exceeds the available context size "
                f"({self.max_context} tokens), try increasing it",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": prompt_tokens,
                "n_ctx": self.max_context,
            }
            return 400, {"error": error}
        return Faithful.refuse(self, body | {"model": self.model}, chat, prompt_tokens)

    async def begin(self, wire: Wire, body: dict[str, Any], chat: bool) -> None:
        await wire.chunk(b":\n\n")
        await Faithful.begin(self, wire, body, chat)
        last = body["messages"][-1] if chat else {"role": "user"}
        if last["role"] == "assistant" and not body.get("continue_final_message"):
            await wire.event(self.chunk(chat, {"content": last["content"]}))

    async def say(self, wire: Wire, chat: bool, text: str, reason: str | None) -> None:
        await wire.event(self.chunk(chat, {"content": text}))
        if reason is not None:
            await wire.event(self.chunk(chat, {}, reason))

    async def finish(self, wire: Wire, chat: bool, prompt_tokens: int, said: int) -> None:
        timings = {"cache_n": self.cached_tokens or 0, "prompt_n": prompt_tokens, "predicted_n": said}
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": said, "total_tokens": prompt_tokens + said}
        await wire.event({"choices": [], "usage": usage, "timings": timings})
